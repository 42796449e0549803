"""convert into space that the target refers to already, with nothing kept: resume settles, rollback is refused."""

from __future__ import annotations

import pytest
import trio
from powercut import guest
from powercut.judge import environment
from powercut.scenarios import MIB
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.convert import convert
from safeimg.ops.convert_options import Options
from safeimg.ops.errors import Impossible, OperationPaused
from safeimg.ops.launch import Environment
from safeimg.recovery.settle import resume, rollback


@pytest.mark.parametrize("target", ["qcow2", "vdi"])
def test_in_place_without_undo(target: str) -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/source.raw", b"new!" * (MIB // 2))
    guest.create(fs, f"/t.{target}", target, 2 * MIB)
    guest.write(fs, f"/t.{target}", [(0, b"old." * (MIB // 2))], fmt=target)
    calm = environment(fs)
    steps = iter([None, None, "tired"])
    env = Environment(fs, calm.history, calm.transfer, arguments=("x",), stop=lambda: next(steps, "tired"))
    options = Options(("/source.raw",), f"/t.{target}", "raw", target, create=False, step_bytes=MIB // 2)
    with pytest.raises(OperationPaused):
        trio.run(convert, env, options)
    with pytest.raises(Impossible, match="without keeping what it overwrote: finish it with"):
        trio.run(rollback, f"/t.{target}", calm)
    assert trio.run(resume, f"/t.{target}", calm).endswith("finished")
    assert guest.content(fs, f"/t.{target}", target) == fs.read_file("/source.raw")
