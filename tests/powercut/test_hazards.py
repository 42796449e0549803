"""The hazards of docs/design.md that concern commit, convert, the log and recovery: a test each, named by number."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from powercut import guest, straight
from powercut.catalogue import SCENARIOS
from powercut.judge import STEP_BYTES, Judge, Look, Scenario, environment, sidecars
from powercut.look import digest_of
from powercut.undos import KEEPING, done, undoing
from safeimg.drivers.errors import DriverError, SyncFailed
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.storage.powercut import crash_states, power_cut, replay
from safeimg.drivers.storage.simulated import Killed, SimulatedFileSystem
from safeimg.journal import find, kept
from safeimg.journal.codec import encode_event
from safeimg.journal.errors import LogForeign
from safeimg.journal.events import Declared, ImageRecord, PatchRecord, PointOfNoReturn, StepPrepared
from safeimg.journal.history import MemoryHistory
from safeimg.journal.identity import identify
from safeimg.journal.log import Log, read_events
from safeimg.journal.state import LiveStep, fold
from safeimg.ops.bitmap_plan import listed
from safeimg.ops.commit_job import commit
from safeimg.ops.errors import Conflict, Impossible, OperationError
from safeimg.recovery.composite import SECTOR, composite
from safeimg.recovery.settle import resume, rollback
from safeimg.recovery.undo import undo

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def scenario(name: str) -> Scenario:
    return next(each for each in SCENARIOS if each.name == name)


def killed_when(which: Scenario, reached: Callable[[SimulatedFileSystem], bool]) -> SimulatedFileSystem:
    """The files as a SIGKILL leaves them at the first call at which `reached` holds."""
    low = 1
    while True:
        fs = which.prepare()
        fs.begin_trace()
        fs.kill_at(low)
        try:
            which.execute(fs)
        except Killed:
            pass
        except BaseExceptionGroup as group:
            if group.split(Killed)[1] is not None:
                raise
        else:
            pytest.fail("the operation ended before")
        left = fs.clone()
        if reached(left):
            return left
        low += 1


def steps(fs: SimulatedFileSystem, home: str) -> list[LiveStep]:
    path = home + ".safeimg"
    try:
        return fold(read_events(fs, path)).steps if fs.stat(path) is not None else []
    except Exception:  # not yet a log
        return []


def applied(name: str, count: int, home: str = "/base.qcow2") -> Callable[[SimulatedFileSystem], bool]:
    """That many steps of this name are solid."""
    return lambda fs: sum(step.prepared.name == name and step.applied for step in steps(fs, home)) >= count


def settle(fs: SimulatedFileSystem, action: str, path: str = "/base.qcow2", **options: bool) -> str:
    act = resume if action == "resume" else rollback

    async def main() -> str:
        return await act(path, environment(fs), **options)

    return straight.run(main)


def refused(fs: SimulatedFileSystem, error: type[Exception] = Conflict) -> None:
    """Neither way of settling writes anything."""
    images = {name: fs.read_file("/" + name) for name in fs.list_directory("/") if ".safeimg" not in name}
    for action in ("resume", "rollback"):
        with pytest.raises(error):
            settle(fs, action)
    assert images == {name: fs.read_file("/" + name) for name in images}


def test_hazard_01_links_survive_without_what_they_link_to() -> None:
    """Of each file's unsynced changes only the newest survives, or all but one, or the data without the length."""
    judge = Judge(scenario("commit"))
    for state in judge.states(seed=1, prefixes=10, subsets_per_prefix=0, singles_per_prefix=3, kinds=("power",)):
        judge.judge(state)
    assert judge.counter.states > 30


def test_hazard_02_a_guest_takes_a_prepared_cluster() -> None:
    """Version 2 has no fence: after a kill a guest runs on the base and allocates what the step had prepared."""
    fs = killed_when(scenario("commit, version 2"), applied("data", 1))
    prepared = [step for step in steps(fs, "/base.qcow2") if step.prepared.fresh]
    assert prepared
    free = 48 * 4096  # a guest cluster that neither image has
    guest.write(fs, "/base.qcow2", [(free, b"g" * 4096)])
    before = guest.content(fs, "/base.qcow2", "qcow2")
    try:
        settle(fs.clone(), "resume")
        settle(fs, "rollback")
    except OperationError:
        assert guest.content(fs, "/base.qcow2", "qcow2") == before
    else:
        assert guest.content(fs, "/base.qcow2", "qcow2")[free : free + 4096] == b"g" * 4096


def test_hazard_03_an_older_backup_is_restored_over_a_pending_image() -> None:
    which = scenario("commit into raw")
    fs = killed_when(which, applied("data", 2, "/base.raw"))
    old = which.prepare().read_file("/base.raw")
    file = fs.open("/base.raw", write=True)
    file.pwrite(0, old)
    file.sync_all()
    file.close()
    for action in ("resume", "rollback"):
        with pytest.raises(Conflict, match=r"/base\.raw"):
            settle(fs, action, "/base.raw")
    assert fs.read_file("/base.raw")[: len(old)] == old


def test_hazard_04_the_guest_runs_on_the_overlay_of_a_half_done_commit() -> None:
    fs = killed_when(scenario("commit"), applied("data", 1))
    with pytest.raises(DriverError, match="Image is corrupt; cannot be opened read/write"):
        guest.write(fs, "/top.qcow2", [(0, b"guest")])
    fs = killed_when(scenario("commit, version 2"), applied("data", 1))
    file = fs.open("/top.qcow2", write=True)  # whatever wrote to it, and however
    file.pwrite(file.length(), b"guest")
    file.close()
    refused(fs)


def test_hazard_05_a_copy_with_its_log_does_not_lead_to_the_original() -> None:
    which = scenario("commit")
    fs = killed_when(which, applied("data", 1))
    fs.make_directory("/copy")
    for name in fs.list_directory("/"):
        if "." in name:
            fs.write_file("/copy/" + name, fs.read_file("/" + name))
    original = {name: fs.read_file("/" + name) for name in fs.list_directory("/") if "." in name}
    with pytest.raises((Conflict, LogForeign)):
        settle(fs, "rollback", "/copy/base.qcow2")
    settle(fs, "rollback", "/copy/base.qcow2", adopt=True)
    assert original == {name: fs.read_file("/" + name) for name in original}
    assert guest.content(fs, "/copy/base.qcow2") == guest.content(which.prepare(), "/base.qcow2")


def test_hazard_06_freed_space_is_not_used_again() -> None:
    judge = Judge(scenario("commit, compressed"))
    taken: list[tuple[int, int]] = []
    freed: list[tuple[int, int]] = []
    fs = killed_when(scenario("commit, compressed"), applied("release", 1))
    for step in steps(fs, "/base.qcow2"):
        taken += [(record.offset, record.length) for record in step.prepared.fresh]
        freed += [(record.offset, record.length) for record in step.prepared.unlinked]
    assert taken and freed
    assert not any(a < d + e and d < a + b for a, b in taken for d, e in freed)
    assert judge.after


def test_hazard_07_recovery_acts_on_a_log_that_was_not_synced() -> None:
    """Killed between write and sync; recovery acts on what it reads; then the power goes."""
    judge = Judge(scenario("commit into raw"))
    for state in judge.states(seed=7, prefixes=6, kinds=("kill",)):
        judge.crash_again(state, seed=7, count=5)
    assert judge.counter.second > 50


def test_hazard_08_a_sync_fails_once() -> None:
    """The data is gone although a later sync succeeds: nothing more is written, and the log does not claim it."""
    which = scenario("commit")
    judge = Judge(which)
    seen = 0
    for number in range(1, 40):
        fs = judge.initial.clone()
        fs.begin_trace()
        fs.fail_sync(number)
        try:
            which.execute(fs)
        except SyncFailed:
            seen += 1
        except DriverError as error:
            pytest.fail(str(error))
        else:
            break
        cut = power_cut(fs, "none")
        judge.settles(cut, "resume")
        judge.settles(cut, "rollback")
    assert seen > 5


def test_hazard_09_somebody_else_grew_the_file() -> None:
    fs = killed_when(scenario("commit into raw"), applied("data", 2, "/base.raw"))
    file = fs.open("/base.raw", write=True)
    end = file.length()
    file.pwrite(end, b"more" * 1024)
    file.sync_all()
    file.close()
    done = settle(fs, "rollback", "/base.raw")
    assert "its length stays" in done
    assert fs.read_file("/base.raw")[end:] == b"more" * 1024


def test_hazard_10_steps_patch_the_same_bytes() -> None:
    """A to B to C in one sector: what may be on disk depends on which steps are in flux."""

    def step(number: int, before: bytes, after: bytes, *, done: bool) -> LiveStep:
        patch = PatchRecord(0, 100, before, after)
        return LiveStep(StepPrepared(number, "data", allocate=(patch,), cursor=number), applied=done)

    def sector(content: bytes) -> bytes:
        return bytes(100) + content + b"theirs" + bytes(SECTOR - 107)

    for solid, allowed in ((0, b"ABC"), (1, b"BC"), (2, b"C")):
        found = composite([step(1, b"A", b"B", done=solid > 0), step(2, b"B", b"C", done=solid > 1)], 0)
        assert list(found) == [0]
        for value in b"ABCD":
            assert found[0].allows(sector(bytes([value]))) is (value in allowed)


def test_hazard_10_a_step_is_taken_back_where_the_one_below_it_was_lost() -> None:
    """Both in flux: the older one patched two bytes, the newer one the second of them. The power cut lost both;
    taking back the newer one then puts back what the older one had made of that byte."""
    steps = [
        LiveStep(StepPrepared(1, "data", link=(PatchRecord(0, 100, b"ab", b"AB"),), cursor=1)),
        LiveStep(StepPrepared(2, "data", link=(PatchRecord(0, 101, b"B", b"C"),), cursor=2), taking_back=True),
    ]
    found = composite(steps, 0)[0]
    for content in (b"ab", b"AB", b"AC", b"aB", b"ax", b"CB"):
        assert found.allows(bytes(100) + content + bytes(SECTOR - 102)) is (content not in (b"ax", b"CB"))
    steps[0].applied = True
    assert not composite(steps, 0)[0].allows(bytes(100) + b"aB" + bytes(SECTOR - 102))


def test_a_data_file_gets_data_before_its_step_is_on_record() -> None:
    """It has no fence: what it looks like says nothing of whether somebody else wrote to it."""
    judge = Judge(scenario("convert -n --undo into a data file"))
    writes = [
        number
        for number, entry in enumerate(judge.trace_of.trace.entries, 1)
        if entry.kind == "write" and entry.node == judge.initial.stat("/data.bin").inode
    ]
    assert writes
    for number in writes:
        judge.judge(replay(judge.initial, judge.trace_of.trace, f"prefix={number} seed=0 kind=kill member=whole"))


@needs_qemu
def test_hazard_11_bitmaps_of_the_base_cover_the_commit(tmp_path: Path) -> None:
    fs = scenario("commit").prepare()
    fs.export_file("/base.qcow2", str(tmp_path / "base"))
    for name, flag in (("on", "--enable"), ("off", "--disable")):
        subprocess.run(
            ["qemu-img", "bitmap", "-f", "qcow2", "--add", flag, "-g", "4096", tmp_path / "base", name], check=True
        )
    fs.unlink("/base.qcow2")
    fs.import_file(str(tmp_path / "base"), "/base.qcow2")
    which = replace(scenario("commit"), build=lambda other: None)
    data = {name: fs.read_file("/" + name) for name in fs.list_directory("/")}

    def build(other: SimulatedFileSystem) -> None:
        for name, content in data.items():
            other.write_file("/" + name, content)

    which = replace(which, build=build)
    judge = Judge(which)
    for state in judge.states(seed=11, prefixes=10, subsets_per_prefix=1, singles_per_prefix=1):
        judge.judge(state)
    fs = power_cut(judge.trace_of, "all")
    chain = open_chain(fs, "/base.qcow2", write=True, repair=True)
    planner = lookup("qcow2").planner(chain[0])
    assert not planner.mark_dirty([(0, 12 * 1024), (20 * 1024 + 100, 4096), (160 * 1024, 4096)])  # all set already
    assert planner.mark_dirty([(220 * 1024, 4096)])  # never written
    close_chain(chain)
    killed = killed_when(which, applied("data", 1))
    names = [step.prepared.name for step in steps(killed, "/base.qcow2")]
    assert names.index("bitmaps") < names.index("data")


def test_hazard_12_growing_exposes_nothing_old() -> None:
    which = scenario("commit, base growing on a larger one")
    judge = Judge(which)
    grown = judge.after["/base.qcow2"]
    assert grown.size == 256 * 1024
    assert grown.content == digest_of(guest.content(which.prepare(), "/top.qcow2"))
    killed = killed_when(which, applied("size", 1))
    names = [step.prepared.name for step in steps(killed, "/base.qcow2")]
    assert names.index("zero") < names.index("size")


def test_hazard_13_a_log_that_names_other_peoples_files() -> None:
    """A log arrives with an image and names a file that has no pointer to it: that file is never written."""
    fs = SimulatedFileSystem()
    guest.create(fs, "/evil.qcow2", "qcow2", 65536)
    fs.make_directory("/etc")
    fs.write_file("/etc/shadow", b"root:secret\n" * 100)
    records = []
    for path, name in (("/evil.qcow2", "evil.qcow2"), ("/etc/shadow", "etc/shadow")):
        file = fs.open(path)
        records.append(ImageRecord("base", name, "raw", identify(file), True))
        file.close()
    victim = killed_when(scenario("commit"), applied("data", 1))
    events = read_events(victim, "/base.qcow2.safeimg")
    declared = events[0]
    assert isinstance(declared, Declared)
    found = fs.stat("/evil.qcow2")
    assert found is not None
    log = Log.create(fs, "/evil.qcow2.safeimg", declared.operation, found)
    log.append(declared._replace(images=tuple(records)))
    for event in events[1:]:
        log.append(event)
    log.sync()
    log.close()
    for action in ("resume", "rollback"):
        with pytest.raises((OperationError, DriverError, LogForeign)):
            settle(fs, action, "/evil.qcow2")
    assert fs.read_file("/etc/shadow") == b"root:secret\n" * 100
    assert encode_event(declared)


@pytest.mark.parametrize("name", ["rebase -u, long name", "bitmap --add, the first"])
def test_hazard_14_names_and_extensions_fit_their_header_in_every_crash_state(name: str) -> None:
    """A backing name and its length, a bitmap extension and its flag: all of the one or all of the other."""
    judge = Judge(scenario(name))

    def header(fs: SimulatedFileSystem) -> tuple[str | None, tuple[str, ...]]:
        chain = guest.opened(fs, judge.scenario.home, "qcow2", backing=False)
        try:
            return chain[0].backing_file, tuple(state.name for state in listed(chain[0]))
        finally:
            close_chain(chain)

    allowed = {header(judge.initial.clone()), header(judge.trace_of.clone())}
    assert len(allowed) == 2
    seen = set()
    for state in judge.states(seed=14, prefixes=24, subsets_per_prefix=2, singles_per_prefix=1):
        seen.add(header(state.fs.clone()))
        judge.judge(state)
    assert seen == allowed


@pytest.mark.parametrize("action", ["-c third", "-a first", "-d first", "-d second"])
def test_hazard_15_copied_flags_and_refcounts_change_together(action: str) -> None:
    """Whatever is written, and however little of it: the image is sound, and nothing has leaked."""
    fs = scenario(f"snapshot {action}").prepare()
    (image,) = open_chain(fs, "/disk.qcow2", write=True, backing=False)
    snapshots = lookup("qcow2").snapshots
    assert snapshots is not None
    planner = lookup("qcow2").planner(image)
    option, name = action.split()
    entry = next((each for each in snapshots.entries(image) if each.name == name), None)
    before = Look.at(fs.clone(), "/disk.qcow2", "qcow2")
    if option == "-c":
        plan = snapshots.create(image, planner, name, 1, 0)
    else:
        assert entry is not None
        plan = (snapshots.apply if option == "-a" else snapshots.delete)(image, planner, entry)
    for changes in plan:
        assert Look.at(fs.clone(), "/disk.qcow2", "qcow2") == before
        for offset, content in changes.fresh:
            for at in range(0, len(content), SECTOR):
                image.file.pwrite(offset + at, content[at : at + SECTOR])
            assert Look.at(fs.clone(), "/disk.qcow2", "qcow2") == before
        assert not changes.allocate
        for patch in changes.link:
            assert patch.offset + len(patch.after) <= SECTOR
            image.file.pwrite(patch.offset, patch.after)
    after = Look.at(fs.clone(), "/disk.qcow2", "qcow2")
    assert after.leaks == before.leaks == 0 and after != before
    close_chain([image])


def test_hazard_18_a_dirty_base_is_repaired_first() -> None:
    """Refcounts of an image with lazy refcounts that was not closed cannot be trusted: nothing is allocated by them."""
    which = scenario("commit")
    fs = which.prepare()
    shown = guest.content(fs, "/top.qcow2")
    file = fs.open("/base.qcow2", write=True)
    file.pwrite(79, b"\x01")  # incompatible feature bit 0
    table = int.from_bytes(file.pread(48, 8), "big")
    block = int.from_bytes(file.pread(table, 8), "big")
    file.pwrite(block + 2 * 5, bytes(2 * 60))  # 60 clusters look free: what lazy refcounts leave behind
    file.close()
    which.execute(fs)
    assert fs.read_file("/base.qcow2")[79] == 0 and not sidecars(fs)
    base = Look.at(fs, "/base.qcow2", "qcow2")  # its metadata is checked
    assert base.leaks == 0 and base.content == digest_of(shown) == digest_of(guest.content(fs, "/top.qcow2"))


@needs_qemu
def test_hazard_19_the_user_repairs_leaks_of_a_pending_image(tmp_path: Path) -> None:
    """`check -r leaks` takes the fence down, and frees and discards what the commit had replaced: it can be finished,
    and no more be taken back."""
    judge = Judge(scenario("commit, compressed"))
    fs = killed_when(judge.scenario, applied("data", 2))
    fs.export_file("/base.qcow2", str(tmp_path / "base"))
    subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", tmp_path / "base"], check=False)
    file = fs.open("/base.qcow2", write=True)
    file.pwrite(0, (tmp_path / "base").read_bytes())
    file.sync_all()
    file.close()
    with pytest.raises(Conflict, match="were freed while it was pending"):
        settle(fs.clone(), "rollback")
    settle(fs, "resume")
    expected, found = judge.after["/base.qcow2"], Look.at(fs, "/base.qcow2", "qcow2")
    assert (found.content, found.leaks) == (expected.content, 0)


def test_hazard_20_the_same_image_by_other_names() -> None:
    which = scenario("commit")
    fs = killed_when(which, applied("data", 1))
    fs.symlink("/base.qcow2", "/link.qcow2")
    fs.link("/base.qcow2", "/hard.qcow2")
    for name in ("/link.qcow2", "/hard.qcow2", "/top.qcow2"):
        copy = fs.clone()
        settle(copy, "rollback", name)
        assert guest.content(copy, "/base.qcow2") == guest.content(which.prepare(), "/base.qcow2")
        assert not sidecars(copy)


def test_hazard_21_freeing_begins_only_behind_a_durable_point_of_no_return() -> None:
    chain = scenario("commit")

    def build(fs: SimulatedFileSystem) -> None:
        chain.build(fs)
        guest.write(fs, "/top.qcow2", [(0, b"much" * 50 * 1024)])

    judge = Judge(replace(chain, build=build))
    small = len(judge.trace_of.read_file("/top.qcow2"))
    emptied = killed_when(judge.scenario, applied("empty", 1))
    assert len(emptied.read_file("/top.qcow2")) > small
    last = range(len(judge.trace_of.trace) - 25, len(judge.trace_of.trace) + 1)
    cut = 0
    for state in judge.states(seed=21, prefixes=list(last), subsets_per_prefix=1, singles_per_prefix=1):
        if len(state.fs.read_file("/top.qcow2")) > small or state.fs.stat("/base.qcow2.safeimg") is None:
            continue
        cut += 1
        events = read_events(state.fs, "/base.qcow2.safeimg")
        assert any(isinstance(event, PointOfNoReturn) for event in events)
        with pytest.raises(Impossible):
            settle(state.fs.clone(), "rollback")
        judge.settles(state.fs, "resume")
    assert cut


def test_hazard_22_rollback_on_a_full_disk() -> None:
    which = scenario("commit into raw")
    judge = Judge(which)
    fs = killed_when(which, applied("data", 2, "/base.raw"))
    fs.set_capacity(fs.used())
    settle(fs, "rollback", "/base.raw")
    before = judge.before["/base.raw"]
    assert before is not None and digest_of(guest.content(fs, "/base.raw", "raw")) == before.content


@pytest.mark.parametrize("known", [True, False], ids=["by its looks", "by its content alone"])
def test_hazard_23_space_was_allocated_and_freed_since(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation has freed clusters; somebody else has used them since, and freed them too: all metadata is as the
    operation left it. Undo refuses; where the file's times hide it, what it links to again is what was there."""
    which = scenario("snapshot -a first")
    before = Look.at(which.prepare(), "/disk.qcow2", "qcow2")
    fs, history = which.prepare(), MemoryHistory()
    done(which, fs, history)
    record = kept.load(fs, kept.entries(fs, KEEPING)[0].paths[-1])
    state = record.state
    freed = [each for records in state.given_up.values() for each in records if each.undo is not None]
    written = [each for step in state.steps for each in step.prepared.fresh]
    assert freed and written
    file = fs.open("/disk.qcow2", write=True)
    for each in freed:
        file.pwrite(each.offset, b"g" * each.length)
    file.close()
    if known:
        left = fs.read_file("/disk.qcow2")
        with pytest.raises(Conflict, match="was changed since the snapshot"):
            straight.run(undo, "/disk.qcow2", undoing(environment(fs), history))
        assert fs.read_file("/disk.qcow2") == left
        return
    monkeypatch.setattr("safeimg.recovery.undo.untouched", lambda recorded, now: True)
    other, other_history = fs.clone(), deepcopy(history)
    straight.run(undo, "/disk.qcow2", undoing(environment(fs), history))
    assert Look.at(fs, "/disk.qcow2", "qcow2") == before
    file = other.open("/disk.qcow2", write=True)
    file.pwrite(written[0].offset, b"g")
    file.close()
    left = other.read_file("/disk.qcow2")
    with pytest.raises(Conflict, match=r"somebody else changed data at offset .* since the snapshot"):
        straight.run(undo, "/disk.qcow2", undoing(environment(other), other_history))
    assert other.read_file("/disk.qcow2") == left



def test_steps_are_several() -> None:
    """What the tests above rely on: with these step sizes a commit takes more than one data step."""
    fs = scenario("commit").prepare()

    async def main() -> None:
        await commit(environment(fs), "/top.qcow2", step_bytes=STEP_BYTES)

    fs.begin_trace()
    straight.run(main)
    assert len(fs.trace) > 50


def test_a_file_that_was_cut_stays_so_when_the_cut_is_taken_back() -> None:
    """Killed between the cut and its record, and again while it was being resumed: what lay behind is not missed."""
    judge = Judge(scenario("commit into raw"))
    entries = range(len(judge.trace_of.trace) + 1)
    states = [
        state
        for state in crash_states(judge.initial, judge.trace_of.trace, seed=1, prefixes=[*entries[-40:]],
                                  subsets_per_prefix=0, singles_per_prefix=0)
        if _is_cut(state.fs)
    ]
    assert states
    judge.crash_again(states[0], seed=1, count=12)
    assert judge.counter.second >= 12


def _is_cut(fs: SimulatedFileSystem) -> bool:
    """Whether the overlay's file is cut, and the log does not say so."""
    found = find.find(fs, "/base.raw")
    if not isinstance(found, find.LogFound) or not found.started:
        return False
    state = fold(read_events(fs, found.path))
    return 1 in state.cut and not state.steps[-1].applied and len(fs.read_file("/top.qcow2")) == state.cut[1]
