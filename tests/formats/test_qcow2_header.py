from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qcow2_images import FS, needs_qemu, patched, qemu_img, run
from safeimg.drivers.errors import DriverError, FormatError, UnsupportedError
from safeimg.drivers.formats.qcow2.create import create
from safeimg.drivers.formats.qcow2.extensions import (
    EXT_BACKING_FORMAT,
    Extension,
    FeatureName,
    feature_name_table,
    serialise_extension,
)
from safeimg.drivers.formats.qcow2.header import Header, parse_header, parse_header_cluster, serialise
from safeimg.drivers.formats.qcow2.image import open_image

FIELDS = {
    "magic": (">I", 0), "version": (">I", 4), "backing_offset": (">Q", 8), "backing_size": (">I", 16),
    "cluster_bits": (">I", 20), "size": (">Q", 24), "crypt": (">I", 32), "l1_size": (">I", 36),
    "l1_offset": (">Q", 40), "table_offset": (">Q", 48), "table_clusters": (">I", 56), "snapshots": (">I",
    60),
    "snapshots_offset": (">Q", 64), "incompatible": (">Q", 72), "compatible": (">Q", 80), "autoclear": (">Q",
    88),
    "order": (">I", 96), "length": (">I", 100), "compression": ("B", 104),
}

# One field (or two) set to a bad value; QEMU's message follows from asking it.
BAD: list[dict[str, int]] = [
    {"magic": 5}, {"version": 1}, {"version": 4}, {"cluster_bits": 8}, {"cluster_bits": 22},
    {"cluster_bits": 63},
    {"cluster_bits": 21}, {"size": 1 << 40}, {"size": 1 << 62}, {"crypt": 3}, {"l1_size": 0},
    {"l1_size": (4 << 20) + 1}, {"l1_size": 0xFFFFFFFF}, {"l1_offset": 512}, {"l1_offset": 1 << 63},
    {"table_offset": 512}, {"table_offset": 1 << 63}, {"table_offset": (1 << 64) - 65536},
    {"table_clusters": 0},
    {"table_clusters": 129}, {"table_clusters": 0xFFFFFFFF}, {"snapshots": 65537}, {"snapshots_offset": 1},
    {"snapshots": 1, "snapshots_offset": 1 << 63}, {"incompatible": 8}, {"compression": 1},
    {"incompatible": 8, "compression": 2}, {"incompatible": 1 << 5}, {"incompatible": 1 << 63 | 1 << 56},
    {"incompatible": 1 << 56 | 2, "order": 9}, {"order": 7}, {"order": 0xFFFFFFFF}, {"length": 0},
    {"length": 100},
    {"length": 108}, {"length": 65544}, {"backing_offset": 65536, "backing_size": 1},
    {"backing_offset": 65500, "backing_size": 37}, {"backing_offset": 600, "backing_size": 1024},
    {"backing_offset": 1 << 63, "backing_size": 5}, {"order": 9, "crypt": 5}, {"crypt": 5,
    "table_clusters": 0},
    {"table_clusters": 0, "l1_size": 0}, {"l1_size": 0, "backing_offset": 1 << 63},
]
GOOD: list[dict[str, int]] = [
    {}, {"l1_size": 2}, {"l1_size": 4 << 20}, {"l1_offset": 1 << 40}, {"length": 104}, {"length": 4096},
    {"compatible": 0x21}, {"autoclear": 1 << 9}, {"order": 0}, {"order": 6}, {"incompatible": 8,
    "compression": 1},
    {"incompatible": 1}, {"incompatible": 2}, {"snapshots": 1}, {"size": 0}, {"size": 511},
]
EXTENSIONS: list[tuple[bytes, dict[str, int]]] = [
    (struct.pack(">II", 0x12345678, 0xFFFFFFFF), {}),
    (struct.pack(">II", 0x12345678, 65536 - 119), {}),
    (struct.pack(">II", 0x12345678, 65536 - 120), {}),
    (struct.pack(">II", 0, 5), {}),
    (struct.pack(">II", EXT_BACKING_FORMAT, 16) + b"x" * 16, {}),
    (struct.pack(">II", EXT_BACKING_FORMAT, 15) + b"x" * 15, {}),
    (struct.pack(">II", 0x23852875, 8) + bytes(8), {}),
    (struct.pack(">II", 0x0537BE77, 16) + bytes(16), {}),
    (struct.pack(">II", 0x12345678, 0xFFFFFFFF), {"incompatible": 1 << 60}),
    (serialise_extension(feature_name_table((FeatureName(0, 5, "hello"), FeatureName(0, 7, "seven")))),
     {"incompatible": 1 << 5 | 1 << 7 | 1 << 8}),
    (serialise_extension(feature_name_table((FeatureName(0, 7, "b"), FeatureName(0, 5, "f" * 46)))),
     {"incompatible": 1 << 5 | 1 << 7}),
    (struct.pack(">II", 0x6803F857, 20) + struct.pack("BB18s", 0, 5, b"hello"), {"incompatible": 1 << 5}),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("header") / "plain.qcow2"
    create(FS, str(path), 10 << 20, {})
    return path.read_bytes()


def edit(data: bytes, values: dict[str, int]) -> bytes:
    return patched(data, *((*FIELDS[name], value) for name, value in values.items()))


def problem(path: Path) -> str | None:
    """What parsing the header complains of, in QEMU's form."""
    file = FS.open(str(path))
    try:
        parse_header(file)
    except FormatError as error:
        return error.problem
    except DriverError as error:
        return str(error)
    finally:
        file.close()
    return None


def qemu_problem(path: Path) -> str | None:
    result = run("qemu-img", "info", "-f", "qcow2", path)
    prefix = f"qemu-img: Could not open '{path}': "
    assert result.returncode == 0 or result.stderr.startswith(prefix), result.stderr
    return None if result.returncode == 0 else result.stderr.removeprefix(prefix).rstrip("\n")


@needs_qemu
@pytest.mark.parametrize("values", BAD + GOOD, ids=str)
def test_fields_are_judged_as_by_qemu(plain: bytes, tmp_path: Path, values: dict[str, int]) -> None:
    path = tmp_path / "edited.qcow2"
    path.write_bytes(edit(plain, values))
    expected = qemu_problem(path)
    assert problem(path) == expected
    assert (expected is None) == (values in GOOD)


@needs_qemu
@pytest.mark.parametrize(("extension", "values"), EXTENSIONS)
def test_extensions_are_judged_as_by_qemu(
    plain: bytes, tmp_path: Path, extension: bytes, values: dict[str, int]
) -> None:
    path = tmp_path / "edited.qcow2"
    path.write_bytes(edit(plain[:112] + extension.ljust(600, b"\0") + plain[712:], values))
    assert problem(path) == qemu_problem(path)


@needs_qemu
@pytest.mark.parametrize("length", [0, 3, 4, 7, 71, 72, 103, 104, 111, 113, 200, 511, 512])
def test_truncated_header_is_judged_as_by_qemu(plain: bytes, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.qcow2"
    path.write_bytes(plain[:length])
    if length in (4, 7):  # the version number is cut as well: any message will do
        assert problem(path) is not None
    else:
        assert problem(path) == qemu_problem(path)


@pytest.mark.parametrize(
    ("bits", "error"), [(1, UnsupportedError), (2, FormatError)], ids=["dirty", "corrupt"]
)
def test_marked_images_are_read_but_written_for_repair_only(
    plain: bytes, tmp_path: Path, bits: int, error: type[DriverError]
) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(edit(plain, {"incompatible": bits}))
    assert open_image(FS.open(str(path))).size == 10 << 20
    with pytest.raises(error) as caught:
        open_image(FS.open(str(path), write=True), write=True)
    if bits == 2:
        assert "qcow2: Image is corrupt; cannot be opened read/write" in str(caught.value)
    image = open_image(FS.open(str(path), write=True), write=True, repair=True)
    assert image.header.is_dirty == (bits == 1) and image.header.is_corrupt == (bits == 2)


@pytest.mark.parametrize(
    "values", [{"l1_offset": 1 << 40}, {"table_offset": 1 << 30}, {"l1_offset": 65536}, {"table_clusters": 3}]
)
def test_overlapping_or_missing_tables_are_not_written_to(
    plain: bytes, tmp_path: Path, values: dict[str, int]
) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(edit(plain, values))
    file = FS.open(str(path), write=True)
    with pytest.raises(FormatError):
        open_image(file, write=True)


def test_serialise_gives_back_what_was_parsed(plain: bytes) -> None:
    assert serialise(parse_header_cluster(plain[:65536], "x")) == plain[:65536]


@needs_qemu
def test_everything_unknown_survives(plain: bytes, tmp_path: Path) -> None:
    """Longer header, unknown compatible bits and unknown extensions are kept; a backing file is put behind
    them."""
    extensions = serialise_extension(Extension(0x11223344, b"keep me")) + bytes(8)
    data = edit(plain, {"length": 128, "compatible": 1 << 40})
    data = data[:112] + b"\x01\x02\x03\x04" * 4 + extensions.ljust(600, b"\0") + data[728:]
    header = parse_header_cluster(data[:65536], "x")
    assert header.extensions == (Extension(0x11223344, b"keep me"),)
    assert header.unknown_fields[-16:] == b"\x01\x02\x03\x04" * 4
    backed = header._replace(backing_file="base").with_extension(
        Extension(EXT_BACKING_FORMAT, b"raw"), EXT_BACKING_FORMAT
    )
    out = serialise(backed)
    again = parse_header_cluster(out, "x")
    assert again.backing_file == "base" and again.backing_format == "raw"
    assert again.compatible_features == 1 << 40 and again.unknown_fields == header.unknown_fields
    (tmp_path / "image.qcow2").write_bytes(out + plain[65536:])
    assert "backing file: base" in qemu_img("info", tmp_path / "image.qcow2")


@given(
    name=st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1,
                             max_size=80),
    extensions=st.lists(st.tuples(st.integers(0x70000000, 0x7FFFFFFF), st.binary(max_size=50)), max_size=4),
    cluster_bits=st.integers(10, 21),
    version=st.sampled_from([2, 3]),
    compression=st.sampled_from([0, 1]),
)
def test_headers_round_trip(
    name: str | None, extensions: list[tuple[int, bytes]], cluster_bits: int, version: int, compression: int
) -> None:
    size = 1 << cluster_bits
    v3 = version == 3
    header = Header(
        version=version, backing_file_offset=0, backing_file_size=0, cluster_bits=cluster_bits,
        size=12345 * 512,
        crypt_method=0, l1_size=12345, l1_table_offset=3 * size, refcount_table_offset=size,
        refcount_table_clusters=1, nb_snapshots=0, snapshots_offset=0,
        incompatible_features=8 if compression and v3 else 0, compression_type=compression if v3 else 0,
        header_length=112 if v3 else 72, unknown_fields=bytes(7) if v3 else b"", backing_file=name,
        extensions=tuple(Extension(kind, data) for kind, data in extensions),
    )
    try:
        data = serialise(header)
    except FormatError:
        assert cluster_bits == 10
        return
    parsed = parse_header_cluster(data, "x")
    assert len(data) == size
    assert parsed._replace(backing_file_offset=0, backing_file_size=0) == header
    assert serialise(parsed) == data
