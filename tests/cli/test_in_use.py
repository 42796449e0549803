"""Images that another program has open, as a running guest has its disk: who may read, and who must not write."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.storage.locks import RAW_WRITER
from twin import qemu_img, safeimg, words

SHARED = (
    "info disk.raw",
    "info on-raw.qcow2",
    "map -f raw disk.raw",
    "map on-raw.qcow2",
    "compare -f raw -F qcow2 disk.raw on-raw.qcow2",
    "measure -f raw -O qcow2 disk.raw",
    "snapshot -l disk.raw",
    "check -f raw disk.raw",
    "dd -f raw -O raw if=disk.raw of=out.raw bs=64k",
    "map --image-opts driver=luks,file.filename=disk.raw",
    "map -f qcow2 disk.raw",  # what has tables may not change meanwhile
    "convert -f raw -O raw disk.raw out.raw",
    "convert -O raw on-raw.qcow2 out.raw",
    "convert -U -f raw -O raw disk.raw out.raw",
    "map --image-opts driver=qcow2,file.filename=disk.raw,file.locking=off",
    "map --image-opts driver=qcow2,file.filename=disk.raw,file.force-share=on",
)
CHANGES = (
    "resize -f raw disk.raw +1M",
    "commit on-raw.qcow2",
    "convert -n -f raw -O raw other.raw disk.raw",
    "rebase -b other.raw -F raw on-raw.qcow2",
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk.raw").write_bytes(b"guest" * 13108)
    (tmp_path / "other.raw").write_bytes(b"other" * 13108)
    assert qemu_img(words("create -q -f qcow2 -b disk.raw -F raw on-raw.qcow2"), tmp_path).code == 0
    guest = LocalFileSystem().open(str(tmp_path / "disk.raw"), write=True)
    guest.lock(RAW_WRITER)
    yield tmp_path
    guest.close()


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
@pytest.mark.parametrize("line", SHARED)
def test_readers_are_let_in_where_qemu_lets_them(folder: Path, line: str) -> None:
    expected = qemu_img(words(line), folder)
    assert safeimg(words(line), folder, name="qemu-img") == expected


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
@pytest.mark.parametrize("line", CHANGES)
def test_what_somebody_writes_to_is_not_changed(folder: Path, line: str) -> None:
    """qemu-img does, with raw images: its changes and the guest's are mixed. None could be taken back then."""
    before = (folder / "disk.raw").read_bytes()
    answer = safeimg(words(line), folder)
    assert answer.code == 1
    assert b"lock\nIs another process using the image [" in answer.stderr
    assert (folder / "disk.raw").read_bytes() == before
