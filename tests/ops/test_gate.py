"""A command that finds itself pending, while others settle it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.loop import run_alone
from safeimg.journal.history import MemoryHistory
from safeimg.ops import snapshot
from safeimg.ops.errors import OperationPaused
from safeimg.ops.info import snapshot_members
from safeimg.ops.launch import Environment
from safeimg.recovery import gate
from safeimg.recovery.settle import resume, rollback

DATE = 1_700_000_000_123_456_000


@pytest.mark.parametrize("settle", [resume, rollback])
def test_what_others_settle_meanwhile_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle: Callable[[str, Environment], Awaitable[str]]
) -> None:
    """The command is begun, not taken for done: nobody knows which way it was settled."""
    image = str(tmp_path / "disk")
    fs = LocalFileSystem()
    lookup("qcow2").create(fs, image, 1 << 20, {})
    env = Environment(fs, MemoryHistory(), Transfer(Settings(workers=1)), arguments=("snapshot",))
    tired = env._replace(stop=lambda: "tired")
    with pytest.raises(OperationPaused):
        run_alone(lambda: snapshot.create(tired, image, "one", DATE))
    begun = 0

    async def begin() -> None:
        nonlocal begun
        begun += 1
        await snapshot.create(env, image, "begun anew", DATE)

    async def too_late(path: str, environment: Environment) -> str:
        await settle(path, environment)
        return await resume(path, environment)

    monkeypatch.setattr("safeimg.recovery.settle.resume", too_late)
    run_alone(lambda: gate.begin_or_resume(image, env, "snapshot", begin))
    assert begun == 1
    names = [str(each["name"]) for each in map(snapshot_members, snapshot.list_snapshots(fs, image))]
    assert names == (["one"] if settle is resume else []) + ["begun anew"]
    assert [each.name for each in tmp_path.iterdir()] == ["disk"]
