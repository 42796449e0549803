"""The history: settled operations, the pending index, and what an audit finds in a tampered one."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_fakes import DECLARED, OPERATION, OWNER, STARTED, STEP, identity
from safeimg.journal import audit
from safeimg.journal.chain import body_of
from safeimg.journal.errors import JournalError
from safeimg.journal.events import Completed, Declared, Event, ImageRecord, RolledBack, StepApplied
from safeimg.journal.history import History, MemoryHistory, PendingRow
from safeimg.journal.sqlite import SqliteHistory

HOME = identity(tag=OPERATION)
OVERLAY = DECLARED.images[1].identity


def operation(number: int, outcome: Event | None = None) -> list[Event]:
    declared = DECLARED._replace(operation=f"{number:032x}", time=float(number))
    return [declared, STARTED, STEP, StepApplied(1, (bytes(32),)), outcome or Completed((), 9.0 + number)]


@pytest.fixture(params=["memory", "sqlite"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> History:
    return MemoryHistory() if request.param == "memory" else SqliteHistory(str(tmp_path / "history.db"))


def test_settled_operations_are_listed_for_every_image(history: History) -> None:
    assert history.log(HOME) == [] and history.chain(HOME) == []
    history.record_settled(operation(1), home="/images/base.qcow2")
    history.record_settled(operation(2, RolledBack((), 5.0)), home="/images/base.qcow2")
    assert [(row.operation[-1], row.outcome, row.role) for row in history.log(HOME)] == [
        ("1", "completed", "base"),
        ("2", "rolled back", "base"),
    ]
    assert [(row.command, row.role, row.home) for row in history.log(OVERLAY)] == [
        ("commit", "overlay", "/images/base.qcow2")
    ] * 2
    rows = history.show(HOME, f"{2:032x}")
    assert [row.kind for row in rows] == ["Declared", "Started", "StepPrepared", "StepApplied", "RolledBack"]
    assert [row.position for row in rows] == [6, 7, 8, 9, 10]
    assert [row.kind for row in history.chain(OVERLAY)] == ["Participated"] * 2
    assert audit.verify(history, HOME) == [] and audit.verify(history, OVERLAY) == []


def test_recording_again_changes_nothing(history: History) -> None:
    history.record_settled(operation(1), home="/images/base.qcow2")
    before = history.chain(HOME)
    history.record_settled(operation(1), home="/images/base.qcow2")
    assert history.chain(HOME) == before and len(history.log(HOME)) == 1


def test_only_settled_operations(history: History) -> None:
    for events in ([], operation(1)[:-1], operation(1)[1:]):
        with pytest.raises(JournalError, match="settled"):
            history.record_settled(events, home="/images/base.qcow2")
    assert history.log(HOME) == []


def test_operations_may_be_named_by_their_beginning(history: History) -> None:
    first = DECLARED._replace(operation="ab" + "0" * 30)
    other = DECLARED._replace(operation="ac" + "0" * 30)
    for declared in (first, other):
        history.record_settled([declared, Completed((), 1.0)], home="/b")
    assert len(history.show(HOME, "AB")) == 2
    with pytest.raises(JournalError, match="2 operations"):
        history.show(HOME, "a")
    with pytest.raises(JournalError, match="no operation"):
        history.show(HOME, "f")


def test_an_image_is_known_by_its_tag_or_else_by_its_inode(history: History) -> None:
    declared = DECLARED._replace(images=(ImageRecord("base", "b", "raw", identity(inode=5), True),))
    history.record_settled([declared, Completed((), 1.0)], home="/b")
    assert len(history.log(identity(inode=5, tag="cd" * 16))) == 1  # tagged since
    assert history.log(identity(inode=5, device=8)) == []
    tagged = declared._replace(
        operation="1" * 32,
        images=(declared.images[0]._replace(identity=identity(inode=5, tag="cd" * 16)),),
    )
    history.record_settled([tagged, Completed((), 2.0)], home="/b")
    assert len(history.log(identity(inode=77, device=9, tag="cd" * 16))) == 2  # moved
    assert history.log(identity(inode=5, tag="ef" * 16)) == []  # the inode is another file's now


def test_pending_index(history: History) -> None:
    assert history.pending() == []
    entry = PendingRow(OPERATION, "commit", "/i/b.safeimg", "/i/b", "machine", 1.0)
    history.add_pending(entry)
    history.add_pending(entry)
    assert history.pending() == [entry]
    history.remove_pending("f" * 32)
    history.record_settled([DECLARED, Completed((), 1.0)], home="/i/b")
    assert history.pending() == []
    history.add_pending(entry)
    history.remove_pending(OPERATION)
    assert history.pending() == []


def test_no_bulk_and_canonical_json() -> None:
    body = body_of(STEP)
    assert len(body) < 2000 and json.loads(body)["number"] == 1
    assert json.dumps(json.loads(body), sort_keys=True, separators=(",", ":")) == body


def test_odd_file_names(history: History) -> None:
    declared = Declared(
        OPERATION,
        "commit",
        ("\udcff",),
        "1",
        OWNER,
        (ImageRecord("base", "b\udcff", "raw", HOME, True),),
        1.0,
    )
    history.add_pending(PendingRow(OPERATION, "commit", "/\udcff", "/\udcff", "m", 1.0))
    history.record_settled([declared, Completed((), 2.0)], home="/\udcff")
    history.log(HOME)[0].home.encode()
    assert audit.verify(history, HOME) == []


# -- SQLite


def _settle_many(path: str, first: int) -> None:
    history = SqliteHistory(path)
    for number in range(first, first + 5):
        history.add_pending(PendingRow(f"{number:032x}", "commit", "/l", "/h", "m", 1.0))
        history.record_settled(operation(number), home="/images/base.qcow2")


def test_processes_record_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "history.db")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_settle_many, args=(path, 10 * number)) for number in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    history = SqliteHistory(path)
    assert len(history.log(HOME)) == 15 and len(history.chain(HOME)) == 75
    assert audit.verify(history, HOME) == [] and history.pending() == []


def test_database_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state" / "safeimg"))
    SqliteHistory().record_settled(operation(1), home="/b")
    database = tmp_path / "state" / "safeimg" / "history.db"
    assert database.stat().st_mode & 0o777 == 0o600 and database.parent.stat().st_mode & 0o777 == 0o700


def test_an_error_while_recording_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = SqliteHistory(str(tmp_path / "history.db"))
    history.record_settled(operation(1), home="/b")

    def fail(*arguments: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("safeimg.journal.sqlite.Tables.put_events", fail)
    with pytest.raises(JournalError, match="disk I/O error"):
        history.record_settled(operation(2), home="/b")
    assert len(history.log(HOME)) == 1 and audit.verify(history, HOME) == []


@pytest.mark.parametrize("damage", ["noise", "text", "directory", "future", "pages"])
def test_a_bad_database_is_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "history.db"
    history = SqliteHistory(str(path))
    if damage == "noise":
        path.write_bytes(os.urandom(8192))
    elif damage == "text":
        path.write_text("this is not a database\n" * 100)
    elif damage == "directory":
        path.mkdir()
    else:
        history.record_settled(operation(1), home="/b")
        if damage == "future":
            sqlite3.connect(path).execute("PRAGMA user_version=99").connection.commit()
        else:
            data = path.read_bytes()
            path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    for attempt in (
        lambda: history.log(HOME),
        lambda: history.pending(),
        lambda: history.record_settled(operation(2), home="/b"),
    ):
        with pytest.raises(JournalError) as caught:
            attempt()
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# -- tampering

Tamper = Callable[[sqlite3.Connection], object]


def _swap(connection: sqlite3.Connection) -> None:
    for old, new in ((3, -1), (4, 3), (-1, 4)):
        connection.execute("update events set position = ? where position = ? and image = 1", (new, old))


def _recompute(connection: sqlite3.Connection) -> None:
    from safeimg.journal.chain import row_hash

    row = connection.execute(
        "select previous, operation, sequence, kind from events where image = 1 and position = 4"
    ).fetchone()
    connection.execute(
        "update events set body = '{}', hash = ? where image = 1 and position = 4", (row_hash(*row, "{}"),)
    )


def _remove_and_renumber(connection: sqlite3.Connection) -> None:
    connection.execute("delete from events where image = 1 and position = 4")
    for position in range(5, 11):
        connection.execute(
            "update events set position = ? where image = 1 and position = ?", (position - 1, position)
        )


def sql(statement: str) -> Tamper:
    return lambda connection: connection.execute(statement + " and image = 1")


@pytest.mark.parametrize(
    ("tamper", "kind", "position"),
    [
        (sql("update events set body = replace(body, 'cursor', 'kursor') where position = 3"), "edited", 3),
        (sql("update events set kind = 'Paused' where position = 2"), "edited", 2),
        (sql("update events set sequence = 7 where position = 2"), "edited", 2),
        (sql("update events set sequence = 'x' where position = 2"), "edited", 2),
        (sql("update events set operation = 'nonsense' where position = 2"), "edited", 2),
        (sql("update events set body = x'00ff', hash = 5 where position = 5"), "edited", 5),
        (sql("update events set previous = x'00' where position = 5"), "edited", 5),
        (sql("delete from events where position = 4"), "removed", 4),
        (sql("delete from events where position between 1 and 5"), "removed", 1),
        (sql("delete from events where position > 5"), "removed", 6),
        (sql("delete from events where position = 10"), "edited", 9),
        (_swap, "swapped", 3),
        (_recompute, "replaced", 5),
        (_remove_and_renumber, "replaced", 4),
        (
            lambda c: c.execute("update operations set outcome = 'abandoned' where operation like '%1'"),
            "edited",
            5,
        ),
        (lambda c: c.execute("delete from operations where operation like '%2'"), "removed", 10),
    ],
)
def test_audit_finds(tmp_path: Path, tamper: Tamper, kind: str, position: int) -> None:
    path = tmp_path / "history.db"
    history = SqliteHistory(str(path))
    history.record_settled(operation(1), home="/b")
    history.record_settled(operation(2), home="/b")
    with sqlite3.connect(path) as connection:
        tamper(connection)
    findings = audit.verify(history, HOME)
    assert (kind, position) in [(finding.kind, finding.position) for finding in findings], findings
    assert all("\n" not in finding.message for finding in findings)


@given(
    position=st.integers(1, 10), column=st.sampled_from(["operation", "kind", "body", "previous", "hash"]),
    place=st.integers(0, 1 << 16), bits=st.integers(1, 255),
)  # fmt: skip
def test_any_changed_byte_is_found(position: int, column: str, place: int, bits: int) -> None:
    history = MemoryHistory()
    for number in (1, 2):
        history.record_settled(operation(number), home="/b")
    rows = next(iter(history.events.values()))
    row = rows[position - 1]
    value = getattr(row, column)
    content = bytearray(value if isinstance(value, bytes) else value.encode())
    content[place % len(content)] ^= bits
    changed = bytes(content) if isinstance(value, bytes) else content.decode("utf-8", "backslashreplace")
    rows[position - 1] = row._replace(**{column: changed})
    assert position in [finding.position for finding in audit.verify(history, HOME)]


def test_an_anchor_tells_a_history_made_anew(history: History) -> None:
    history.record_settled(operation(1), home="/b")
    anchor = audit.head(history.chain(HOME))
    history.record_settled(operation(2), home="/b")
    assert audit.verify(history, HOME, anchor=anchor) == []
    anew = MemoryHistory()
    anew.record_settled(operation(2), home="/b")
    assert [finding.kind for finding in audit.verify(anew, HOME, anchor=anchor)] == ["anchor"]
    assert audit.head([]) is None
