"""The tables of a history's database (docs/journal-format.md)."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

SCHEMA = 1  # PRAGMA user_version

_TABLES: Mapping[str, tuple[dict[str, type], str | tuple[str, ...]]] = {
    "images": ({"number": int, "tag": str, "device": str, "inode": str, "path": str}, "number"),
    "operations": (
        {
            "operation": str,
            "command": str,
            "arguments": str,
            "version": str,
            "outcome": str,
            "started": float,
            "settled": float,
            "uid": int,
            "host": str,
            "home": str,
        },
        "operation",
    ),
    "parts": (
        {
            "operation": str,
            "image": int,
            "role": str,
            "path": str,
            "device": str,
            "inode": str,
            "size": int,
            "mtime_ns": int,
            "tag": str,
        },
        ("operation", "image"),
    ),
    "events": (
        {
            "image": int,
            "position": int,
            "operation": str,
            "sequence": int,
            "kind": str,
            "body": str,
            "previous": bytes,
            "hash": bytes,
        },
        ("image", "position"),
    ),
    "pending": (
        {
            "operation": str,
            "command": str,
            "log": str,
            "home": str,
            "machine": str,
            "started": float,
        },
        "operation",
    ),
}


def create_tables(connection: sqlite3.Connection) -> None:
    """Makes the tables of a new database, within a transaction. Imports sqlite_utils."""
    database = _database()(connection, execute_plugins=False)
    for name, (columns, key) in _TABLES.items():
        database.table(name).create(columns, pk=key, if_not_exists=True)
    database.table("parts").create_index(["image"], if_not_exists=True)
    database.table("images").create_index(["inode"], if_not_exists=True)
    database.table("images").create_index(["tag"], if_not_exists=True)
    connection.execute(f"PRAGMA user_version={SCHEMA}")


def _database() -> type[Database]:
    """sqlite_utils, without numpy and pandas: where they are installed it would import them, only to know how their
    types are stored. That takes longer than all the rest of it. No worker runs meanwhile that might import them."""
    hidden = [name for name in ("numpy", "pandas") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    try:
        from sqlite_utils import Database
    finally:
        for name in hidden:
            del sys.modules[name]
    return Database
