"""convert --salvage: what cannot be read is zero, with qemu-img's warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from twin import Outcome, qemu_img, qemu_io, safeimg

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
    reason="qemu-img and qemu-io are not installed",
)


def convert(folder: Path, *words: str) -> tuple[Outcome, Outcome]:
    """By both programs, to `one` and `two`."""
    line = ["convert", "--salvage", "-O", "raw", *words]
    return qemu_img([*line, "one"], folder), safeimg([*line, "two"], folder, name="qemu-img")


def failing(driver: str, name: str, **rule: object) -> str:
    below = {"driver": "blkdebug", "image": {"driver": "file", "filename": name}, "inject-error": [rule]}
    return "json:" + json.dumps({"driver": driver, "file": below})


@pytest.mark.parametrize("more", [(), ("-q",), ("-S", "0")])
def test_a_sector_that_cannot_be_read_is_zero(tmp_path: Path, more: tuple[str, ...]) -> None:
    content = bytes(range(1, 251)) * 4000
    (tmp_path / "disk").write_bytes(content)
    source = failing("raw", "disk", event="read_aio", sector=1000)
    one, two = convert(tmp_path, *more, source)
    assert one == two
    assert (b"error while reading offset 512000: Input/output error" in two.stderr) is ("-q" not in more)
    expected = content[:512000] + bytes(512) + content[512512:]
    for name in ("one", "two"):
        assert (tmp_path / name).read_bytes()[: len(content)] == expected


def test_clusters_whose_place_cannot_be_read_are_zero(tmp_path: Path) -> None:
    """An entry of the L2 table is damaged."""
    qemu_img(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "disk", "256k"], tmp_path)
    qemu_io(tmp_path, "-c", "write -P 7 0 256k", "disk")
    data = bytearray((tmp_path / "disk").read_bytes())
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & ~(1 << 63)
    data[l2 + 8 * 5 + 6] |= 2  # not where a cluster begins
    (tmp_path / "disk").write_bytes(data)
    one, two = convert(tmp_path, "-f", "qcow2", "disk")
    assert (two.code, one.code) == (0, 0)
    warnings = [{line for line in done.stderr.splitlines() if b"warning" in line} for done in (one, two)]
    assert warnings[0] == warnings[1]
    assert len(warnings[0]) == 2 * 8
    expected = bytes([7]) * 20480 + bytes(4096) + bytes([7]) * (262144 - 24576)
    for name in ("one", "two"):
        assert (tmp_path / name).read_bytes() == expected


def test_what_can_be_read_is_copied_as_always(tmp_path: Path) -> None:
    qemu_img(["create", "-q", "-f", "qcow2", "disk", "1M"], tmp_path)
    qemu_io(tmp_path, "-c", "write -P 7 100k 256k", "disk")
    one, two = convert(tmp_path, "disk")
    assert one == two == Outcome(0, b"", b"")
    for name in ("one", "two"):
        assert qemu_img(["compare", name, "disk"], tmp_path).code == 0
