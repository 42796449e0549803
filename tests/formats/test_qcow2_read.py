from __future__ import annotations

import json
import random
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_images import (
    RECIPES,
    Recipe,
    build,
    needs_qemu,
    open_path,
    patched,
    qemu_img,
    qemu_io,
    read_guest,
    run,
    u64,
)
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.formats.qcow2 import compression
from safeimg.drivers.formats.qcow2.driver import driver
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    ZERO,
    compressed_shift,
    decode_compressed,
    encode_compressed,
)
from safeimg.drivers.formats.qcow2.header import ZLIB, ZSTD

pytestmark = needs_qemu
KINDS = {Kind.DATA: (True, False), Kind.ZERO: (False, True), Kind.UNALLOCATED: (False, True)}


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.options)
def image_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("read") / "image.qcow2", request.param)


def test_guest_reads_as_in_qemu(image_path: Path, tmp_path: Path) -> None:
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image_path, tmp_path / "raw")
    expected = (tmp_path / "raw").read_bytes()
    image = open_path(image_path)
    assert image.size == len(expected)
    assert read_guest(image) == expected
    generator = random.Random(1)
    for _ in range(50 if image.cluster_size < 1 << 20 else 5):
        start = generator.randrange(image.size)
        length = generator.choice((1, 511, image.cluster_size, 2 * image.cluster_size + 1))
        assert read_guest(image, start, length) == expected[start:start + length]
    image.close()


def test_extents_are_those_of_qemu_map(image_path: Path) -> None:
    image = open_path(image_path)
    ours: list[tuple[int, int, bool, bool, int | None]] = []
    for extent in image.extents(0, image.size):
        data, zero = KINDS.get(extent.kind, (True, False))
        offset = None if extent.kind is Kind.COMPRESSED else extent.offset
        last = ours[-1] if ours else None
        if last is not None and extent.kind is Kind.COMPRESSED and last[2] and last[4] is None:
            ours[-1] = (last[0], last[1] + extent.length, *last[2:])  # map joins these, we never do
        else:
            ours.append((extent.start, extent.length, data, zero, offset))
    listed = json.loads(qemu_img("map", "--output=json", image_path))
    assert ours == [(e["start"], e["length"], e["data"], e["zero"], e.get("offset")) for e in listed]
    image.close()


def test_snapshots_read_as_in_qemu(image_path: Path, tmp_path: Path) -> None:
    image = open_path(image_path)
    listed = json.loads(qemu_img("info", "--output=json", image_path)).get("snapshots", [])
    ours = [(entry.id, entry.name, entry.date_sec, entry.date_nsec) for entry in image.snapshots]
    assert ours == [
        (entry["id"], entry["name"], entry["date-sec"], entry["date-nsec"]) for entry in listed
    ]
    for snapshot in image.snapshots:
        qemu_img("convert", "-f", "qcow2", "-l", snapshot.name, "-O", "raw", image_path, tmp_path / "raw")
        mapping = image.at(snapshot)
        assert mapping.size == image.size
        found = b"".join(read_extent(image, extent) for extent in mapping.extents(0, mapping.size))
        assert found == (tmp_path / "raw").read_bytes()
    image.close()


def read_extent(image: object, extent: Extent) -> bytes:
    from safeimg.drivers.formats.qcow2.image import Qcow2Image

    assert isinstance(image, Qcow2Image)
    if extent.kind is Kind.COMPRESSED:
        assert extent.offset is not None
        return image.decompress(extent, image.file.pread(extent.offset, extent.stored))
    if extent.kind is Kind.DATA:
        assert extent.offset is not None
        return image.file.pread(extent.offset, extent.length).ljust(extent.length, b"\0")
    return bytes(extent.length)


def test_specific_info_is_that_of_qemu(image_path: Path) -> None:
    image = open_path(image_path)
    listed = json.loads(qemu_img("info", "--output=json", image_path))["format-specific"]["data"]
    ours = driver.specific_info(image)
    assert ours == listed
    shown = [line.strip() for line in qemu_img("info", image_path).splitlines() if line.startswith("    ")]
    keys = [line.split(":")[0].replace(" ", "-") for line in shown]
    order = [key for key in keys if key in ours]
    assert list(ours) == order
    image.close()


def test_decompress_from_several_threads(image_path: Path) -> None:
    image = open_path(image_path)
    extents = [extent for extent in image.extents(0, image.size) if extent.kind is Kind.COMPRESSED]
    assert len(extents) == 2
    wanted = [bytes((fill,)) * image.cluster_size for fill in (3, 4)]
    stored = [image.file.pread(extent.offset or 0, extent.stored) for extent in extents]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(50):
            for index, extent in enumerate(extents):
                if image.decompress(extent, stored[index]) != wanted[index]:
                    wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    image.close()


# Entries that must not be there


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("read") / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 256k", "write -c -P 2 1M 64k")
    return path.read_bytes()


def l2_table(data: bytes) -> int:
    return u64(data, u64(data, 40)) & OFFSET_MASK


def first_problem(tmp_path: Path, data: bytes) -> str | None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(data)
    image = open_path(path)
    try:
        read_guest(image)
    except FormatError as error:
        return error.problem
    finally:
        image.close()
    return None


@pytest.mark.parametrize(
    "entry",
    [COPIED | 0x50200, COPIED | 0x50200 | ZERO, 0x50200],
    ids=["data", "preallocated", "shared"],
)
def test_unaligned_clusters_are_refused_in_qemus_words(plain: bytes, tmp_path: Path, entry: int) -> None:
    data = patched(plain, (">Q", l2_table(plain) + 8, entry))
    problem = first_problem(tmp_path, data)
    result = run("qemu-io", "-r", "-c", "read 64k 64k", tmp_path / "image.qcow2")
    assert problem is not None and f"qcow2: {problem};" in result.stderr


def test_unaligned_l2_table_is_refused_in_qemus_words(plain: bytes, tmp_path: Path) -> None:
    problem = first_problem(tmp_path, patched(plain, (">Q", u64(plain, 40),
    COPIED | (l2_table(plain) + 512))))
    result = run("qemu-io", "-r", "-c", "read 0 64k", tmp_path / "image.qcow2")
    assert problem is not None and f"qcow2: {problem};" in result.stderr


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (COPIED | 0x50000 | 2, "reserved bits"),
        (COPIED | 0x50000 | 1 << 56, "reserved bits"),
        (COPIED | 0x50000 | 1 << 61, "reserved bits"),
        (4, "reserved bits"),
        (COPIED | 1 << 40, "past the end of the file"),
        (COMPRESSED | 1 << 40, "past the end of the file"),
        (COMPRESSED | 0x10, "damaged"),
    ],
)
def test_bad_l2_entries_are_refused(plain: bytes, tmp_path: Path, entry: int, words: str) -> None:
    problem = first_problem(tmp_path, patched(plain, (">Q", l2_table(plain), entry)))
    assert problem is not None and words in problem


@pytest.mark.parametrize(
    ("entry", "words"),
    [(COPIED | 1 << 40, "past the end of the file"), (1 << 60, "reserved bits"), (COPIED | 0x40001,
    "reserved")],
)
def test_bad_l1_entries_are_refused(plain: bytes, tmp_path: Path, entry: int, words: str) -> None:
    problem = first_problem(tmp_path, patched(plain, (">Q", u64(plain, 40), entry)))
    assert problem is not None and words in problem


def test_l1_table_past_the_end_is_refused(plain: bytes, tmp_path: Path) -> None:
    problem = first_problem(tmp_path, patched(plain, (">Q", 40, 1 << 40)))
    assert problem == "L1 table lies past the end of the file"


@pytest.mark.parametrize("entry", [COPIED, COPIED | ZERO, 0, ZERO])
def test_entries_without_an_offset_read_as_zeroes(plain: bytes, tmp_path: Path, entry: int) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(patched(plain, (">Q", l2_table(plain), entry)))
    image = open_path(path)
    first = next(image.extents(0, 65536))
    kind = Kind.ZERO if entry & ZERO else Kind.UNALLOCATED
    assert first == Extent(0, 65536, kind)
    image.close()


def test_data_cut_inside_the_last_cluster_reads_as_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 128k")
    path.write_bytes(path.read_bytes()[:-1000])
    image = open_path(path)
    assert read_guest(image, 0, 128 << 10) == b"\1" * ((128 << 10) - 1000) + bytes(1000)
    image.close()
    path.write_bytes(path.read_bytes()[:-65536])
    image = open_path(path)
    with pytest.raises(FormatError, match="past the end of the file"):
        read_guest(image)


def test_zero_clusters_are_refused_in_version_2(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "4M")
    qemu_io(path, "write -P 1 0 64k")
    data = path.read_bytes()
    problem = first_problem(tmp_path, patched(data, (">Q", l2_table(data), u64(data, l2_table(data)) | ZERO)))
    assert problem is not None and "Zero cluster entry found in pre-v3 image" in problem


def test_a_grown_file_and_changed_tables_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    image = open_path(path)
    assert [extent.kind for extent in image.extents(0, 4 << 20)] == [Kind.UNALLOCATED]
    qemu_io(path, "write -P 1 0 64k")
    image.forget()
    assert [extent.kind for extent in image.extents(0, 4 << 20)] == [Kind.DATA, Kind.UNALLOCATED]
    qemu_img("resize", "-q", path, "8M")
    qemu_img("snapshot", "-c", "new", path)
    image.reload()
    assert image.size == 8 << 20 and [snapshot.name for snapshot in image.snapshots] == ["new"]
    image.close()


def test_a_huge_sparse_disk_is_skipped_at_once(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "1P")
    qemu_io(path, "write -P 1 512T 2M")
    image = open_path(path)
    kinds = [(extent.start, extent.length, extent.kind) for extent in image.extents(0, image.size)]
    half, cluster = 1 << 49, 2 << 20
    assert kinds == [
        (0, half, Kind.UNALLOCATED), (half, cluster, Kind.DATA), (half + cluster, half - cluster,
        Kind.UNALLOCATED)
    ]
    image.close()


# Compressed clusters


@given(cluster_bits=st.integers(9, 21), data=st.data())
def test_compressed_descriptors_round_trip(cluster_bits: int, data: st.DataObject) -> None:
    size = 1 << cluster_bits
    offset = data.draw(st.integers(0, (1 << min(56, compressed_shift(cluster_bits))) - size - 1))
    stored = data.draw(st.integers(1, size))
    entry = encode_compressed(offset, stored, cluster_bits)
    assert entry >> 62 == 1
    found = decode_compressed(entry, cluster_bits)
    assert found.offset == offset and stored <= found.stored < stored + 512
    assert (found.offset + found.stored) % 512 == 0


@given(data=st.binary(max_size=5000), kind=st.sampled_from([ZLIB, ZSTD]), junk=st.binary(max_size=600))
def test_clusters_round_trip_through_compression(data: bytes, kind: int, junk: bytes) -> None:
    cluster = (data * 14 + bytes(65536))[:65536]
    packed = compression.compress(kind, cluster)
    assert packed is not None and len(packed) < len(cluster)
    assert compression.inflate(kind, packed + junk, 65536) == cluster
    if kind == ZLIB:
        # Others inflate bit by bit, and keep no more than QEMU's window.
        assert zlib.decompressobj(-12).decompress(packed) == cluster
        large = compression.compress(kind, cluster, window=compression.LARGE_WINDOW)
        assert large is not None and zlib.decompress(large, -15) == cluster


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
@pytest.mark.parametrize("level", [1, 3])
def test_what_does_not_shrink_is_not_compressed(kind: int, level: int) -> None:
    assert compression.compress(kind, random.Random(0).randbytes(65536), level) is None


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_inflating_is_bounded_and_damage_is_found(kind: int) -> None:
    bomb = compression.compress(kind, bytes(64 << 20))
    assert bomb is not None
    assert compression.inflate(kind, bomb, 65536) == bytes(65536)
    good = compression.compress(kind, random.Random(0).randbytes(2000) * 32 + bytes(1536))
    assert good is not None
    for bad in (b"", b"\xff" * 100, good[:-200], bytes(512)):
        with pytest.raises(compression.InflateError):
            compression.inflate(kind, bad, 65536)


def test_a_zstd_frame_that_wants_a_huge_window_is_refused() -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=0)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = compressor.compress(bytes(65536)) + compressor.flush()
    with pytest.raises(compression.InflateError):
        compression.inflate(ZSTD, frame, 65536)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.bitmap], ids=lambda r: r.options)
def test_bitmaps_are_listed(tmp_path: Path, recipe: Recipe) -> None:
    path = build(tmp_path / "image.qcow2", recipe)
    qemu_img("bitmap", "--add", "--disable", "-g", "16k", path, "second")
    image = open_path(path)
    assert [(bitmap.name, bitmap.enabled, bitmap.in_use) for bitmap in image.bitmaps] == [
        ("bitmap one", True, False), ("second", False, False)
    ]
    assert image.bitmaps[1].granularity == 16384
    image.close()


def test_one_table_used_as_l1_and_as_l2(plain: bytes, tmp_path: Path) -> None:
    """Found by fuzzing: the two are read in pieces of different lengths."""
    offset = u64(plain, 40)
    problem = first_problem(tmp_path, patched(plain, (">Q", offset, COPIED | offset)))
    assert problem is None  # its one entry is a data cluster that holds the table
