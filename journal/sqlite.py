"""The history in a SQLite database: `history.db` in the state directory.

Rollback journal, not WAL, whose shared memory does not work on network file systems; `synchronous=EXTRA`, so
that a committed transaction survives a power cut in that mode too (the log is removed right after it).
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safeimg.journal import chain
from safeimg.journal.chain import EventRow, OperationRow
from safeimg.journal.errors import HistoryError
from safeimg.journal.events import Event, Identity
from safeimg.journal.history import ImageRow, PendingRow, match, prepare, printable, select, settle
from safeimg.journal.place import absolute, make_state_directory, state_directory
from safeimg.journal.schema import SCHEMA, create_tables

NAME = "history.db"
BESIDE = ".safeimg-history"  # of the image's path: the history of this image alone (`beside.py`)
_EVENTS = "select position, operation, sequence, kind, body, previous, hash from events"
_PLAIN = frozenset(b"/-._~" + bytes(range(48, 58)) + bytes(range(65, 91)) + bytes(range(97, 123)))  # in a URI
TIMEOUT = 20.0  # seconds to wait for another process's transaction


class SqliteHistory:
    """Opens the database for each call; any number of processes may use it. Errors are `HistoryError`."""

    def __init__(self, path: str | None = None) -> None:
        """`path`: of the database; by default in the state directory, made when something is first
        recorded."""
        self._path = path
        self._sole = path is not None and path.endswith(BESIDE)  # about one image, whatever that has become

    def at(self, path: str) -> SqliteHistory:
        found = None if self._sole else beside_image(path)
        return self if found is None else SqliteHistory(found)

    def add_pending(self, entry: PendingRow) -> None:
        """Durable when it returns."""
        values = entry._asdict() | {"log": printable(entry.log), "home": printable(entry.home)}
        with self.writing() as connection:
            connection.execute(
                "insert or replace into pending (operation, command, log, home, machine, started) "
                "values (:operation, :command, :log, :home, :machine, :started)",
                values,
            )

    def remove_pending(self, operation: str) -> None:
        with self.writing() as connection:
            connection.execute("delete from pending where operation = ?", (operation,))

    def pending(self) -> list[PendingRow]:
        rows = self._query(
            "select operation, command, log, home, machine, started from pending order by started"
        )
        return [
            PendingRow(
                _text(row[0]), _text(row[1]), _text(row[2]), _text(row[3]), _text(row[4]), _float(row[5])
            )
            for row in rows
        ]

    def record_settled(self, events: Iterable[Event], *, home: str) -> None:
        """See `History.record_settled`."""
        settled = prepare(events, home)
        places: dict[str | None, set[int]] = {}  # that of the home image comes first
        for index, image in enumerate(settled.declared.images):
            path = home if index == 0 else os.path.join(os.path.dirname(home), image.path)
            places.setdefault(self.at(path)._path, set()).add(index)
        head = b""
        for place, images in places.items():
            store = SqliteHistory(place)
            with store.writing() as connection:
                head = settle(Tables(connection, store._sole), settled, images, head)
        if self._path not in places:
            self.remove_pending(settled.summary.operation)

    def log(self, image: Identity) -> list[OperationRow]:
        rows = self._query(
            "select o.operation, o.command, o.arguments, o.version, o.outcome, o.started, o.settled, o.uid, "
            "o.host, o.home, p.role from parts p join operations o on o.operation = p.operation "
            "where p.image = ? order by p.rowid",
            image,
        )
        return [
            OperationRow(
                _text(row[0]),
                _text(row[1]),
                _texts(row[2]),
                _text(row[3]),
                _text(row[4]),
                _float(row[5]),
                _float(row[6]),
                _int(row[7]),
                _text(row[8]),
                _text(row[9]),
                _text(row[10]),
            )
            for row in rows
        ]

    def show(self, image: Identity, operation: str) -> list[EventRow]:
        return select(self.chain(image), operation)

    def chain(self, image: Identity, kinds: Sequence[str] = ()) -> list[EventRow]:
        statement = f"{_EVENTS} where image = ? {_among(kinds)} order by position"
        return [_event(row) for row in self._query(statement, image, *kinds)]

    def newest(self, image: Identity, kinds: Sequence[str]) -> EventRow | None:
        statement = f"{_EVENTS} where image = ? {_among(kinds)} order by position desc limit 1"
        return next(map(_event, self._query(statement, image, *kinds)), None)

    def _query(self, statement: str, image: Identity | None = None, *more: str) -> list[tuple[Any, ...]]:
        """Rows; none if there is no database yet, or it does not know `image` (whose number is the first
        parameter, before `more`)."""
        path = self._path or _default_path()
        if path is None or not _is_there(path):
            return []
        with _reported(path):
            connection = _connect(path, "rw")
            try:
                if _version(connection, path) == 0:
                    return []
                parameters: tuple[int | str, ...] = more
                if image is not None:
                    row = match(Tables(connection, self._sole).images(image), image)
                    if row is None:
                        return []
                    parameters = (row.number, *more)
                return connection.execute(statement, parameters).fetchall()
            finally:
                connection.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, durable when the block ends without an error."""
        path = self._path or os.path.join(make_state_directory(), NAME)
        with _reported(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            connection = _connect(path, "rw")
            try:
                connection.execute("PRAGMA synchronous=EXTRA")
                connection.execute("BEGIN IMMEDIATE")
                if _version(connection, path) == 0:
                    create_tables(connection)
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()  # rolls back what was not committed


class Tables:
    """The tables as `history.settle` writes them: every operation ends here, and does not wait for sqlite_utils (which
    takes a seventh of a second to import) to put a few rows into tables that are there."""

    def __init__(self, connection: sqlite3.Connection, sole: bool = False) -> None:
        """`sole`: they are about one image alone."""
        self._connection = connection
        self._sole = sole

    def knows(self, operation: str) -> bool:
        found = self._connection.execute("select 1 from operations where operation = ?", (operation,))
        return found.fetchone() is not None

    def images(self, identity: Identity) -> list[ImageRow]:
        if not self._sole:
            which = "where inode = ? or tag = ? order by number"
            return _images(self._connection, which, (str(identity.inode), identity.tag))
        return [
            row._replace(tag=identity.tag, device=str(identity.device), inode=str(identity.inode))
            for row in _images(self._connection, "limit 1")
        ]

    def put_image(self, image: ImageRow) -> int:
        values = image._asdict()
        if image.number:
            self._connection.execute(
                "update images set tag = :tag, device = :device, inode = :inode, path = :path where number = :number",
                values,
            )
            return image.number
        del values["number"]
        number = self._insert("images", values)
        assert number is not None
        return number

    def head(self, image: int) -> tuple[int, bytes]:
        row = self._connection.execute(
            "select position, hash from events where image = ? order by position desc limit 1", (image,)
        ).fetchone()
        return (0, chain.GENESIS) if row is None else (_int(row[0]), _bytes(row[1]))

    def put_operation(self, row: OperationRow) -> None:
        values = row._asdict()
        del values["role"]
        values["arguments"] = json.dumps(row.arguments)
        values["home"] = printable(row.home)
        self._insert("operations", values)

    def put_part(self, operation: str, image: int, role: str, path: str, identity: Identity) -> None:
        self._insert(
            "parts",
            {
                "operation": operation,
                "image": image,
                "role": role,
                "path": path,
                "device": str(identity.device),
                "inode": str(identity.inode),
                "size": identity.size,
                "mtime_ns": identity.mtime_ns,
                "tag": identity.tag,
            },
        )

    def put_events(self, image: int, rows: Sequence[EventRow]) -> None:
        for row in rows:
            self._insert("events", {"image": image} | row._asdict())

    def last_hash(self, operation: str) -> bytes:
        row = self._connection.execute(
            "select hash from events where operation = ? and kind != ? order by position desc limit 1",
            (operation, chain.PARTICIPATED),
        ).fetchone()
        return b"" if row is None else _bytes(row[0])

    def _insert(self, table: str, values: Mapping[str, object]) -> int | None:
        """Adds a row; its number."""
        names = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        return self._connection.execute(f"insert into {table} ({names}) values ({places})", values).lastrowid

    def drop_pending(self, operation: str) -> None:
        self._connection.execute("delete from pending where operation = ?", (operation,))


def _among(kinds: Sequence[str]) -> str:
    """The condition that an event is of one of these kinds; none for none."""
    return f"and kind in ({', '.join('?' * len(kinds))})" if kinds else ""


def beside_image(path: str) -> str | None:
    """The path of the history beside the image at `path`; None if there is none. Raises `HistoryError` for one that is
    not to be trusted: an image may arrive with a hostile file next to it."""
    history = os.path.realpath(path) + BESIDE
    try:
        found = os.lstat(history)
    except OSError:
        return None
    try:
        owner = os.stat(path).st_uid
    except OSError:
        owner = 0
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0, owner):
        raise HistoryError(f"{history}: neither yours, root's nor the image owner's file, so it is not trusted")
    return history


def _default_path() -> str | None:
    directory = state_directory()
    return None if directory is None else os.path.join(directory, NAME)


def _is_there(path: str) -> bool:
    """False only if it cannot be there; a folder that may not be looked into is an error."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    return True


def _connect(path: str, mode: str) -> sqlite3.Connection:
    name = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in os.fsencode(absolute(path)))
    uri = f"file:{name}?mode={mode}"
    connection = sqlite3.connect(
        uri, uri=True, timeout=TIMEOUT, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")
    connection.execute("PRAGMA trusted_schema=OFF")
    return connection


def _version(connection: sqlite3.Connection, path: str) -> int:
    version = _int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA:
        raise HistoryError(f"{path}: a history of version {version}; this safeimg knows version {SCHEMA}")
    return version


def _images(
    connection: sqlite3.Connection, which: str, parameters: tuple[str | None, ...] = ()
) -> list[ImageRow]:
    rows = connection.execute(f"select number, tag, device, inode, path from images {which}", parameters)
    return [
        ImageRow(_int(row[0]), None if row[1] is None else _text(row[1]), *map(_text, row[2:]))
        for row in rows
    ]


@contextmanager
def _reported(path: str) -> Iterator[None]:
    """Turns SQLite's errors into one line."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise HistoryError(f"{path}: another process holds the history; try again") from None
        raise _unusable(path, _line(error)) from None
    except sqlite3.Error as error:
        raise HistoryError(
            f"{path}: the history is damaged: {_line(error)}; move it away and safeimg begins a new one"
        ) from None
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from None


def _unusable(path: str, problem: str) -> HistoryError:
    return HistoryError(
        f"{path}: the history cannot be used: {problem} (SAFEIMG_STATE_DIR names another folder for it)"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _event(row: tuple[Any, ...]) -> EventRow:
    return EventRow(
        _int(row[0]), _text(row[1]), _int(row[2]), _text(row[3]), _text(row[4]), _bytes(row[5]), _bytes(row[6])
    )


# What a tampered database holds in a column is made harmless; audit finds that its hash does not fit.


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    try:
        items = json.loads(_text(value))
    except (ValueError, RecursionError):
        return ()
    return tuple(map(str, items)) if isinstance(items, list) else ()


def _int(value: object) -> int:
    return value if isinstance(value, int) else -1


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""
