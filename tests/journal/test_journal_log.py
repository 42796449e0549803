"""The log: what survives a kill, a power cut, a full disk and hostile bytes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from journal_fakes import DECLARED, EVERY_EVENT, OPERATION, OWNER, STARTED, STEP, MemoryFiles
from safeimg.journal import frames
from safeimg.journal.codec import BadEvent
from safeimg.journal.errors import (
    JournalError,
    JournalUnavailable,
    LogBusy,
    LogDamaged,
    LogForeign,
    LogVoid,
)
from safeimg.journal.events import Event, Paused, RecoveryStarted, StepApplied, TakenBack, TakingBack
from safeimg.journal.log import RESERVE, Log, read_events, remove_void

PATH = "/images/base.qcow2.safeimg"
SMALL = 1024  # the file's growth in these tests


@pytest.fixture
def files() -> MemoryFiles:
    files = MemoryFiles()
    files.put("/images/base.qcow2")
    return files


def new_log(files: MemoryFiles, *, chunk: int = SMALL) -> Log:
    like = files.stat("/images/base.qcow2")
    assert like is not None
    return Log.create(files, PATH, OPERATION, like, chunk=chunk)


def written(files: MemoryFiles, events: tuple[Event, ...], *, synced: int, chunk: int = SMALL) -> list[int]:
    """A log of `events`, synced after the first `synced`, its writer dead; where each frame ends."""
    log, ends = new_log(files, chunk=chunk), []
    for number, event in enumerate(events, start=1):
        log.append(event)
        ends.append(log._scan.end)
        if number == synced:
            log.sync()
    log.close()
    return ends


def test_every_event_comes_back(files: MemoryFiles) -> None:
    log = new_log(files)
    assert [log.append(event) for event in EVERY_EVENT] == list(range(1, len(EVERY_EVENT) + 1))
    assert log.events == EVERY_EVENT
    log.sync()
    head = log.head
    log.close()
    again = Log.open(files, PATH)
    assert (again.events, again.head) == (EVERY_EVENT, head)
    assert (again.sequence, again.operation) == (len(EVERY_EVENT), OPERATION)
    assert read_events(files, PATH) == list(EVERY_EVENT)


def test_created_durably_with_the_images_owner(files: MemoryFiles) -> None:
    files.nodes["/images/base.qcow2"].gid = 36
    files.syncs.clear()
    new_log(files)
    node = files.nodes[PATH]
    assert node.mode & 0o777 == 0o600 and node.gid == 36
    assert files.syncs == [PATH, "/images"]


def test_append_after_reopening_continues_the_chain(files: MemoryFiles) -> None:
    written(files, EVERY_EVENT[:3], synced=2)
    log = Log.open(files, PATH, write=True)
    assert log.durable == 3  # what it relies on is durable first (hazard 7)
    log.append(STEP)
    assert read_events(files, PATH) == list(EVERY_EVENT[:4])
    log.close()


# -- torn tails and damage
# -------------------------------------------------------------------------------------------


def outcome(files: MemoryFiles) -> str | int:
    """How many events a changed log still gives (always a prefix of the true ones), or what it is called."""
    try:
        events = read_events(files, PATH)
    except LogDamaged:
        return "damaged"
    except LogForeign:
        return "foreign"
    except LogVoid:
        return "void"
    assert tuple(events) == EVERY_EVENT[: len(events)], "a change went unnoticed"
    return len(events)


def test_every_byte_flipped(files: MemoryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events 1 to 4 are durable and 5 says so; 5 and 6 are not known to be."""
    monkeypatch.setattr("safeimg.journal.log._ATTEMPTS", 1)  # nobody is writing it meanwhile
    events = EVERY_EVENT[:6]
    ends = written(files, events, synced=4)
    data = files.nodes[PATH].data
    for at in range(ends[-1] + 64):
        flip = (0x01, 0x80, 0xFF)[at % 3]
        data[at] ^= flip
        found = outcome(files)
        if at < 16:
            assert found == "foreign", at
        elif at < ends[3]:
            assert found == "damaged", at
        elif at < ends[4]:
            # Without event 5 nobody says that 1 to 4 were durable; event 6 does not chain to anything: torn.
            assert found in (4, "damaged"), at
        elif at < ends[5]:
            assert found == 5, at
        else:
            assert found == 6, at
        data[at] ^= flip


def test_truncated_anywhere(files: MemoryFiles) -> None:
    ends = written(files, EVERY_EVENT[:6], synced=4)
    whole = bytes(files.nodes[PATH].data)
    for length in range(ends[-1]):
        files.nodes[PATH].data[:] = whole[:length]
        found = outcome(files)
        if 0 < length <= 8:
            assert found == "foreign", length
        elif length <= frames.HEADER:
            assert found == "void", length  # as after a power cut before the first event
        elif length < SMALL:
            assert found in ("damaged", "void"), length
        else:
            assert found == sum(end <= length for end in ends) or found == "damaged", length


def test_zeroed_sectors_of_unsynced_events_are_a_torn_tail(files: MemoryFiles) -> None:
    ends = written(files, EVERY_EVENT[:6], synced=3)
    data = files.nodes[PATH].data
    for start in range(0, ends[-1], 512):
        saved = bytes(data[start : start + 512])
        if start + 512 > ends[2]:
            first = max(start, ends[2])
            data[first : start + 512] = bytes(start + 512 - first)
            found = outcome(files)
            assert found == sum(end <= first for end in ends), start
            data[start : start + 512] = saved


def test_torn_tail_is_erased_before_anything_takes_its_place(files: MemoryFiles) -> None:
    ends = written(files, EVERY_EVENT[:6], synced=3)
    data = files.nodes[PATH].data
    data[ends[2] + 20] ^= 1  # event 4 is torn, 5 and 6 are intact behind it
    log = Log.open(files, PATH, write=True)
    assert not any(data[ends[2] :])
    log.append(Paused("x", 1.0))
    log.sync()
    log.close()
    assert read_events(files, PATH) == [*EVERY_EVENT[:3], Paused("x", 1.0)]


def test_reading_changes_nothing(files: MemoryFiles) -> None:
    ends = written(files, EVERY_EVENT[:6], synced=3)
    data = files.nodes[PATH].data
    data[ends[2] + 20] ^= 1
    before, syncs = bytes(data), len(files.syncs)
    assert outcome(files) == 3
    assert bytes(data) == before and len(files.syncs) == syncs


def test_the_damage_names_file_offset_and_remedy(files: MemoryFiles) -> None:
    ends = written(files, EVERY_EVENT[:6], synced=4)
    files.nodes[PATH].data[ends[1] + 9] ^= 1
    with pytest.raises(LogDamaged) as caught:
        read_events(files, PATH)
    message = str(caught.value)
    assert message.startswith(PATH) and f"{ends[1]:#x}" in message and "safeimg abandon" in message
    assert "\n" not in message


def test_frames_of_another_log_are_not_taken_for_ours(files: MemoryFiles) -> None:
    """A guest may have written frames into what a step records: they do not verify under this log's key."""
    ends = written(files, EVERY_EVENT[:4], synced=3)
    other = frames.pack_frame(bytes(32), 9, 8, bytes(32), b"x")
    data = files.nodes[PATH].data
    data[ends[2] :] = bytes(len(data) - ends[2])
    data[ends[2] + 40 : ends[2] + 40 + len(other)] = other
    assert outcome(files) == 3


def rewrite(files: MemoryFiles, number: int, **changes: object) -> None:
    """Replaces frame `number` of the log by one that verifies, with other fields."""
    file = files.open(PATH)
    key, offset, frame = frames.read_header(file).key, frames.HEADER, None
    for _ in range(number):
        frame = frames.read_frame(file, key, offset, file.length())
        assert frame is not None
        offset = frame.end
    assert frame is not None
    fields = {
        "sequence": frame.sequence,
        "durable": frame.durable,
        "previous": frame.previous,
        "payload": frame.payload,
    } | changes
    file.pwrite(frame.offset, frames.pack_frame(key, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence": 4},
        {"sequence": 2},
        {"durable": 3},
        {"durable": 2**64 - 1},
        {"previous": bytes(32)},
        {"payload": b"\xc1"},
        {"payload": b""},
        {"payload": b"\x92\xa6Forged\x80"},
    ],
)
def test_an_intact_frame_out_of_place_is_damage(files: MemoryFiles, changes: dict[str, object]) -> None:
    written(files, EVERY_EVENT[:3], synced=2)
    rewrite(files, 3, **changes)
    assert outcome(files) == "damaged"


def test_a_tail_full_of_magics_is_given_up_soon(files: MemoryFiles) -> None:
    """Planted magics that each claim megabytes may not make the reader hash for hours."""
    ends = written(files, EVERY_EVENT[:2], synced=2)
    data = files.nodes[PATH].data
    claim = frames.FRAME_MAGIC + (8 << 20).to_bytes(4, "little")
    data[ends[-1] :] = claim * (1 << 15) + bytes(9 << 20)
    assert outcome(files) == "damaged"


def test_a_huge_file_is_refused(files: MemoryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    written(files, EVERY_EVENT[:2], synced=2)
    monkeypatch.setattr(frames, "MAX_TAIL", 1 << 16)
    files.nodes[PATH].data.extend(bytes(1 << 20))
    assert outcome(files) == "damaged"


# -- an operation that never began
# -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"safeimg l", frames.LOG_MAGIC + b"\1\0", bytes(512), bytes(5000)])
def test_half_written_header_is_void(files: MemoryFiles, data: bytes) -> None:
    files.put(PATH, data)
    assert outcome(files) == "void"
    with pytest.raises(LogVoid):
        Log.open(files, PATH, write=True)
    remove_void(files, PATH)
    assert PATH not in files.nodes


def test_no_event_is_void_but_an_event_is_not(files: MemoryFiles) -> None:
    log = new_log(files)
    with pytest.raises(LogBusy):
        remove_void(files, PATH)  # somebody is just creating it
    log.append(DECLARED)
    log.close()
    remove_void(files, PATH)
    assert read_events(files, PATH) == [DECLARED]


@pytest.mark.parametrize("data", [b"hello", b"\x7fELF" * 400, b"safeimg pointer"])
def test_foreign_files_are_left_alone(files: MemoryFiles, data: bytes) -> None:
    files.put(PATH, data)
    assert outcome(files) == "foreign"
    with pytest.raises(LogForeign):
        remove_void(files, PATH)
    assert PATH in files.nodes


def test_format_of_the_future(files: MemoryFiles) -> None:
    header = bytearray(frames.pack_header(OPERATION, SMALL))
    header[16] = 2
    header[-32:] = frames.blake3(bytes(header[:-32])).digest()
    files.put(PATH, bytes(header))
    with pytest.raises(LogForeign, match="version 2"):
        read_events(files, PATH)


# -- who may be believed
# ---------------------------------------------------------------------------------------------


def test_hazard_13_a_strangers_log_is_refused(files: MemoryFiles) -> None:
    written(files, EVERY_EVENT[:2], synced=2)
    files.nodes[PATH].uid = os.geteuid() + 1234
    with pytest.raises(LogForeign, match=r"belongs to user"):
        Log.open(files, PATH, write=True)
    assert len(Log.open(files, PATH, image_owner=os.geteuid() + 1234).events) == 2


def test_hazard_13_links_and_special_files_are_refused(files: MemoryFiles) -> None:
    written(files, EVERY_EVENT[:2], synced=2)
    files.links["/images/other.safeimg"] = PATH
    with pytest.raises(LogForeign, match="symbolic link"):
        Log.open(files, "/images/other.safeimg")
    files.put("/images/fifo.safeimg", mode=0o010600)
    with pytest.raises(LogForeign, match="regular file"):
        Log.open(files, "/images/fifo.safeimg")


def test_one_writer(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    with pytest.raises(LogBusy):
        Log.open(files, PATH, write=True)
    assert read_events(files, PATH) == [DECLARED]
    log.close()
    Log.open(files, PATH, write=True).close()


def test_a_log_that_is_there_is_not_replaced(files: MemoryFiles) -> None:
    written(files, EVERY_EVENT[:2], synced=2)
    with pytest.raises(OSError, match="File exists"):
        new_log(files)
    assert len(read_events(files, PATH)) == 2


def test_a_server_that_takes_new_files_away_gets_no_log(files: MemoryFiles) -> None:
    files.give_to = lambda path, uid, gid: setattr(files.nodes[path], "uid", 65534)  # type: ignore[method-assign]
    with pytest.raises(JournalUnavailable):
        new_log(files)
    assert PATH not in files.nodes


# -- no space, no sync
# -----------------------------------------------------------------------------------------------


def test_hazard_22_a_full_disk_can_still_be_rolled_back(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    log.append(STARTED)
    files.room = 0
    steps = 0
    with pytest.raises(OSError) as caught:
        while True:
            log.append(STEP)
            steps += 1
    assert caught.value.errno == errno.ENOSPC
    at = log.sequence
    assert files.nodes[PATH].data[log._scan.end :] == bytes(len(files.nodes[PATH].data) - log._scan.end)
    assert len(files.nodes[PATH].data) - log._scan.end >= RESERVE
    log.append(Paused("no space left on device", 1.0))
    log.append(RecoveryStarted("rollback", OWNER, 2.0))
    for number in range(1000):
        log.append(TakingBack(number))
        log.append(TakenBack(number))
    log.sync()
    log.close()
    assert len(read_events(files, PATH)) == at + 2002


def test_the_reserve_grows_with_the_steps(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    for number in range(1200):
        log.append(StepApplied(number))
    before = len(files.nodes[PATH].data) - log._scan.end
    small = type(STEP)(1, "s")
    for _ in range(1200):
        log.append(small)
    files.room = 0
    for number in range(1200):
        log.append(TakingBack(number))
        log.append(TakenBack(number))
    assert before >= RESERVE


def test_writing_into_the_reserve_does_not_change_the_length(files: MemoryFiles) -> None:
    log = new_log(files, chunk=1 << 20)
    length = len(files.nodes[PATH].data)
    for event in EVERY_EVENT:
        log.append(event)
    assert len(files.nodes[PATH].data) == length == 1 << 20


def failing_write(
    files: MemoryFiles, log: Log, written_bytes: int, times: int
) -> Callable[[int, bytes], None]:
    real = log._file.pwrite
    left = times

    def pwrite(offset: int, data: bytes) -> None:
        nonlocal left
        if left:
            left -= 1
            real(offset, data[:written_bytes])
            raise OSError(errno.EIO, "Input/output error")
        real(offset, data)

    return pwrite


def test_a_failed_write_leaves_nothing_behind(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    log._file.pwrite = failing_write(files, log, 50, 1)  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError):
        log.append(STARTED)
    assert read_events(files, PATH) == [DECLARED]
    assert log.append(STARTED) == 2
    assert read_events(files, PATH) == [DECLARED, STARTED]


def test_a_write_that_cannot_be_undone_stops_the_log(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    log._file.pwrite = failing_write(files, log, 50, 2)  # type: ignore[method-assign,assignment]
    with pytest.raises(OSError):
        log.append(STARTED)
    with pytest.raises(JournalError, match="nothing can be recorded"):
        log.append(STARTED)


def test_hazard_8_nothing_is_recorded_after_a_failed_sync(files: MemoryFiles) -> None:
    log = new_log(files)
    log.append(DECLARED)
    files.fail_sync = True
    with pytest.raises(OSError):
        log.sync()
    files.fail_sync = False
    for attempt in (lambda: log.append(STARTED), log.sync):
        with pytest.raises(JournalError, match="nothing can be recorded"):
            attempt()
    assert log.durable == 0 and read_events(files, PATH) == [DECLARED]


def test_appends_are_checked(files: MemoryFiles) -> None:
    log = new_log(files)
    with pytest.raises(BadEvent, match="begins with one Declared"):
        log.append(STARTED)
    log.append(DECLARED)
    with pytest.raises(BadEvent):
        log.append(DECLARED)
    with pytest.raises(BadEvent, match="lengths"):
        log.append(type(STARTED)({}, (1,), True, (), 0, 0.0))
    reader = Log.open(files, PATH)
    with pytest.raises(JournalError, match="reading only"):
        reader.append(STARTED)
    assert log.sequence == 1


def test_remove_is_durable(files: MemoryFiles) -> None:
    log = new_log(files)
    files.syncs.clear()
    log.remove()
    log.close()
    assert PATH not in files.nodes and files.syncs == ["/images"]
