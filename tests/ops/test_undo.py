"""undo takes completed operations back, to the byte where anything is referred to, or says why not."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import trio
from powercut import guest
from powercut.catalogue import OPERATIONS
from powercut.judge import Look, Scenario, environment, sidecars
from powercut.scenarios import data
from powercut.undos import FOLDER, KEEPING, undoing
from safeimg.drivers.secrets import NO_SECRETS
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.journal import kept
from safeimg.journal.errors import LogDamaged
from safeimg.journal.history import History, MemoryHistory
from safeimg.journal.identity import identify, identify_at
from safeimg.journal.kept import Keeping
from safeimg.journal.story import changed_before, changed_since, undone
from safeimg.ops.errors import Conflict, Impossible, SomethingPending
from safeimg.ops.launch import Environment
from safeimg.ops.snapshot import create
from safeimg.recovery.gc import collect
from safeimg.recovery.settle import resume, rollback
from safeimg.recovery.undo import undo

# The undo of each operation that there is is judged by `powercut.soak`.
NAMES = (
    "commit -d", "commit", "commit, growing base", "commit into vdi", "convert -n --undo to qcow2", "rebase -u",
    "rebase, with bitmaps", "amend -o several", "amend -o size", "snapshot -c third", "snapshot -d first",
    "bitmap --add --disable", "check -r all, rebuilt", "check -r all, marked as corrupt",
    "resize --preallocation=metadata", "resize --shrink, raw",
)  # fmt: skip


def named(name: str) -> Scenario:
    return next(each for each in OPERATIONS if each.name == name)


def taken_back(
    fs: SimulatedFileSystem, path: str, history: History, operation: str = "", keeping: Keeping = KEEPING
) -> str:
    async def main() -> str:
        return await undo(path, undoing(environment(fs), history, keeping), operation)

    return trio.run(main)


def done(scenario: Scenario, fs: SimulatedFileSystem, history: History, keeping: Keeping = KEEPING) -> None:
    """Runs the scenario's operation, with an id of its own."""
    if FOLDER[1:] not in fs.list_directory("/"):
        fs.make_directory(FOLDER)
    trio.run(scenario.run, undoing(environment(fs), history, keeping))


def looks(scenario: Scenario, fs: SimulatedFileSystem) -> dict[str, Look]:
    return {path: Look.at(fs, path, fmt, broken=scenario.broken) for path, fmt in scenario.images}


def content(fs: SimulatedFileSystem) -> dict[str, bytes]:
    return {name: fs.read_file("/" + name) for name in fs.list_directory("/") if "." in name}


def ready(name: str, keeping: Keeping = KEEPING) -> tuple[Scenario, SimulatedFileSystem, History]:
    """The operation is done, and can be undone."""
    scenario = named(name)
    fs, history = scenario.prepare(), MemoryHistory()
    done(scenario, fs, history, keeping)
    return scenario, fs, history


def refused(fs: SimulatedFileSystem, path: str, history: History, error: type[Exception], words: str) -> None:
    """In one line, and without any change."""
    before = content(fs)
    with pytest.raises(error, match=words) as caught:
        taken_back(fs, path, history)
    assert "\n" not in str(caught.value) and content(fs) == before and sidecars(fs) == []


@pytest.mark.parametrize("scenario", [named(name) for name in NAMES], ids=NAMES)
def test_everything_is_as_before(scenario: Scenario) -> None:
    """Content, size, snapshots, bitmaps, options, errors and the lengths of files."""
    fs, history = scenario.prepare(), MemoryHistory()
    before, files = looks(scenario, fs), content(fs)
    done(scenario, fs, history)
    assert content(fs) != files
    taken_back(fs, scenario.home, history)
    assert looks(scenario, fs) == before and sidecars(fs) == []
    assert {name: len(data) for name, data in content(fs).items()} == {name: len(data) for name, data in files.items()}
    assert fs.list_directory(FOLDER) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convert to qcow2", "made the image"),
        ("convert -n to qcow2", "without keeping what it overwrote"),
        ("amend luks, a password more", "key slots"),
        ("amend luks, a password less", "key slots"),
    ],
)
def test_what_is_impossible_is_said(name: str, words: str) -> None:
    scenario, fs, history = ready(name)
    refused(fs, scenario.home, history, Impossible, words)
    assert fs.list_directory(FOLDER) == []


def test_by_any_image_that_takes_part() -> None:
    scenario, fs, history = ready("commit -d")
    assert "commit" in taken_back(fs, "/top.qcow2", history)
    for path, _ in scenario.images:
        file = fs.open(path)
        assert len(undone(history.chain(identify(file)))) == 1
        file.close()
    refused(fs, "/top.qcow2", history, Impossible, "no completed operation")


def test_one_after_the_other_back_to_the_first() -> None:
    scenario, fs, history = ready("snapshot -c third")
    states = [content(fs)]
    for name in ("fourth", "fifth"):

        async def more(env: Environment, name: str = name) -> None:
            await create(env, "/disk.qcow2", name, 1_800_000_000_000_000_000)

        done(replace(scenario, run=more), fs, history)
        states.append(content(fs))
    with pytest.raises(Conflict, match="later: snapshot"):
        taken_back(fs, "/disk.qcow2", history, history.log(identify_at(fs, "/disk.qcow2"))[0].operation)
    for state in reversed(states[:-1]):
        taken_back(fs, "/disk.qcow2", history)
        assert guest.content(fs, "/disk.qcow2") == guest.content(_with(fs, state), "/disk.qcow2")
        assert len(content(fs)["disk.qcow2"]) == len(state["disk.qcow2"])
    taken_back(fs, "/disk.qcow2", history)
    refused(fs, "/disk.qcow2", history, Impossible, "no completed operation")


def _with(fs: SimulatedFileSystem, state: dict[str, bytes]) -> SimulatedFileSystem:
    other = fs.clone()
    for name, each in state.items():
        other.write_file("/" + name, each)
    return other


@pytest.mark.parametrize("path", ["/base.qcow2", "/top.qcow2"])
def test_not_once_a_guest_has_written(path: str) -> None:
    _, fs, history = ready("commit -d")
    guest.write(fs, path, [(50 * 4096, data(9, 4096))])
    refused(fs, "/base.qcow2", history, Conflict, "was changed since the commit")
    assert changed_since(history, identify_at(fs, path)) is not None


def test_not_while_something_is_pending() -> None:
    scenario, fs, history = ready("snapshot -c third")
    fs.kill_at(12)
    with pytest.raises(BaseException):  # noqa: B017  # the kill, alone or in a group
        done(replace(scenario, run=named("snapshot -d first").run), fs, history)
    left = fs.clone()
    with pytest.raises(SomethingPending):
        taken_back(left, "/disk.qcow2", history)


def test_changes_by_others_are_on_record() -> None:
    """The operation that finds them notes them, for each image that it writes to; they are no error."""
    scenario, fs, history = ready("commit -d")
    guest.write(fs, "/top.qcow2", [(50 * 4096, data(9, 4096))])
    done(scenario, fs, history)
    for path, changed in (("/base.qcow2", 0), ("/top.qcow2", 1)):
        assert len(changed_before(history.chain(identify_at(fs, path)))) == changed
        assert changed_since(history, identify_at(fs, path)) is None


@pytest.mark.parametrize("each", [0, 8192, 200_000])
def test_limits(each: int) -> None:
    """What is too much is not kept, and the operation is done all the same."""
    _, fs, history = ready("commit -d", KEEPING._replace(each=each))
    words = "nothing of the commit was to be kept" if not each else "too much to keep"
    if each == 200_000:
        taken_back(fs, "/base.qcow2", history)
    else:
        refused(fs, "/base.qcow2", history, Impossible, words)
    assert fs.list_directory(FOLDER) == []


def test_a_full_state_directory_is_no_failure() -> None:
    scenario = named("commit -d")
    fs, history = scenario.prepare(), MemoryHistory()
    fs.make_directory(FOLDER)
    fs.set_capacity(4096, FOLDER)
    done(scenario, fs, history)
    assert fs.list_directory(FOLDER) == [] and sidecars(fs) == []
    refused(fs, "/base.qcow2", history, Impossible, "was dropped")


def test_the_oldest_go_first() -> None:
    scenario, fs, history = ready("snapshot -c third")
    size = kept.entries(fs, KEEPING)[0].size
    keeping = KEEPING._replace(total=int(size * 2.5))
    for name in ("fourth", "fifth"):

        async def more(env: Environment, name: str = name) -> None:
            await create(env, "/disk.qcow2", name, 1_800_000_000_000_000_000)

        done(replace(scenario, run=more), fs, history, keeping)
    rows = history.log(identify_at(fs, "/disk.qcow2"))
    assert sorted(each.operation for each in kept.entries(fs, KEEPING)) == sorted(row.operation for row in rows[1:])
    env = undoing(environment(fs), history)
    fs.create(f"{FOLDER}/{'a' * 32}.data").close()
    dry = collect(env, total=0, dry=True)
    assert len(dry.dropped) == 3 and len(fs.list_directory(FOLDER)) >= 3
    assert collect(env, total=0) == dry
    assert fs.list_directory(FOLDER) == []


def test_what_was_kept_is_checked() -> None:
    _, fs, history = ready("commit -d")
    path = next(f"{FOLDER}/{name}" for name in fs.list_directory(FOLDER) if name.endswith(".data"))
    file = fs.open(path, write=True)
    file.pwrite(4096, b"somebody else")
    file.close()
    refused(fs, "/base.qcow2", history, LogDamaged, "do not match their digest")


@pytest.mark.parametrize("dropped", [False, True])
def test_an_undo_that_was_interrupted(dropped: bool) -> None:
    """What it needs is not collected while it is pending; without it, it can still be rolled back."""
    scenario, fs, history = ready("commit")
    before = {path: Look.at(scenario.prepare(), path, fmt) for path, fmt in scenario.images}
    after = looks(scenario, fs)
    fs.kill_at(90)
    with pytest.raises(BaseException):  # noqa: B017  # the kill, alone or in a group
        taken_back(fs, "/base.qcow2", history)
    fs = fs.clone()
    env = undoing(environment(fs), history)
    assert collect(env, total=0).dropped == () and sidecars(fs)
    if dropped:
        for name in fs.list_directory(FOLDER):
            fs.unlink(f"{FOLDER}/{name}")
        with pytest.raises(Impossible, match="only be rolled back"):
            trio.run(resume, "/base.qcow2", env)
        trio.run(rollback, "/top.qcow2", env)
        assert looks(scenario, fs) == after
    else:
        other, other_env = fs.clone(), deepcopy(history)
        trio.run(rollback, "/top.qcow2", env)
        assert looks(scenario, fs) == after and len(kept.entries(fs, KEEPING)) == 1
        taken_back(fs, "/base.qcow2", history)  # once more
        trio.run(resume, "/base.qcow2", undoing(environment(other), other_env))
        assert looks(scenario, fs) == before == looks(scenario, other) and other.list_directory(FOLDER) == []


def test_no_secret_is_needed() -> None:
    """Content is put back as it was on disk."""
    scenario = next(each for each in OPERATIONS if each.name.startswith("commit") and "luks" in each.name)
    fs, history = scenario.prepare(), MemoryHistory()
    before = looks(scenario, fs)
    done(scenario, fs, history)
    trio.run(undo, scenario.home, undoing(environment(fs, NO_SECRETS), history))
    assert looks(scenario, fs) == before
