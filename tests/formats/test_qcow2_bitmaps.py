from __future__ import annotations

from pathlib import Path

import pytest
from qcow2_images import needs_qemu, open_path, patched, qemu_img, qemu_io, run, u64
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.qcow2.bitmaps import read_bitmap_table, read_bitmaps, table_entries
from safeimg.drivers.formats.qcow2.extensions import EXT_BITMAPS

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bitmaps") / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_img("bitmap", "--add", path, "b1")
    qemu_img("bitmap", "--add", "-g", "4k", "--disable", path, "bb2")
    qemu_io(path, "write 1M 2M")
    return path.read_bytes()


def places(data: bytes) -> dict[str, int]:
    """Offsets: of the extension's data, of the directory, of the first bitmap's table."""
    extension = data.index(EXT_BITMAPS.to_bytes(4, "big")) + 8
    directory = u64(data, extension + 16)
    return {"ext": extension, "dir": directory, "table": u64(data, directory)}


# (struct format, place, offset from it, value), as the directory of `image` lies: entries of 32 bytes.
BAD = [
    (">I", "ext", 0, 0), (">I", "ext", 0, 65536), (">Q", "ext", 8, 0), (">Q", "ext", 8, 1 << 40),
    (">Q", "ext", 16, 1), (">I", "ext", 0, 1), (">I", "ext", 0, 3), (">Q", "ext", 8, 56),
    (">Q", "dir", 0, 0x2A0200), (">Q", "dir", 0, 0), (">I", "dir", 8, 0), (">I", "dir", 8, 0xFFFFFFFF),
    (">I", "dir", 12, 8), ("B", "dir", 16, 2), ("B", "dir", 17, 8), ("B", "dir", 17, 32),
    (">H", "dir", 18, 1024), (">I", "dir", 20, 8),
]


@pytest.mark.parametrize(("form", "place", "offset", "value"), BAD)
def test_bad_directories_are_refused_in_qemus_words(
    image: bytes, tmp_path: Path, form: str, place: str, offset: int, value: int
) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(image, (form, places(image)[place] + offset, value)))
    opened = open_path(path)
    with pytest.raises(FormatError) as caught:
        read_bitmaps(opened.file, opened.header)
    result = run("qemu-img", "info", path)
    assert result.returncode == 1
    assert result.stderr == f"qemu-img: Could not open '{path}': {caught.value.problem}\n"


@pytest.mark.parametrize("entry", [0x50200, 2, 1 << 56, 0x50000 | 1])
def test_bad_table_entries_are_refused(image: bytes, tmp_path: Path, entry: int) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(image, (">Q", places(image)["table"], entry)))
    opened = open_path(path)
    with pytest.raises(FormatError, match="b1"):
        read_bitmap_table(opened.file, opened.header, opened.bitmaps[0])
    assert run("qemu-img", "info", path).returncode == 1


def test_table_of_another_size_or_past_the_end_is_refused(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    for form, offset, value in ((">I", 8, 2), (">Q", 0, 1 << 40)):
        path.write_bytes(patched(image, (form, places(image)["dir"] + offset, value)))
        opened = open_path(path)
        with pytest.raises(FormatError, match="b1"):
            read_bitmap_table(opened.file, opened.header, opened.bitmaps[0])


def test_tables_of_good_bitmaps(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(image)
    opened = open_path(path)
    tables = [read_bitmap_table(opened.file, opened.header, bitmap) for bitmap in opened.bitmaps]
    assert [len(table) for table in tables] == [1, 1]
    # b1 has 64 bits, of which the writes set 16 to 47; bb2 is disabled and all zero.
    assert opened.file.pread(tables[0][0], 8) == bytes((0, 0, 255, 255, 255, 255, 0, 0))
    assert tables[1][0] == 0


def test_inconsistent_bitmaps_are_as_if_not_there(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(image, (">Q", 88, 0)))
    assert open_path(path).bitmaps == ()


def test_size_of_a_table() -> None:
    assert table_entries(4 << 20, 16, 16) == 1
    assert table_entries(0, 16, 16) == 0
    assert table_entries((1 << 35) + 1, 16, 16) == 2
