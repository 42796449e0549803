"""convert: what arrives in the target, whatever the source, the target and the options; killed and continued.

A plain applier plays the engine here: it writes what each step says, in the order of the protocol."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safeimg.drivers.errors import DriverError, StorageError, UsageError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.digest import digests
from safeimg.drivers.transfer.view import LayerExtent, View
from safeimg.ops.convert import open_job
from safeimg.ops.convert_job import job_of
from safeimg.ops.convert_options import Options
from safeimg.ops.convert_plan import Rules, chunks
from safeimg.ops.convert_steps import join_moves
from safeimg.ops.launch import Job
from safeimg.ops.steps import Move, Step

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None or shutil.which("qemu-io") is None,
                                reason="qemu-img and qemu-io are not installed")
KIB, MIB = 1 << 10, 1 << 20
FS = LocalFileSystem()


def qemu_img(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)


def qemu_io(path: Path, *commands: str, format: str = "qcow2") -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", format, *words, str(path)], check=True, capture_output=True)


def apply(step: Step, job: Job) -> None:
    files = job.files
    for written in step.fresh:
        stored = files[written.image].pread(written.offset, written.length)
        assert digests(stored) == written.digests
    for image, changes in step.changes:
        if changes.length is not None and changes.length > files[image].length():
            files[image].truncate(changes.length)
        for patch in changes.allocate:
            files[image].pwrite(patch.offset, patch.after)
    for move in step.moves:
        content = bytearray(move.length)
        if move.source is not None:
            assert job.view is not None
            job.view.read_into(move.source, memoryview(content))
        files[move.image].pwrite(move.offset, content)
    for image, changes in step.changes:
        for patch in changes.link:
            assert patch.before is None or files[image].pread(patch.offset, len(patch.before)) == patch.before
            files[image].pwrite(patch.offset, patch.after)


def run(job: Job, cursor: Any = None, *, stop: int | None = None) -> list[Step]:
    """The steps applied; `stop`: how many at most, as if killed in the middle of the next."""
    made: list[Step] = []

    async def main() -> None:
        steps = job.operation.steps(cursor)
        async for step in steps:
            if stop is not None and len(made) == stop:
                await steps.aclose()  # type: ignore[attr-defined]
                return
            apply(step, job)
            made.append(step)
        for image, patch in job.operation.finish():
            job.files[image].pwrite(patch.offset, patch.after)

    trio.run(main)
    return made


def convert(options: Options, **how: Any) -> list[Step]:
    transfer = Transfer(Settings(**how))
    job = open_job(FS, options, transfer)
    try:
        steps = run(job)
        assert transfer.progress.done + sum(move.length for step in steps for move in step.moves
                                            if move.source is not None) == transfer.progress.total
        return steps
    finally:
        job.close()


def content(path: Path, format: str) -> bytes:
    chain = open_chain(FS, str(path), format=format)
    try:
        view = View(chain)
        found = bytearray(view.size)
        view.read_into(0, memoryview(found))
        return bytes(found)
    finally:
        close_chain(chain)


def kinds(path: Path) -> list[tuple[int, int, Kind]]:
    """The extents of the image itself."""
    chain = open_chain(FS, str(path), format="qcow2")
    try:
        return [(each.start, each.length, each.kind) for each in chain[0].extents(0, chain[0].size)]
    finally:
        close_chain(chain)


def accepted(path: Path, expected: bytes, tmp_path: Path) -> None:
    """qemu-img finds nothing wrong with the image, and reads the same."""
    if shutil.which("qemu-img") is None:
        return
    checked = qemu_img("check", "-f", "qcow2", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    reference = tmp_path / "reference.raw"
    reference.write_bytes(expected)
    compared = qemu_img("compare", "-f", "raw", "-F", "qcow2", reference, path)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def patchwork(path: Path, size: int, seed: int = 1) -> bytes:
    """A raw image with data, zeroes that are written, holes, and runs that fit nothing."""
    draw = random.Random(seed)
    made = bytearray(size)
    at = 0
    while at < size:
        length = draw.choice((512, 4096, 5000, 65536, 70000, 300000))
        kind = draw.randrange(3)
        if kind == 0:
            made[at : at + length] = draw.randbytes(length)[: max(0, size - at)]
        elif kind == 1:
            made[at : at + length] = (bytes([draw.randrange(1, 256)]) * length)[: max(0, size - at)]
        at += length
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 4096):
            part = made[start : start + 4096]
            if part.strip(b"\0") or draw.random() < 0.3:
                file.seek(start)
                file.write(part)
    return bytes(made)


def to(
    target: Path, *sources: Path, format: str = "qcow2", create_options: Mapping[str, str] | None = None, **more: Any
) -> Options:
    """With steps small enough that there are several."""
    more.setdefault("step_bytes", 512 * KIB)
    options = spelled(create_options or {})
    return Options(tuple(map(str, sources)), str(target), target_format=format, create_options=options, **more)


def spelled(options: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in options.items()]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("options", [
    {}, {"cluster_size": "512"}, {"cluster_size": "2M"}, {"compat": "0.10"}, {"refcount_bits": "1"},
    {"preallocation": "metadata"}, {"preallocation": "falloc"},
])
def test_raw_to_qcow2_and_back(tmp_path: Path, options: dict[str, str], workers: int) -> None:
    source, target, back = tmp_path / "a.raw", tmp_path / "b.qcow2", tmp_path / "c.raw"
    expected = patchwork(source, 3 * MIB + 512 * 7)
    steps = convert(to(target, source, create_options=options),
                    workers=workers)
    assert steps and all(step.cursor["at"] == step.done for step in steps)
    assert content(target, "qcow2") == expected
    accepted(target, expected, tmp_path)
    convert(to(back, target, format="raw"), workers=workers)
    assert back.read_bytes() == expected


@pytest.mark.parametrize("options", [{}, {"cluster_size": "4k"}, {"compression_type": "zstd"},
                                     {"cluster_size": "2M", "compression_type": "zstd"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_compressed(tmp_path: Path, options: dict[str, str], workers: int) -> None:
    source, target, back = tmp_path / "a.raw", tmp_path / "b.qcow2", tmp_path / "c.qcow2"
    expected = patchwork(source, 3 * MIB + 512)
    convert(to(target, source, create_options=options, compress=True), workers=workers)
    assert content(target, "qcow2") == expected
    found = {kind for _, _, kind in kinds(target)}
    assert Kind.COMPRESSED in found
    if options.get("cluster_size") != "2M":
        assert Kind.DATA in found  # clusters of random bytes get no smaller
    accepted(target, expected, tmp_path)
    convert(to(back, target, create_options={"cluster_size": "512"}), workers=workers)
    assert content(back, "qcow2") == expected


def test_windows_of_compressed_clusters(tmp_path: Path) -> None:
    """What recurs 5000 bytes further is found with 32 KiB; QEMU reads that, as whoever inflates a cluster at once."""
    source, small, large = tmp_path / "a.raw", tmp_path / "b.qcow2", tmp_path / "c.qcow2"
    expected = b"".join((random.Random(seed).randbytes(5000) * 27)[: 128 * KIB] for seed in range(4))
    source.write_bytes(expected)
    convert(to(small, source, compress=True))
    convert(to(large, source, compress=True, window=32 * KIB))
    assert small.stat().st_size > len(expected) > 1.5 * (large.stat().st_size - 5 * 64 * KIB)  # less the metadata
    assert content(large, "qcow2") == expected
    accepted(large, expected, tmp_path)


@pytest.mark.parametrize("create", [True, False])
def test_only_deflate_has_windows(tmp_path: Path, create: bool) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    patchwork(source, MIB)
    zstd = {"create_options": {"compression_type": "zstd"}}
    if not create:
        convert(to(target, source, **zstd))
    more: dict[str, Any] = zstd if create else {"create": False}
    with pytest.raises(UsageError, match="--window is for compression_type=zlib"):
        convert(to(target, source, compress=True, window=32 * KIB, **more))


def test_zeroes_are_left_out_at_the_target_granularity(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    source.write_bytes(bytes(64 * KIB) + b"x" + bytes(192 * KIB - 1) + b"y" * 64 * KIB)
    convert(to(target, source))
    unit = 64 * KIB
    assert kinds(target) == [(0, unit, Kind.UNALLOCATED), (unit, unit, Kind.DATA),
                             (2 * unit, 2 * unit, Kind.UNALLOCATED), (4 * unit, unit, Kind.DATA)]


@pytest.mark.parametrize(("sparse", "blocks"), [(None, 8), (0, 64), (512, 1), (64 * KIB, 128), (6 * KIB, 12)])
def test_sparse_size(tmp_path: Path, sparse: int | None, blocks: int) -> None:
    """One sector of data, 24 KiB of zeroes behind 4 KiB, and longer ones: what is written to the new file."""
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    made = bytearray(64 * 4096)
    made[0] = 1
    made[7 * 4096] = 2
    source.write_bytes(made)
    steps = convert(to(target, source, format="raw", sparse=sparse))
    assert target.read_bytes() == made
    written = sum(each.length for step in steps for each in step.fresh)
    expected = {None: 8192, 0: 64 * 4096, 512: 1024, 64 * KIB: 16 * 4096, 6 * KIB: 8192}[sparse]
    assert written == expected, blocks


@needs_qemu
@pytest.mark.parametrize("options", [["-S4k"], ["-S8k"], ["-S64k"], ["-S512"], ["-c", "-S8k"], ["-S0"]])
def test_what_is_allocated_is_what_qemu_allocates(tmp_path: Path, options: list[str]) -> None:
    """Data and zeroes that begin and end anywhere, in an image of small clusters."""
    source = tmp_path / "a.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=512", source, "1M")
    random_ = random.Random(5)
    at, commands = 0, []
    while at < MIB - 64 * KIB:
        length = 512 * random_.choice((1, 2, 3, 5, 8, 20, 40))
        if fill := random_.choice(("", "-P 0", "-P 0", "-P 7")):
            commands.append(f"write {fill} {at} {length}")
        at += length
    qemu_io(source, *commands)
    small = ["-o", "cluster_size=512", "-O", "qcow2"]
    qemu_img("convert", *options, *small, source, tmp_path / "theirs")
    asked = {"sparse": {"-S512": 512, "-S0": 0}.get(options[-1], KIB * int(options[-1][2:].rstrip("k") or 0)),
             "compress": "-c" in options, "create_options": {"cluster_size": "512"}}
    convert(to(tmp_path / "ours", source, **asked))

    def data(name: str) -> list[tuple[int, int]]:
        found = json.loads(qemu_img("map", "--output=json", tmp_path / name).stdout)
        spans: list[tuple[int, int]] = []
        for start, end in ((each["start"], each["start"] + each["length"]) for each in found if each["data"]):
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, end))
        return spans

    assert data("ours") == data("theirs")
    assert qemu_img("compare", source, tmp_path / "ours").returncode == 0


def test_everything_allocated(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    with source.open("wb") as file:
        file.truncate(2 * MIB)
    convert(to(target, source, sparse=0))
    assert {kind for _, _, kind in kinds(target)} == {Kind.DATA}


def test_sources_joined(tmp_path: Path) -> None:
    one, two, target = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "c.qcow2"
    expected = patchwork(one, 300 * 512, 1) + patchwork(two, 2 * MIB + 512, 2)
    convert(to(target, one, two, source_format="raw"))
    assert content(target, "qcow2") == expected


def test_killed_at_any_step_and_continued(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    expected = patchwork(source, 6 * MIB + 512)
    options = to(target, source, create_options={"cluster_size": "4k"},
                      compress=True)
    steps = convert(options, workers=1)
    assert len(steps) > 4
    for stop in range(len(steps)):
        target.unlink()
        first = open_job(FS, options, Transfer(Settings(workers=1)))
        done = run(first, stop=stop)
        first.close()
        unlinked = [each for step in done for _, changes in step.changes for each in changes.unlinked]
        layers = [*open_chain(FS, str(target), write=True, repair=True), *open_chain(FS, str(source))]
        second = job_of(layers, dict(first.settings), Transfer(Settings(workers=2)), unlinked=unlinked)
        run(second, done[-1].cursor if done else None)
        second.close()
        assert content(target, "qcow2") == expected
        accepted(target, expected, tmp_path)


def test_one_worker_is_deterministic(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    patchwork(source, 2 * MIB)
    options = to(target, source)
    assert convert(options, workers=1) == convert(options, workers=1)


@needs_qemu
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_backing_file(tmp_path: Path, compat: str) -> None:
    """What the source's top layer lacks is not copied; what it has as zeroes hides the target's backing
    image."""
    base, middle, top, target = (tmp_path / name for name in ("base.raw", "mid.qcow2", "top.qcow2", "new"))
    patchwork(base, 2 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", middle)
    qemu_io(middle, "write -P 2 512k 256k")
    qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "3M")
    qemu_io(top, "write -P 3 1M 64k", "write -z 576k 64k", "write -P 0 128k 64k", "write -P 5 2500k 10k")
    convert(to(target, top, backing=str(middle), backing_format="qcow2",
                    create_options={"compat": compat}))
    expected = content(top, "qcow2")
    assert content(target, "qcow2") == expected
    accepted(target, expected, tmp_path)
    allocated = [(start, length) for start, length, kind in kinds(target) if kind is not Kind.UNALLOCATED]
    for start, length in allocated:
        assert start in (128 * KIB, 576 * KIB, 1 * MIB, 2496 * KIB) and length == 64 * KIB


@needs_qemu
@pytest.mark.parametrize(("below", "own"), [("512k", "3M"), ("3M", "512k")])
def test_backing_files_of_other_sizes(tmp_path: Path, below: str, own: str) -> None:
    """Beyond the end of either backing image they differ, whatever the user promised about their content."""
    old, new, top, target = (tmp_path / name for name in ("old.raw", "new.raw", "top.qcow2", "target.qcow2"))
    for path, size in ((old, below), (new, own)):
        qemu_img("create", "-q", "-f", "raw", path, size)
        qemu_io(path, f"write -P 7 0 {size}", format="raw")
    qemu_img("create", "-q", "-f", "qcow2", "-b", old, "-F", "raw", top, "3M")
    convert(to(target, top, backing=str(new), backing_format="raw"))
    expected = content(top, "qcow2")
    assert content(target, "qcow2") == expected
    accepted(target, expected, tmp_path)


@needs_qemu
@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_into_an_existing_image(tmp_path: Path, format: str, undo: bool) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.img"
    expected = patchwork(source, 2 * MIB + 1024)
    qemu_img("create", "-q", "-f", format, target, "3M")
    qemu_io(target, "write -P 9 0 1500k", "write -P 8 2000k 900k", format=format)
    if format == "qcow2":
        qemu_io(target, "write -c -P 7 1536k 64k", "discard 256k 128k")
    rest = content(target, format)[len(expected) :]
    steps = convert(to(target, source, format=format, create=False, undo=undo))
    assert content(target, format) == expected + rest
    assert any(step.moves for step in steps) is undo
    if format == "qcow2":
        assert steps[0].name == "fence"
        accepted(target, expected + rest, tmp_path)


@needs_qemu
def test_existing_clusters_shared_with_a_snapshot_stay(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.qcow2"
    expected = patchwork(source, 2 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", target, "2M")
    qemu_io(target, "write -P 9 0 2M")
    qemu_img("snapshot", "-c", "before", target)
    convert(to(target, source, create=False))
    assert content(target, "qcow2") == expected
    accepted(target, expected, tmp_path)
    assert qemu_img("snapshot", "-a", "before", target).returncode == 0
    assert content(target, "qcow2") == bytes([9]) * (2 * MIB)


@needs_qemu
def test_a_target_that_is_zero_needs_no_zeroes(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    source.write_bytes(bytes(MIB) + b"x" * 4096)
    target.write_bytes(b"\xee" * (MIB + 4096))
    convert(to(target, source, format="raw", create=False, target_is_zero=True))
    assert target.read_bytes() == b"\xee" * MIB + b"x" * 4096


def test_a_step_ends_when_its_time_is_up(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    source.write_bytes(b"x" * (2 * MIB))
    steps = convert(to(target, source, format="raw", step_seconds=0.0), workers=1)
    assert [step.cursor["at"] for step in steps] == [MIB // 2, MIB, 3 * MIB // 2, 2 * MIB]
    steps = convert(to(target, source, format="raw"), workers=1)
    assert len(steps) == 4  # of as many bytes as they may have


@pytest.mark.parametrize(("options", "message"), [
    ({"compress": True, "copy_offload": True}, "Cannot enable copy offloading when -c is used"),
    ({"sparse": 4096, "copy_offload": True}, "Cannot enable copy offloading when -S is used"),
    ({"target_is_zero": True}, "--target-is-zero requires use of -n flag"),
    ({"create": False, "create_options": ["size=3"]}, "-o has no effect when skipping image creation"),
    ({"target_format": "foo"}, "Unknown file format 'foo'"),
    ({"source_format": "foo"}, "Could not open 'a.raw': Unknown driver 'foo'"),
    ({"sources": ("nope",)}, "Could not open 'nope': Could not open 'nope': No such file or directory"),
    ({"compress": True}, "Compression not supported for this file format"),
    ({"create": False, "target": "nope"},
     "Could not open 'nope': Could not open 'nope': No such file or directory"),
    ({"create": False, "target": "small.raw"}, "output file is smaller than input file"),
    ({"backing": "a.raw", "target_format": "qcow2"}, "Use of backing file requires explicit backing format"),
    ({"backing": "a.raw", "backing_format": "raw"}, "Backing file not supported for file format 'raw'"),
    ({"backing": "a.raw", "backing_format": "raw", "target_format": "qcow2", "sources": ("a.raw", "a.raw")},
     "Having a backing file for the target makes no sense when concatenating multiple input images"),
    ({"create_options": ["foo=1"]}, "Invalid parameter 'foo'"),
    ({"target": "no/x"},
     "no/x: error while converting raw: Could not create 'no/x': No such file or directory"),
    ({"target": "a.raw"}, 'a.raw: error while converting raw: Failed to get "write" lock\n'
                          "Is another process using the image [a.raw]?"),
    ({"compress": True, "target_format": "qcow2", "create_options": ["preallocation=full"]},
     "Compression and preallocation not supported at the same time"),
])
def test_refused_in_qemu_imgs_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any],
                                    message: str) -> None:
    monkeypatch.chdir(tmp_path)
    expected = patchwork(tmp_path / "a.raw", MIB)
    (tmp_path / "small.raw").write_bytes(bytes(512))
    with pytest.raises(DriverError) as raised:
        open_job(FS, Options(**{"sources": ("a.raw",), "target": "new", **options}), Transfer())
    assert str(raised.value) == message
    assert (tmp_path / "a.raw").read_bytes() == expected
    assert not (tmp_path / "new").exists()
    if shutil.which("qemu-img") is not None:
        words = _words(options)
        theirs = qemu_img("convert", *words)
        assert theirs.returncode == 1
        assert theirs.stderr == f"qemu-img: {message}\n"


def _words(options: dict[str, Any]) -> list[str]:
    flags: dict[str, Callable[[Any], Sequence[str]]] = {
        "compress": lambda _: ["-c"], "copy_offload": lambda _: ["-C"], "sparse": lambda size: [f"-S{size}"],
        "target_is_zero": lambda _: ["--target-is-zero"], "create": lambda _: ["-n"],
        "create_options": lambda asked: [f"-o{text}" for text in asked],
        "target_format": lambda name: ["-O", name], "source_format": lambda name: ["-f", name],
        "backing": lambda name: ["-B", name], "backing_format": lambda name: ["-F", name],
    }
    words = [word for name, value in options.items() if name in flags for word in flags[name](value)]
    return [*words, *options.get("sources", ("a.raw",)), options.get("target", "new")]


def test_a_failed_read_ends_it_with_the_source_named(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    patchwork(source, MIB)
    job = open_job(FS, to(target, source, format="raw"), Transfer())
    file = job.layers[1].file

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def pread_into(self, offset: int, buffer: memoryview) -> int:
            raise StorageError(file.path, "read", OSError(5, os.strerror(5)))

    job.layers[1]._file = Broken()  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=r"a\.raw: read: Input/output error"):
        run(job)
    job.close()


class Pieces:
    """A source that is only a map: (length, layer, kind)."""

    def __init__(self, runs: Sequence[tuple[int, int, Kind]]) -> None:
        self.size = sum(length for length, _, _ in runs)
        self._runs = runs

    def extents(self, start: int, length: int):  # type: ignore[no-untyped-def]
        at = 0
        for size, layer, kind in self._runs:
            low, high = max(at, start), min(at + size, start + length)
            if low < high:
                yield LayerExtent(layer, Extent(low, high - low, kind, None))
            at += size

    def read_pieces(self, pieces: Any, start: int, buffer: memoryview) -> None:
        raise AssertionError

    def read_into(self, start: int, buffer: memoryview) -> None:
        raise AssertionError


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from((1, 3, 8, 9, 64, 700)), st.integers(0, 2),
                       st.sampled_from((Kind.DATA, Kind.ZERO))), max_size=12),
    st.sampled_from((1, 8)), st.integers(0, 200), st.integers(0, 200), st.booleans(), st.integers(0, 20),
)
def test_every_byte_meets_its_fate(runs: list[tuple[int, int, Kind]], unit: int, zero_below: int,
                                   skip_below: int, everything: bool, resumed: int) -> None:
    source = Pieces(runs)
    rules = Rules(unit, 16, everything, min(zero_below, source.size), min(skip_below, source.size))
    whole = list(chunks(source, 0, rules))
    start = whole[resumed].start if resumed < len(whole) else 0
    found = list(chunks(source, start, rules))
    assert [chunk.ticket for chunk in found] == list(range(len(found)))
    at = start
    fate = ["?"] * source.size
    for chunk in found:
        assert chunk.start == at and chunk.length > 0
        at += chunk.length
        assert not chunk.copy or chunk.length <= rules.window
        for kind, spans in (("copy", chunk.copy), ("zero", chunk.zero)):
            for low, high in spans:
                assert chunk.start <= low < high <= at
                assert low % unit == 0 and (high % unit == 0 or high == source.size)
                assert set(fate[low:high]) == {"?"}
                fate[low:high] = [kind] * (high - low)
        for low, high in chunk.copy:
            covered = [piece for piece in chunk.pieces if piece.extent.start < high
                       and piece.extent.start + piece.extent.length > low]
            assert covered[0].extent.start <= low
            assert covered[-1].extent.start + covered[-1].extent.length >= high
    assert at == source.size
    needs_copy = set()
    at = 0
    for length, layer, kind in runs:
        for offset in range(at, at + length):
            skipped = layer > 0 and offset < rules.skip_below
            if not skipped and (everything or kind is Kind.DATA):
                needs_copy.add(offset)
            if offset >= start and not skipped:
                if everything or kind is Kind.DATA:
                    assert fate[offset] == "copy"
                elif offset < rules.zero_below:
                    assert fate[offset] in ("copy", "zero")
            if skipped and offset >= start:
                assert fate[offset] != "zero"  # the backing image shows through there
        at += length


def test_moves_that_continue_each_other_become_one() -> None:
    moves = [Move(0, 30, 10, 40, 40), Move(0, 20, 10, 30, 30), Move(0, 40, 5, 60, 60), Move(0, 45, 5, None, 65),
             Move(0, 50, 5, None, 70), Move(0, 60, 5, None, 80), Move(0, 65, 5, None, 90)]
    assert join_moves(moves) == [
        Move(0, 20, 20, 30, 30), Move(0, 40, 5, 60, 60), Move(0, 45, 10, None, 65), Move(0, 60, 5, None, 80),
        Move(0, 65, 5, None, 90)]
