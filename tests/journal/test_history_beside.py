"""A history beside its image: moved there and back, kept on there, and found by every reader."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from journal_fakes import DECLARED
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal import audit
from safeimg.journal.beside import disable, enable
from safeimg.journal.errors import HistoryError
from safeimg.journal.events import Completed, Declared, Event, Identity, ImageRecord, Settled
from safeimg.journal.identity import identify
from safeimg.journal.sqlite import BESIDE, SqliteHistory
from safeimg.journal.story import changed_since


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))
    for name in ("base.raw", "top.raw"):
        (tmp_path / name).write_bytes(b"image")
    return tmp_path / "base.raw", tmp_path / "top.raw"


def seen(path: Path) -> Identity:
    file = LocalFileSystem().open(str(path))
    try:
        return identify(file)
    finally:
        file.close()


def operation(number: int, images: tuple[Path, Path]) -> list[Event]:
    records = tuple(ImageRecord("image", path.name, "raw", seen(path), True) for path in images)
    declared: Declared = DECLARED._replace(operation=f"{number:032x}", images=records)
    looks = tuple((index, seen(path)) for index, path in enumerate(images))
    return [declared, Completed((), float(number)), Settled(looks, "", float(number))]


def record(number: int, images: tuple[Path, Path]) -> None:
    SqliteHistory().record_settled(operation(number, images), home=str(images[0]))


def chain(path: Path) -> list[bytes]:
    return [row.hash for row in SqliteHistory().at(str(path)).chain(seen(path))]


@pytest.mark.parametrize("which", [0, 1], ids=["home", "participant"])
def test_there_and_back(images: tuple[Path, Path], which: int) -> None:
    """The chain goes on, whichever of its images has its history beside it."""
    record(1, images)
    path, before = images[which], [chain(each) for each in images]
    assert enable(SqliteHistory(), str(path), seen(path)) and os.path.exists(f"{path}{BESIDE}")
    assert [chain(each) for each in images] == before
    assert SqliteHistory().chain(seen(path)) == []
    record(2, images)
    record(2, images)  # once more: a crash before the log was removed
    assert [len(chain(each)) for each in images] == [6, 2]
    assert not enable(SqliteHistory(), str(path), seen(path))
    assert disable(SqliteHistory(), str(path), seen(path)) and not os.path.exists(f"{path}{BESIDE}")
    assert not disable(SqliteHistory(), str(path), seen(path))
    record(3, images)
    for each, length, first in zip(images, (9, 3), before, strict=True):
        assert len(chain(each)) == length and chain(each)[: len(first)] == first
        assert audit.verify(SqliteHistory().at(str(each)), seen(each)) == []


def test_it_goes_where_the_image_goes(images: tuple[Path, Path], tmp_path: Path) -> None:
    """A copy has another inode, and on another host nothing but the file beside it tells of it."""
    record(1, images)
    enable(SqliteHistory(), str(images[0]), seen(images[0]))
    before = chain(images[0])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    copy = folder / "copy.raw"
    copy.write_bytes(images[0].read_bytes() + b"!")
    os.rename(f"{images[0]}{BESIDE}", f"{copy}{BESIDE}")
    assert chain(copy) == before and chain(images[0]) == []
    assert changed_since(SqliteHistory().at(str(copy)), seen(copy)) == 1.0
    record(2, (copy, images[1]))
    assert len(chain(copy)) == 6


def test_a_crash_while_it_is_moved_loses_nothing(images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    record(1, images)
    before = chain(images[0])
    for failing in ("os.rename", "safeimg.journal.beside._remove"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(failing, lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
            enable(SqliteHistory(), str(images[0]), seen(images[0]))
        assert chain(images[0]) == before
    enable(SqliteHistory(), str(images[0]), seen(images[0]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.unlink", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        disable(SqliteHistory(), str(images[0]), seen(images[0]))
    assert chain(images[0]) == before
    assert disable(SqliteHistory(), str(images[0]), seen(images[0])) and chain(images[0]) == before


def test_a_file_that_is_not_trusted(images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink("/etc/passwd", f"{images[0]}{BESIDE}")
    with pytest.raises(HistoryError, match="not trusted"):
        SqliteHistory().at(str(images[0]))
    os.unlink(f"{images[0]}{BESIDE}")
    Path(f"{images[0]}{BESIDE}").write_bytes(b"no database at all" * 99)
    with pytest.raises(HistoryError, match="damaged"):
        chain(images[0])


def test_it_is_a_database_of_its_own(images: tuple[Path, Path]) -> None:
    record(1, images)
    enable(SqliteHistory(), str(images[0]), seen(images[0]))
    with sqlite3.connect(f"{images[0]}{BESIDE}") as connection:
        assert connection.execute("select count(*) from images").fetchone() == (1,)
    assert os.stat(f"{images[0]}{BESIDE}").st_mode & 0o777 == 0o600
