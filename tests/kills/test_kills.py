"""A few real kills of a small commit, and of each other operation; `python -m kills.soak` does it at length."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kills import images, rounds, soak
from kills.images import Wrong
from kills.operations import OPERATIONS

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)


def test_killed_commits_are_settled(tmp_path: Path) -> None:
    done = soak.run(tmp_path, kills=6, size=64 << 20, seed=1, quiet=True)
    assert sum(done.phases.values()) == sum(done.outcomes.values()) == 6
    assert {outcome.split(":")[0] for outcome in done.outcomes} == {"resume", "rollback", "again"}
    # And the judge bites: the images as built are not those behind a commit, nor may anything lie beside them.
    images.copy(done.pristine, done.work)
    done.settled_as("before")
    with pytest.raises(Wrong, match="does not show"):
        done.settled_as("after")
    (done.work / "base.qcow2.safeimg").touch()
    with pytest.raises(Wrong, match="left beside"):
        done.settled_as("before")


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_operations_are_settled(tmp_path: Path, name: str) -> None:
    done = rounds.run(tmp_path, OPERATIONS[name], kills=2, seed=1, quiet=True)
    assert sum(done.phases.values()) == sum(done.outcomes.values()) == 2
    # And the judge bites.
    done.ready()
    done.settled_as("before")
    with pytest.raises(Wrong, match="not as after"):
        done.settled_as("after")
