"""Creating VDI images: as qemu-img does, byte for byte but for text and identifiers; unfinished ones are refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from planner_harness import needs_qemu
from safeimg.drivers.errors import FormatError, UnsupportedError, UsageError
from safeimg.drivers.formats.chain import OpenError, open_chain
from safeimg.drivers.formats.vdi.create import finish_patch
from safeimg.drivers.formats.vdi.driver import driver
from vdi_images import FS, MIB, create, opened, run, write

pytestmark = needs_qemu
TEXT, IDENTIFIERS = slice(0, 64), slice(0x188, 0x1A8)


@pytest.mark.parametrize("static", ["off", "on"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, MIB, MIB + 1, 130 * MIB])
def test_as_qemu_img(tmp_path: Path, size: int, static: str) -> None:
    ours, theirs = tmp_path / "ours.vdi", tmp_path / "theirs.vdi"
    ours.write_bytes(b"something" * 10000)
    driver.create(FS, str(ours), size, {"static": static})
    create(theirs, str(size), "-o", f"static={static}")
    found, expected = bytearray(ours.read_bytes()), bytearray(theirs.read_bytes())
    assert found[IDENTIFIERS] != bytes(32) != expected[IDENTIFIERS]
    for data in (found, expected):
        data[TEXT], data[IDENTIFIERS] = bytes(64), bytes(32)
    assert found == expected
    assert ours.stat().st_blocks <= 16
    run("qemu-img", "check", "-f", "vdi", ours)
    assert driver.check(opened(ours)).messages == ()


def test_a_large_map_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeimg.drivers.formats.vdi.create._AT_ONCE", 7)
    path = tmp_path / "image.vdi"
    driver.create(FS, str(path), 130 * MIB, {"static": "on"})
    run("qemu-img", "check", "-f", "vdi", path)
    assert len(list(opened(path).extents(0, 130 * MIB))) == 1


def test_refusals(tmp_path: Path) -> None:
    path = str(tmp_path / "image.vdi")
    with pytest.raises(UnsupportedError, match=r"size is 0x1fffff8000200, max supported is 0x1fffff8000000"):
        driver.create(FS, path, 0x1FFFFF8000001, {})
    with pytest.raises(UsageError, match="Unsupported preallocation mode: metadata"):
        driver.create(FS, path, MIB, {"preallocation": "metadata"})
    with pytest.raises(UsageError, match="invalid parameter value: x"):
        driver.create(FS, path, MIB, {"preallocation": "x"})
    with pytest.raises(UsageError, match="Invalid parameter 'cluster_size'"):
        driver.create(FS, path, MIB, {"cluster_size": "1M"})
    assert not Path(path).exists()


def test_unfinished_images_are_refused_until_they_are_finished(tmp_path: Path) -> None:
    path = tmp_path / "image.vdi"
    driver.create(FS, str(path), MIB, {}, unfinished="convert")
    refused = f"Could not open '{path}': unsupported VDI image (version 65535.1)"
    for options in ([], ["-f", "vdi"]):
        done = subprocess.run(["qemu-img", "info", *options, path], capture_output=True, text=True, check=False)
        assert done.stderr == f"qemu-img: {refused}\n"
    with pytest.raises(OpenError) as error:
        open_chain(FS, str(path))
    assert str(error.value) == refused
    image = opened(path, write=True, repair=True)
    (patch,) = driver.unfence(image)
    image.file.pwrite(patch.offset, patch.after)
    image.close()
    write(path, "write -P 1 0 4k")
    run("qemu-img", "check", "-f", "vdi", path)
    finished = opened(path, repair=True)
    assert driver.unfence(finished) == ()
    with pytest.raises(FormatError, match="not an unfinished one"):
        finish_patch(finished.file)
