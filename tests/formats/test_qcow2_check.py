from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from qcow2_damage import damage, spots
from qcow2_images import (
    RECIPES,
    build,
    needs_qemu,
    open_path,
    patched,
    qemu_check,
    qemu_img,
    qemu_io,
    run,
    u64,
)
from safeimg.drivers.errors import DriverError, FormatError
from safeimg.drivers.formats.api import CheckResult
from safeimg.drivers.formats.qcow2.check import check, decode_block
from safeimg.drivers.formats.qcow2.entries import COPIED, OFFSET_MASK
from safeimg.drivers.formats.qcow2.scan import count_references

pytestmark = needs_qemu
# Damage in an image of large clusters is described in too many lines to be quick.
SMALL = [recipe for recipe in RECIPES if recipe.cluster_size <= 65536]
COUNTERS = (
    "corruptions", "leaks", "check-errors", "image-end-offset", "total-clusters", "allocated-clusters",
    "fragmented-clusters", "compressed-clusters",
)


def our_check(path: Path) -> CheckResult | None:
    try:
        image = open_path(path)
    except DriverError:
        return None
    try:
        return check(image)
    except DriverError:
        return None
    finally:
        image.close()


def as_json(result: CheckResult) -> dict[str, Any]:
    return {name: getattr(result, name.replace("-", "_")) for name in COUNTERS}


def assert_same_as_qemu(path: Path) -> CheckResult | None:
    expected, messages = qemu_check(path)
    result = our_check(path)
    assert (result is None) == (expected is None)
    if result is not None and expected is not None:
        assert "\n".join(result.messages) == "\n".join(messages)
        assert as_json(result) == {name: expected.get(name, 0) for name in COUNTERS}
    return result


@pytest.fixture(scope="module", params=SMALL, ids=lambda recipe: recipe.options)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("check") / "image.qcow2", request.param).read_bytes()


def test_sound_images_are_sound(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(sound)
    result = assert_same_as_qemu(path)
    assert result is not None and not result.messages
    assert result.compressed_clusters == 2 and result.allocated_clusters > 8


def test_damage_is_described_as_by_qemu(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    places = spots(sound)
    for seed in range(12):
        path.write_bytes(damage(random.Random(seed), sound, places))
        try:
            assert_same_as_qemu(path)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


# One entry changed in an image of known layout: what random damage is not certain to hit.


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("check") / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 256k")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 64k", "write -z 1M 128k", "write -c 2M 64k", "write -c 2112k 64k")
    return path.read_bytes()


KNOWN: list[tuple[str, int, int]] = [
    *((("l1"), 0, value) for value in (1 << 40 | COPIED, COPIED, 0x40200 | COPIED, 0xB0000, 1 << 60 | 0xB0000)),
    *((("l2"), 1, value) for value in (COPIED, 0x20000 | COPIED, 0xB0000 | COPIED, 0x60000 | COPIED, 0xC0001)),
    *((("l2"), 60, value) for value in (2, 1 << 56, COPIED | 1, COPIED, 0x50200, (1 << 62) | 3 << 50 | 0x50000)),
    *((("l2"), 60, value) for value in (1 << 62 | 127 << 54 | 0xCFE9E, 1 << 62 | COPIED | 0x50000, 0xD0200)),
    *((("table"), 0, value) for value in (0, 0x20200, 0x20001, 1 << 40, 1 << 63)),
    *((("table"), 1, value) for value in (1 << 40, 0x50200, 0x20000, 0x50000, 1 << 63, 1)),
    ("header", 40, 0), ("header", 40, 1 << 40), ("header", 40, 0x90000), ("header", 48, 1 << 40),
    ("header", 48, 0), ("header", 64, 1 << 40), ("header", 72, 1), ("header", 72, 2), ("header", 24, 0),
    *((("snapshot"), 0, value) for value in (0x50200, 1 << 40, 0, 0x30000)),
]


@pytest.mark.parametrize(("table", "index", "value"), KNOWN)
def test_single_mistakes_are_described_as_by_qemu(
    known: bytes, tmp_path: Path, table: str, index: int, value: int
) -> None:
    l1_table = u64(known, 40)
    starts = {
        "l1": l1_table, "l2": u64(known, l1_table) & OFFSET_MASK, "table": u64(known, 48),
        "snapshot": u64(known, 64), "header": 0,
    }
    path = tmp_path / "image.qcow2"
    offset = starts[table] + (index if table == "header" else 8 * index)
    path.write_bytes(patched(known, (">Q", offset, value)))
    assert_same_as_qemu(path)


@pytest.mark.parametrize("length", [0xD009E - 512, 0xD009E - 65536, 0xD009E - 3 * 65536, 0xD009E + 200000])
def test_cut_and_extended_files(known: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(known[:length].ljust(length, b"\0"))
    assert assert_same_as_qemu(path) is not None


def test_incomplete_snapshots_are_damage_in_version_3_only(tmp_path: Path) -> None:
    for compat in ("0.10", "1.1"):
        path = tmp_path / "image.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"compat={compat}", path, "4M")
        qemu_img("snapshot", "-c", "one", path)
        data = bytearray(path.read_bytes())
        entry = u64(data, 64)
        size = int.from_bytes(data[entry + 36:entry + 40], "big")
        data[entry + 36:entry + 40] = bytes(4)
        data[entry + 40:entry + 44] = data[entry + 40 + size:entry + 44 + size]
        path.write_bytes(data)
        result = assert_same_as_qemu(path)
        assert result is not None and bool(result.messages) == (compat == "1.1")


def test_references_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 128k")
    qemu_img("snapshot", "-c", "one", path)
    image = open_path(path)
    counts = count_references(image)
    # header, refcount table and block, L1 table, L2 table and its two clusters (twice), snapshot L1 and table
    assert sorted(counts.tolist()) == [1, 1, 1, 1, 1, 1, 2, 2, 2]
    image.close()


def test_references_do_not_depend_on_refcounts(known: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(known)
    expected = count_references(open_path(path)).tolist()
    block = u64(known, u64(known, 48))
    path.write_bytes(known[:block] + bytes(65536) + known[block + 65536:])
    assert count_references(open_path(path)).tolist() == expected


@pytest.mark.parametrize("order", range(7))
def test_refcount_blocks_of_every_width(order: int) -> None:
    values = [1, 0, 1, 1, 0, 0, 0, 1] if order == 0 else [3, 0, 1, 2, 0, 0, 3, 1]
    width = 1 << order
    if order >= 3:
        data = b"".join(value.to_bytes(width // 8, "big") for value in values)
    else:
        packed = sum(value << index * width for index, value in enumerate(values))
        data = packed.to_bytes(width, "little")
    assert decode_block(data, order).tolist() == values


def test_shared_tables_are_read_once_whatever_the_number_of_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "4M")
    qemu_io(path, "write -P 1 0 4M")
    for number in range(20):
        qemu_img("snapshot", "-c", str(number), path)
    image = open_path(path)
    reads = 0
    pread = image.file.pread

    def counted(offset: int, length: int) -> bytes:
        nonlocal reads
        reads += 1
        return pread(offset, length)

    image.file.pread = counted  # type: ignore[method-assign]
    result = check(image)
    assert not result.messages and result.allocated_clusters == 8192
    l2_tables = 128
    assert reads < 3 * l2_tables + 300
    image.close()


def test_repeated_damage_ends_in_an_error(tmp_path: Path) -> None:
    """An L1 table of four million entries that all name the same L2 table."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "4M")
    qemu_io(path, "write -P 1 0 4M")
    data = path.read_bytes()
    entry = u64(data, u64(data, 40))
    offset = len(data) + -len(data) % (2 << 20)
    data = data.ljust(offset, b"\0") + entry.to_bytes(8, "big") * (4 << 20)
    path.write_bytes(patched(data, (">Q", 40, offset), (">I", 36, 4 << 20)))
    image = open_path(path)
    with pytest.raises(FormatError, match="too damaged"):
        check(image)
    image.close()


def test_check_changes_nothing(known: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(damage(random.Random(3), known, spots(known)))
    before = path.read_bytes()
    our_check(path)
    assert path.read_bytes() == before
    assert run("qemu-img", "--version").returncode == 0
