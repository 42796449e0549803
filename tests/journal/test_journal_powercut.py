"""The journal's files under simulated power cuts: what was promised durable is there, and nothing is made
up."""

from __future__ import annotations

from pathlib import Path

import pytest
from journal_fakes import DECLARED, EVERY_EVENT, OPERATION, OWNER, STARTED, STEP
from safeimg.drivers.errors import StorageError
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.storage.powercut import crash_states, power_cut
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.journal.errors import LogBusy, LogVoid
from safeimg.journal.events import Completed, Event, ImageRecord, StepApplied
from safeimg.journal.files import remove_durably
from safeimg.journal.find import LogFound, PointerFound, VoidFound, clear_void, find, resolve_pointer
from safeimg.journal.identity import identify
from safeimg.journal.log import Log, read_events
from safeimg.journal.pointer import Pointer, write_pointer
from safeimg.journal.undo import UndoFile

BASE, TOP = "/images/base.qcow2", "/images/top.qcow2"
LOG = BASE + ".safeimg"


@pytest.fixture(autouse=True)
def no_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", "/nowhere/safeimg")


@pytest.fixture
def files() -> SimulatedFileSystem:
    files = SimulatedFileSystem()
    files.make_directory("/images")
    for path in (BASE, TOP):
        file = files.create(path)
        file.pwrite(0, b"image")
        file.sync_all()
        file.close()
    files.sync_directory("/images")
    files.sync_directory("/")
    return files


def new_log(files: SimulatedFileSystem) -> Log:
    like = files.stat(BASE)
    assert like is not None
    return Log.create(files, LOG, OPERATION, like, chunk=8192)


def test_events_are_a_prefix_and_durable_ones_are_there(files: SimulatedFileSystem) -> None:
    initial = files.begin_trace()
    log = new_log(files)
    for number, event in enumerate(EVERY_EVENT, start=1):
        log.append(event)
        if number in (1, 2, 5, 6, 9):
            log.sync()
            files.mark(f"durable {number}")
    judged = 0
    for state in crash_states(initial, files.trace, seed=1, subsets_per_prefix=12):
        durable = max((int(label.split()[1]) for label in state.marks), default=0)
        try:
            events = read_events(state.fs, LOG)
        except (LogVoid, StorageError) as error:
            void = isinstance(error, LogVoid) or state.fs.stat(LOG) is None
            assert durable == 0 and void, f"{state.description}: {error}"
            continue
        judged += 1
        assert tuple(events) == EVERY_EVENT[: len(events)], state.description
        assert len(events) >= durable, state.description
        # Recovery opens it for writing, appends, and loses the power again.
        again = Log.open(state.fs, LOG, write=True)
        assert again.events == tuple(events)
        mark = STEP._replace(number=99)
        again.append(mark)
        again.sync()
        again.close()
        assert read_events(power_cut(state.fs), LOG) == [*events, mark], state.description
    assert judged > 100


def test_repeated_crashes_of_recovery(files: SimulatedFileSystem) -> None:
    """A torn tail, recovered from with other events, cut off again: never the old events behind the new."""
    log = new_log(files)
    for event in (DECLARED, STARTED):
        log.append(event)
    log.sync()
    initial = files.begin_trace()
    for number in range(1, 6):
        log.append(STEP._replace(number=number))
    first = list(crash_states(initial, files.trace, seed=2, subsets_per_prefix=4))
    seen = 0
    for state in first[:: max(1, len(first) // 12)]:
        kept = read_events(state.fs, LOG)
        start = state.fs.begin_trace()
        again = Log.open(state.fs, LOG, write=True)
        others: list[Event] = [StepApplied(number) for number in range(50, 56)]
        for event in others:
            again.append(event)
        for second in crash_states(
            start, state.fs.trace, seed=3, prefixes=8, subsets_per_prefix=2, singles_per_prefix=3
        ):
            found = read_events(second.fs, LOG)
            expected = [*kept, *others]
            assert found == expected[: len(found)] and len(found) >= 2, (
                f"{state.description} {second.description}"
            )
            seen += 1
    assert seen > 50


def declared(files: SimulatedFileSystem) -> Event:
    def image(role: str, path: str, writes: bool) -> ImageRecord:
        file = files.open(path)
        record = ImageRecord(role, path.rpartition("/")[2], "qcow2", identify(file, tag=True), writes)
        file.close()
        return record

    return DECLARED._replace(images=(image("base", BASE, True), image("overlay", TOP, False)))


def test_pointers_are_void_or_pending_as_their_home_is(files: SimulatedFileSystem) -> None:
    """Declared → pointer → Started … Completed → pointer removed → home's log removed, cut anywhere."""
    initial = files.begin_trace()
    log = new_log(files)
    first = declared(files)
    log.append(first)
    log.sync()
    files.mark("declared")
    images = first.images  # type: ignore[union-attr]
    pointer = Pointer(OPERATION, images[0].identity, "base.qcow2", images[1].identity, "machine")
    like = files.stat(TOP)
    assert like is not None
    write_pointer(files, TOP + ".safeimg", pointer, like)
    log.append(STARTED)
    files.mark("starting")
    log.sync()
    files.mark("started")
    log.append(Completed((), 1.0))
    files.mark("completing")
    log.sync()
    files.mark("completed")
    remove_durably(files, TOP + ".safeimg")
    files.mark("pointer removed")
    log.remove()
    files.mark("removed")
    kinds = set()
    for state in crash_states(initial, files.trace, seed=4, subsets_per_prefix=10):
        said = set(state.marks)
        home = find(state.fs, BASE)
        participant = find(state.fs, TOP)
        assert not isinstance(participant, LogFound)
        kind = None
        if isinstance(participant, PointerFound):
            kind = resolve_pointer(state.fs, participant, alive=lambda owner: "dead").kind
        kinds.add(kind)
        if "started" in said and "completing" not in said:
            assert kind == "pending" and isinstance(home, LogFound) and home.started, state.description
        if "starting" not in said:
            assert kind in (None, "unstarted"), state.description
        if "completed" in said:
            assert kind in (None, "decided", "settled"), state.description
        if "pointer removed" in said:
            assert participant is None, state.description
        if "removed" in said:
            assert home is None, state.description
        for found in (home, participant):
            if isinstance(found, VoidFound):
                clear_void(state.fs, found)
                assert state.fs.stat(found.path) is None
    assert {None, "unstarted", "pending", "decided"} <= kinds


def test_an_owner_that_lives_is_about_to_start(files: SimulatedFileSystem) -> None:
    log = new_log(files)
    first = declared(files)
    log.append(first)
    log.sync()
    images = first.images  # type: ignore[union-attr]
    like = files.stat(TOP)
    assert like is not None
    write_pointer(
        files,
        TOP + ".safeimg",
        Pointer(OPERATION, images[0].identity, "base.qcow2", images[1].identity, "machine"),
        like,
    )
    found = find(files, TOP)
    assert isinstance(found, PointerFound)
    for answer, kind in (("alive", "pending"), ("unknown", "pending"), ("dead", "unstarted")):
        assert resolve_pointer(files, found, alive=lambda owner, answer=answer: answer).kind == kind  # type: ignore[misc]


def test_undo_data_that_was_synced_is_there(files: SimulatedFileSystem) -> None:
    initial = files.begin_trace()
    like = files.stat(BASE)
    assert like is not None
    undo = UndoFile.create(files, LOG + "-undo", OPERATION, like)
    files.mark("created")
    undo.reserve(20000)
    kept = [(*undo.append(bytes([number]) * (3000 * number)), 3000 * number) for number in (1, 2, 3)]
    undo.sync()
    files.mark("synced")
    undo.append(b"more" * 3000)
    for state in crash_states(initial, files.trace, seed=5, subsets_per_prefix=6):
        if "created" in state.marks:  # `Started` says that there is one
            UndoFile.open(state.fs, LOG + "-undo", OPERATION).close()
        if "synced" in state.marks:
            again = UndoFile.open(state.fs, LOG + "-undo", OPERATION)
            for number, (offset, digest, length) in enumerate(kept, start=1):
                assert again.read(offset, length, digest) == bytes([number]) * length, state.description
        else:
            # Whatever a crash left of it does not keep the next operation from beginning.
            UndoFile.create(state.fs, LOG + "-undo", "f" * 32, like).close()


def test_hazard_22_reserve_on_a_full_simulated_disk(files: SimulatedFileSystem) -> None:
    log = new_log(files)
    log.append(DECLARED)
    log.append(STARTED)
    log.sync()
    files.set_capacity(0)
    with pytest.raises(Exception, match="No space left"):
        for number in range(1, 10000):
            log.append(STEP._replace(number=number))
    for number in range(500):
        log.append(StepApplied(number))
    log.sync()


# -- the real file system


def test_on_the_real_file_system(tmp_path: Path) -> None:
    files = LocalFileSystem()
    image = tmp_path / "a.img"
    image.write_bytes(b"image")
    like = files.stat(str(image))
    assert like is not None
    path = str(image) + ".safeimg"
    log = Log.create(files, path, OPERATION, like)
    log.append(DECLARED)
    log.sync()
    with pytest.raises(LogBusy):
        Log.open(files, path, write=True)
    assert read_events(files, path) == [DECLARED]
    assert (tmp_path / "a.img.safeimg").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a.img.safeimg").stat().st_blocks * 512 >= 1 << 20
    found = find(files, str(image))
    assert isinstance(found, LogFound) and found.owner == OWNER and not found.started
    log.remove()
    log.close()
    assert find(files, str(image)) is None
