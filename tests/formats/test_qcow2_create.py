from __future__ import annotations

import os
from pathlib import Path

import pytest
from qcow2_images import FS, needs_qemu, open_path, qemu_check, qemu_img, run
from safeimg.drivers.errors import DriverError, FormatError, UsageError
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.formats.chain import OpenError, open_chain
from safeimg.drivers.formats.options import parse_size
from safeimg.drivers.formats.qcow2.create import create, finish_patch
from safeimg.drivers.formats.qcow2.driver import driver
from safeimg.drivers.storage.simulated import SimulatedFileSystem

CLUSTER_SIZES = ("512", "1k", "2k", "4k", "8k", "64k", "2M")
OPTIONS: tuple[dict[str, str], ...] = (
    {}, {"compat": "0.10"}, {"refcount_bits": "1"}, {"refcount_bits": "64"}, {"nocow": "on"},
    {"lazy_refcounts": "on", "compression_type": "zstd"}, {"backing_file": "base", "backing_fmt": "raw"},
    {"compat": "v2", "backing_file": "base", "backing_fmt": "raw"},
)
BAD: tuple[dict[str, str], ...] = (
    {"cluster_size": "3k"}, {"cluster_size": "abc"}, {"cluster_size": ""}, {"cluster_size": "1.5k"},
    {"cluster_size": "4M"}, {"cluster_size": "256"}, {"cluster_size": "1e3"}, {"cluster_size": "512 "},
    {"refcount_bits": "3"}, {"refcount_bits": "abc"}, {"refcount_bits": "-1"}, {"refcount_bits": "0"},
    {"compat": "0.10", "refcount_bits": "8"}, {"compat": "2.0"}, {"compat": "0.10", "lazy_refcounts": "on"},
    {"lazy_refcounts": "maybe"}, {"compat": "0.10", "compression_type": "zstd"}, {"compression_type": "lzma"},
    {"preallocation": "foo"}, {"foo": "1"}, {"data_file_raw": "on"}, {"backing_fmt": "raw"},
    {"backing_file": "x" * 1024, "backing_fmt": "raw"},
    {"backing_file": "x" * 500, "backing_fmt": "raw", "cluster_size": "512"},
    {"backing_file": "base", "backing_fmt": "raw", "preallocation": "full"},
    {"extended_l2": "on", "cluster_size": "8k"}, {"extended_l2": "on", "compat": "0.10"}, {"extended_l2": "foo"},
    {"extended_l2": "on", "cluster_size": "4k", "refcount_bits": "3", "compression_type": "lzma"},
    {"extended_l2": "on", "compat": "0.10", "cluster_size": "4k", "lazy_refcounts": "on"},
)
ODD: tuple[dict[str, str], ...] = (
    {"cluster_size": "0x1000"}, {"cluster_size": " 512"}, {"cluster_size": "512.0"}, {"cluster_size": "512b"},
    {"cluster_size": "0.5k"}, {"cluster_size": "1.0001k"}, {"cluster_size": ".5k"}, {"refcount_bits": "0x10"},
    {"refcount_bits": "020"}, {"refcount_bits": " 8"}, {"refcount_bits": "8k"}, {"extended_l2": "off"},
    {"lazy_refcounts": "yes"}, {"lazy_refcounts": "false"}, {"compat": "1.1"}, {"compat": "v3"},
)


def qemu_create(path: Path, size: int, options: dict[str, str]) -> str | None:
    """qemu-img's image; or its complaint, without the name of the program."""
    text = ",".join(f"{name}={value}" for name, value in options.items())
    asked = ("-o", text) if text else ()
    result = run("qemu-img", "create", "-q", "-u", "-f", "qcow2", *asked, path, str(size))
    return None if result.returncode == 0 else result.stderr.removeprefix("qemu-img: ").rstrip("\n")


def our_create(path: Path, size: int, options: dict[str, str]) -> str | None:
    try:
        create(FS, str(path), size, options)
    except DriverError as error:
        return str(error)
    return None


@needs_qemu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_images_are_byte_for_byte_those_of_qemu(
    tmp_path: Path, cluster_size: str, options: dict[str, str]
) -> None:
    (tmp_path / "base").touch()
    path = tmp_path / "image.qcow2"
    for size in (0, 1000, 10 << 20):
        asked = {"cluster_size": cluster_size, **options}
        assert qemu_create(path, size, asked) is None
        expected = path.read_bytes()
        assert our_create(path, size, asked) is None
        assert path.read_bytes() == expected


@needs_qemu
@pytest.mark.parametrize("cluster_size", ["16k", "64k", "2M"])
def test_images_with_extended_l2_entries_too(tmp_path: Path, cluster_size: str) -> None:
    test_images_are_byte_for_byte_those_of_qemu(
        tmp_path, cluster_size, {"extended_l2": "on", "backing_file": "base", "backing_fmt": "raw"}
    )


@needs_qemu
@pytest.mark.parametrize("options", BAD + ODD, ids=lambda options: str(options)[:60])
def test_options_are_judged_as_by_qemu(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "image.qcow2"
    expected = qemu_create(path, 1 << 20, options)
    assert our_create(path, 1 << 20, options) == expected
    assert expected is not None or options in ODD


@needs_qemu
@pytest.mark.parametrize(("size", "cluster_size"), [(1 << 60, "64k"), (129 << 30, "512"), (3 << 60, "2M")])
def test_sizes_that_are_too_large(tmp_path: Path, size: int, cluster_size: str) -> None:
    path = tmp_path / "image.qcow2"
    expected = qemu_create(path, size, {"cluster_size": cluster_size})
    assert expected is not None and our_create(path, size, {"cluster_size": cluster_size}) == expected


@needs_qemu
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "size"),
    [("512", "1", 3 << 20), ("512", "64", 3 << 20), ("4k", "2", 40 << 20), ("64k", "16", (600 << 20) + 512),
     ("2M", "4", 100 << 20)],
)
def test_preallocation(tmp_path: Path, mode: str, cluster_size: str, refcount_bits: str, size: int) -> None:
    if mode != "metadata":
        size = min(size, 5 << 20)
    path = tmp_path / "image.qcow2"
    create(FS, str(path), size, {"cluster_size": cluster_size, "refcount_bits": refcount_bits,
                                 "preallocation": mode})
    result, messages = qemu_check(path)
    assert result is not None and not messages
    assert result["allocated-clusters"] == result["total-clusters"]
    image = open_path(path)
    assert {extent.kind for extent in image.extents(0, image.size)} == {Kind.DATA}
    if mode != "metadata":
        assert image.file.stat().allocated >= size
    image.close()


@needs_qemu
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("backed", [False, True])
def test_preallocated_clusters_have_places_and_nothing_in_them(tmp_path: Path, mode: str, backed: bool) -> None:
    """With extended L2 entries a preallocated cluster is not allocated: a backing image shows through it."""
    (tmp_path / "base").write_bytes(b"\1" * (3 << 20))
    options = {"extended_l2": "on", "cluster_size": "16k", "preallocation": mode}
    options |= {"backing_file": "base", "backing_fmt": "raw"} if backed else {}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert qemu_create(theirs, 20 << 20, options) is None
    assert our_create(ours, 20 << 20, options) is None
    result, messages = qemu_check(ours)
    expected, _ = qemu_check(theirs)
    assert result is not None and expected is not None and not messages
    assert result["allocated-clusters"] == expected["allocated-clusters"] == result["total-clusters"]
    qemu_img("compare", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    image = open_path(ours)
    extents = list(image.extents(0, image.size))
    assert {extent.kind for extent in extents} == {Kind.UNALLOCATED}
    assert all(extent.offset is not None for extent in extents)
    if mode != "metadata":
        assert image.file.stat().allocated >= 20 << 20
    image.close()


@needs_qemu
def test_many_l2_tables_need_several_refcount_blocks(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create(FS, str(path), 1 << 40, {"preallocation": "metadata", "cluster_size": "2M", "refcount_bits": "64"})
    image = open_path(path)
    assert image.header.refcount_table_clusters == 1
    assert sum(extent.length for extent in image.extents(0, 1 << 40) if extent.kind is Kind.DATA) == 1 << 40
    result, messages = qemu_check(path)
    assert result is not None and not messages
    image.close()


def test_the_file_that_is_there_keeps_its_inode(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes(b"old" * 100000)
    inode = path.stat().st_ino
    create(FS, str(path), 1 << 20, {})
    assert path.stat().st_ino == inode
    image = open_path(path)
    assert [extent.kind for extent in image.extents(0, 1 << 20)] == [Kind.UNALLOCATED]
    image.close()


# Unfinished images

FENCED = (
    {}, {"compat": "v2"}, {"backing_file": "base", "backing_fmt": "raw"},
    {"backing_file": "sub/" + "b" * 200},
    {"compat": "v2", "backing_file": "base", "backing_fmt": "raw"},
    {"lazy_refcounts": "on", "compression_type": "zstd"}, {"preallocation": "metadata"},
    {"backing_file": "x" * 1023, "backing_fmt": "qcow2", "cluster_size": "2k"},
)


@needs_qemu
@pytest.mark.parametrize("options", FENCED, ids=lambda options: str(options)[:60])
@pytest.mark.parametrize("cluster_size", ["512", "1k", "4k", "8k", "2M"])
def test_unfinished_images_are_refused_until_one_sector_is_written(
    tmp_path: Path, cluster_size: str, options: dict[str, str]
) -> None:
    path, normal = tmp_path / "image.qcow2", tmp_path / "normal.qcow2"
    options = {"cluster_size": cluster_size, **options}
    is_v2 = options.get("compat") == "v2"
    create(FS, str(path), 5 << 20, options, unfinished="convert")
    create(FS, str(normal), 5 << 20, options)
    message = "Unsupported qcow2 feature(s): unfinished safeimg"
    refused = run("qemu-img", "info", path).stderr
    assert ("Unsupported qcow2 version" if is_v2 else f"{message} convert") in refused
    with pytest.raises(OpenError, match="unfinished safeimg"):
        open_chain(FS, str(path))
    image = open_path(path, write=True, repair=True)
    assert image.size == 5 << 20 and image.header.version == (2 if is_v2 else 3)
    assert image.backing_file == options.get("backing_file")
    before = path.read_bytes()
    (patch,) = driver.unfence(image)
    assert patch.offset == 0 and len(patch.after) == 512 and patch.before == before[:512]
    image.file.pwrite(0, patch.after)
    image.close()
    finished, expected = open_path(path), open_path(normal)
    assert (finished.header.extensions, finished.header.backing_file, finished.header.version) == (
        expected.header.extensions, expected.header.backing_file, expected.header.version
    )
    if "backing_file" not in options or int(parse_size(options["cluster_size"]) or 0) >= 8192:
        assert path.read_bytes() == normal.read_bytes()
    if "backing_file" in options:
        assert f"backing file: {options['backing_file']}" in qemu_img("info", path)
    else:
        result, messages = qemu_check(path)
        assert result is not None and not messages


def test_finishing_keeps_what_was_switched_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create(FS, str(path), 5 << 20, {}, unfinished="convert")
    data = bytearray(path.read_bytes())
    data[40:48] = (0x50000).to_bytes(8, "big")
    path.write_bytes(data)
    patch = finish_patch(FS.open(str(path)))
    assert patch.after[40:48] == data[40:48]


def test_only_untouched_unfinished_images_are_finished(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create(FS, str(path), 5 << 20, {})
    with pytest.raises(FormatError, match="not an unfinished one"):
        finish_patch(FS.open(str(path)))
    create(FS, str(path), 5 << 20, {}, unfinished="convert")
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"x")
    with pytest.raises(FormatError, match="not as safeimg left it"):
        finish_patch(FS.open(str(path)))


def test_a_name_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    with pytest.raises(UsageError):
        create(FS, str(path), 1 << 20, {"cluster_size": "512", "backing_file": "x" * 400})
    assert not os.path.lexists(path)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_first_sector_comes_last(options: dict[str, str]) -> None:
    """The header may be longer; a power cut never leaves a header without what it tells of."""
    fs = SimulatedFileSystem()
    fs.begin_trace()
    create(fs, "/new.qcow2", 5 << 20, options)
    *before, synced, last = fs.trace.entries
    assert (synced.kind, last.kind, last.offset, len(last.data)) == ("sync", "write", 0, 512)
    assert all(entry.kind != "write" or entry.offset >= 512 for entry in before)
