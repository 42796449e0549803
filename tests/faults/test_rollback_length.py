"""Rollback and the ends of files."""

from __future__ import annotations

from powercut import guest
from powercut.judge import Judge, Look, Scenario
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


def _length(fs: SimulatedFileSystem) -> int:
    found = fs.stat("/base.qcow2")
    assert found is not None
    return found.size


def _is_before(judge: Judge, fs: SimulatedFileSystem) -> bool:
    return Look.at(fs, "/base.qcow2", "qcow2") == judge.before["/base.qcow2"]


def test_a_file_that_ends_within_a_cluster_gets_its_length_back() -> None:
    scenario = Scenario("cut short", _cut_short, COMMITS[0].run, "/base.qcow2", "/top.qcow2", BASE_AND_TOP)
    judge = Judge(scenario)
    settled = [judge.settles(state.fs, "rollback") for state in judge.states(kinds=("kill",))]
    assert {_length(fs) for fs in settled if _is_before(judge, fs)} == {_length(judge.initial)}


def _data_cut_short(fs: SimulatedFileSystem) -> None:
    """The file ends within a data cluster, which reads as zeroes from there on, and which is overwritten in place."""
    guest.create(fs, "/base.qcow2", "qcow2", 64 << 10, cluster_size="4096")
    guest.write(fs, "/base.qcow2", [(0, b"a" * 4096), (8192, b"b" * 300)])
    file = fs.open("/base.qcow2", write=True)
    end = file.length()
    assert file.pread(end - 4096, 4096) == b"b" * 300 + bytes(3796)
    file.truncate(end - 3796)
    file.sync_all()
    file.close()
    guest.create(
        fs, "/top.qcow2", "qcow2", 64 << 10, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/top.qcow2", [(8192, b"new!" * 1024)])


def test_in_place_data_across_the_end_of_the_file_is_taken_back() -> None:
    scenario = Scenario(
        "data cut short", _data_cut_short, COMMITS[0].run, "/base.qcow2", "/top.qcow2", BASE_AND_TOP
    )
    judge = Judge(scenario)
    base = judge.initial.stat("/base.qcow2")
    assert base is not None
    changes = [
        number
        for number, entry in enumerate(judge.trace_of.trace.entries, 1)
        if entry.node == base.inode and entry.kind in ("write", "truncate")
    ]
    lengths = set()
    for state in judge.states(prefixes=changes, subsets_per_prefix=0, singles_per_prefix=2):
        judge.judge(state)
        after = judge.settles(state.fs, "rollback")
        if _is_before(judge, after):
            lengths.add(_length(after))
    assert lengths == {base.size}
