"""A history beside its image, instead of in the state directory: it goes where the image goes.

`IMAGE.safeimg-history` is a database like that of the state directory, about this image alone. While it is there it
counts (`History.at`), so that a crash while rows are moved loses none: they are taken away where they were only when
they are in the other place for certain.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safeimg.journal.events import Identity
from safeimg.journal.history import image_number, match
from safeimg.journal.sqlite import BESIDE, SqliteHistory, Tables, beside_image

NEW = "-new"


def enable(history: SqliteHistory, path: str, image: Identity) -> bool:
    """Moves what is on record of the image at `path` beside it. False if it was there already."""
    place = os.path.realpath(path) + BESIDE
    was_there = beside_image(path) is not None
    with history.writing() as old:
        known = match(Tables(old).images(image), image)
        if not was_there:
            with suppress(FileNotFoundError):
                os.unlink(place + NEW)
            with _made(place, path) as new:
                number = image_number(Tables(new), image, os.path.realpath(path))
                if known is not None:
                    _copy(old, known.number, new, number)
            os.rename(place + NEW, place)
            _sync_folder(place)
        if known is not None:
            _remove(old, known.number)
    return not was_there


def disable(history: SqliteHistory, path: str, image: Identity) -> bool:
    """Moves it back into the state directory. False if it was there already."""
    place = beside_image(path)
    if place is None:
        return False
    with history.writing() as new, SqliteHistory(place).writing() as old:
        rows = Tables(old, sole=True).images(image)
        number = image_number(Tables(new), image, os.path.realpath(path))
        _remove(new, number)
        if rows:
            _copy(old, rows[0].number, new, number)
    os.unlink(place)
    _sync_folder(place)
    return True


@contextmanager
def _made(place: str, path: str) -> Iterator[sqlite3.Connection]:
    """A new database, still under another name, of the owner of the image."""
    with SqliteHistory(place + NEW).writing() as connection:
        yield connection
    owner = os.stat(path)
    with suppress(OSError):
        os.chown(place + NEW, owner.st_uid, owner.st_gid)


def _copy(source: sqlite3.Connection, number: int, target: sqlite3.Connection, wanted: int) -> None:
    """The rows about image `number`, as those of image `wanted`."""
    for table, which in (
        ("operations", "where operation in (select operation from parts where image = ?)"),
        ("parts", "where image = ? order by rowid"),
        ("events", "where image = ? order by position"),
    ):
        cursor = source.execute(f"select * from {table} {which}", (number,))
        names = [column[0] for column in cursor.description]
        verb = "insert or ignore" if table == "operations" else "insert"
        statement = f"{verb} into {table} ({', '.join(names)}) values ({', '.join('?' * len(names))})"
        for row in cursor:
            values = dict(zip(names, row, strict=True))
            if table != "operations":
                values["image"] = wanted
            target.execute(statement, tuple(values.values()))


def _remove(connection: sqlite3.Connection, number: int) -> None:
    connection.execute("delete from events where image = ?", (number,))
    connection.execute("delete from parts where image = ?", (number,))
    connection.execute("delete from operations where operation not in (select operation from parts)")


def _sync_folder(path: str) -> None:
    number = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
