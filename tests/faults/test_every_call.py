"""Every call of a commit fails in turn, once or from then on: one clean line, nothing lost, both ways out open (G7).

Some of the calls here; all of them, for every scenario, in `python -m faults.soak`."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from faults.faulting import (
    acknowledged_or_pending,
    attempt,
    calls,
    count,
    crash,
    fail_on,
    fail_once,
    is_done,
    judge_of,
    killed,
    log_state,
    read_fails,
    recovery_fails,
    rollback_syncs_fail,
    run_on_full_disk,
    settle_on_full_disk,
    settles_everywhere,
    sync_fails,
)
from powercut.judge import sidecars
from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.storage.faults import READS
from safeimg.journal.errors import JournalUnavailable

NAMES = ("commit", "commit into raw")


@pytest.mark.parametrize(("name", "code"), [(NAMES[0], errno.ENOSPC), (NAMES[1], errno.EIO)])
def test_a_call_fails_once(name: str, code: int) -> None:
    judge = judge_of(name)
    for number in range(3, calls(judge) + 1, 13):
        fs, error = fail_once(judge, number, code)
        acknowledged_or_pending(judge, fs, error, seed=number)


@pytest.mark.parametrize(("name", "code"), [(NAMES[0], errno.EIO), (NAMES[1], errno.ENOSPC)])
def test_a_call_fails_and_every_later_one(name: str, code: int) -> None:
    judge = judge_of(name)
    for number in range(2, count(judge) + 1, 17):
        fs, error = fail_on(judge, number, code)
        assert isinstance(error, StorageError) and error.errno == code
        acknowledged_or_pending(judge, fs, error, seed=number)


def test_the_reason_is_on_record() -> None:
    """What stopped a commit is in its log, for `status` to tell."""
    judge = judge_of("commit")
    reasons = set()
    for number in range(20, calls(judge), 5):
        fs, error = fail_once(judge, number, errno.ENOSPC)
        state = log_state(fs, judge.scenario.home)
        if state is not None and state.steps and state.paused:
            assert state.paused == str(error)
            reasons.add(state.paused)
    assert any("No space left on device" in reason for reason in reasons)


def test_what_could_not_begin_is_out_of_the_way() -> None:
    """It leaves nothing behind, but what a failed sync forbids to remove; the identical command begins anew."""
    judge = judge_of("commit")
    seen = set()
    for number in range(1, 40):
        fs, error = fail_once(judge, number, errno.ENOSPC)
        state = log_state(fs, judge.scenario.home)
        if error is None or (state is not None and state.started is not None):
            continue
        seen.add(type(error))
        if not isinstance(error, SyncFailed):
            assert sidecars(fs) == [], f"call {number}: {error}"
        assert attempt(judge, fs, "again") is None and is_done(judge, fs)
    assert seen == {JournalUnavailable, StorageError, SyncFailed}


def test_the_identical_command_ends_what_was_killed_anywhere() -> None:
    """Also where the home image has a log and the overlay no pointer to it: at its beginning and at its end."""
    judge = judge_of("commit")
    for number in [*range(1, 30), *range(30, calls(judge) - 15, 7), *range(calls(judge) - 15, calls(judge) + 1)]:
        fs = killed(judge, number)
        assert attempt(judge, fs, "again") is None, number
        assert is_done(judge, fs), number


def test_hazard_08_nothing_is_written_after_a_failed_sync() -> None:
    judge = judge_of("commit")
    for number in range(1, count(judge, {"sync", "sync_all"}) + 1, 7):
        fs = sync_fails(judge, number)
        settles_everywhere(judge, fs, seed=number)


def test_hazard_08_data_that_a_failed_sync_lost_is_written_again() -> None:
    """The system takes it for clean: no later sync covers it, and the power goes while it is settled."""
    judge = judge_of("commit")
    for number in (14, 22):
        judge.crash_again(crash(sync_fails(judge, number), number), seed=number, count=3)


def test_hazard_08_what_a_failed_sync_of_a_rollback_lost_is_written_again() -> None:
    judge = judge_of("commit")
    tried = 0
    for fs in rollback_syncs_fail(judge):
        judge.lasts(judge.settles(fs, "rollback"), "before")
        tried += 1
    assert tried > 20


def test_hazard_08_a_length_that_a_failed_sync_lost_is_made_sure() -> None:
    """The sync behind a raw base's growth: nothing else is written there."""
    judge = judge_of("commit into raw")
    grown = next(n for n, entry in enumerate(judge.trace_of.trace.entries, 1) if entry.kind == "truncate")
    fs, error = fail_once(judge, grown + 1, errno.EIO)
    assert isinstance(error, SyncFailed)
    settles_everywhere(judge, fs, seed=grown)


def _is_base(path: str) -> bool:
    return path == "/base.qcow2"


def _is_top(path: str) -> bool:
    return path == "/top.qcow2"


def _is_sidecar(path: str) -> bool:
    return ".safeimg" in path


@pytest.mark.parametrize("paths", [_is_base, _is_top, _is_sidecar])
def test_a_read_fails(paths: Callable[[str], bool]) -> None:
    judge = judge_of("commit")
    total = count(judge, READS, paths)
    for number in range(1, total + 1, max(total // 5, 1)):
        read_fails(judge, number, paths)


@pytest.mark.parametrize("action", ["resume", "rollback"])
@pytest.mark.parametrize("paths", [_is_base, _is_top, _is_sidecar])
def test_a_read_fails_while_settling(action: str, paths: Callable[[str], bool]) -> None:
    judge = judge_of("commit")
    recovery_fails(judge, killed(judge, 70), action, READS, paths, stride=9)


@pytest.mark.parametrize("action", ["resume", "rollback"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_fails_while_settling(action: str, name: str) -> None:
    judge = judge_of(name)
    recovery_fails(judge, killed(judge, 60), action, stride=9)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(name: str) -> None:
    """Room for so many bytes and no more: the commit stops or ends, and takes itself back on the disk as full."""
    judge = judge_of(name)
    stopped = 0
    for room in range(0, 200_000, 8192):
        fs, error = run_on_full_disk(judge, room)
        stopped += error is not None
        acknowledged_or_pending(judge, fs, error, seed=room)
    assert stopped > 3


@pytest.mark.parametrize("name", NAMES)
def test_hazard_22_rollback_works_on_a_full_disk(name: str) -> None:
    judge = judge_of(name)
    pending = 0
    for number in range(1, calls(judge), 3):
        fs = killed(judge, number)
        pending += bool(sidecars(fs))
        settle_on_full_disk(judge, fs)
    assert pending > 10
