"""Rollback and the ends of files."""

from __future__ import annotations

from powercut import guest
from powercut.judge import Judge, Scenario
from powercut.scenarios import BASE_AND_TOP, COMMITS
from safeimg.drivers.storage.simulated import SimulatedFileSystem


def _cut_short(fs: SimulatedFileSystem) -> None:
    """The base's file ends within its last cluster, as QEMU leaves one that it has stored a bitmap in."""
    COMMITS[0].build(fs)
    file = fs.open("/base.qcow2", write=True)
    end = file.length()
    while file.pread(end - 1, 1) == b"\0":
        end -= 1
    assert end % 4096
    file.truncate(end)
    file.sync_all()
    file.close()


def test_a_file_that_ends_within_a_cluster_gets_its_length_back() -> None:
    scenario = Scenario("cut short", _cut_short, COMMITS[0].run, "/base.qcow2", "/top.qcow2", BASE_AND_TOP)
    judge = Judge(scenario)
    length = judge.initial.stat("/base.qcow2").size
    rolled_back = set()
    for state in judge.states(kinds=("kill",)):
        after = judge.settles(state.fs, "rollback")
        if guest.content(after, "/base.qcow2") == judge.before["/base.qcow2"].content:
            rolled_back.add(after.stat("/base.qcow2").size)
    assert rolled_back == {length}
