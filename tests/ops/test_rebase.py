"""rebase -u: the header's names change, whatever their lengths; QEMU reads the result."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio
from safeimg.drivers.errors import UsageError
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.journal.history import MemoryHistory
from safeimg.ops.launch import Environment
from safeimg.ops.rebase import rebase_unsafe
from safeimg.recovery.gate import begin_or_resume

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def qemu(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 1024, 2048, 4096, 65536])
def test_names_of_every_length(tmp_path: Path, cluster: int, compat: str) -> None:
    rng = random.Random(cluster)
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},compat={compat}", image, "1M")
    qemu("qemu-img", "bitmap", "--add", image, "kept") if compat == "1.1" else None
    env = Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=1)))
    now: tuple[str | None, str | None] = (None, None)
    changed = 0
    for _ in range(12):
        longest = min(1023, cluster // 2)
        name = rng.choice((None, "b" * rng.randrange(1, longest), "c" * longest))
        wanted = (name, rng.choice(("raw", "qcow2")) if name else None)
        try:
            trio.run(begin_or_resume, str(image), env, "rebase", partial(rebase_unsafe, env, str(image), *wanted))
        except UsageError:  # no room: what was begun is taken back
            pass
        else:
            now, changed = wanted, changed + 1
        found = json.loads(qemu("qemu-img", "info", "--output=json", image))
        assert (found.get("backing-filename"), found.get("backing-filename-format")) == now
        assert "bitmaps" in found["format-specific"]["data"] or compat == "0.10"
        qemu("qemu-img", "check", image) if now[0] is None else None
        assert list(tmp_path.iterdir()) == [image]
    assert changed >= 6
