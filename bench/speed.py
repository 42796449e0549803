"""safeimg against qemu-img: whole-process wall time of the same work, in one run on one machine.

    make bench        or        .venv/bin/python bench/speed.py [--runs 3] [--size MIB] [--only WORD]

The disk is an ext4 file system of this machine's files, 2 GiB with about 740 MB of data; the overlay 400 random writes
of 1 MiB. Both programs run alternately on a warm page cache, each on images made anew, and the medians are compared;
what they made is compared with `qemu-img compare`. Needs qemu-img, qemu-io and mke2fs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import MIB, Stage, collect, make_disk

DISK = 2048 * MIB


@dataclass(frozen=True)
class Work:
    """A command that both programs run with the same arguments."""

    name: str
    arguments: Sequence[str]
    prepare: Callable[[Path], None] = lambda folder: None
    ours: Sequence[str] = ()  # options of safeimg's own
    result: str = "out"  # to be compared with disk.raw or, for a commit, with what the overlay showed
    expected: str = "disk.raw"


def remove_output(folder: Path) -> None:
    (folder / "out").unlink(missing_ok=True)


def fresh_chain(folder: Path) -> None:
    for name in ("base.qcow2", "top.qcow2"):
        shutil.copyfile(folder / f"{name}.kept", folder / name)


def convert(name: str, *arguments: str) -> Work:
    return Work(f"convert {name}", ("convert", *arguments, "out"), remove_output)


def commit(name: str, *ours: str) -> Work:
    arguments = ("commit", "-q", "-t", "writeback", "top.qcow2")
    return Work(f"commit {name}", arguments, fresh_chain, ours, "base.qcow2", "after.raw")


WORKS = (
    convert("raw to qcow2, -t unsafe", "-t", "unsafe", "-O", "qcow2", "disk.raw"),
    convert("raw to qcow2, -t writeback", "-t", "writeback", "-O", "qcow2", "disk.raw"),
    convert("qcow2 to raw, -t unsafe", "-t", "unsafe", "-O", "raw", "disk.qcow2"),
    convert("qcow2 to raw, -t writeback", "-t", "writeback", "-O", "raw", "disk.qcow2"),
    convert("raw to raw, -t unsafe", "-t", "unsafe", "-O", "raw", "disk.raw"),
    convert("-c (zlib)", "-c", "-t", "unsafe", "-O", "qcow2", "disk.raw"),
    convert("-c (zstd)", "-c", "-t", "unsafe", "-O", "qcow2", "-o", "compression_type=zstd", "disk.raw"),
    convert("compressed to raw", "-t", "unsafe", "-O", "raw", "packed.qcow2"),
    commit("-t writeback"),
    commit("-t writeback, --no-undo", "--no-undo"),
    Work("compare raw, qcow2", ("compare", "disk.raw", "disk.qcow2"), result=""),
    Work("info", ("info", "disk.qcow2"), result=""),
    Work("check", ("check", "disk.qcow2"), result=""),
)


def build(folder: Path, size: int) -> None:
    """disk.raw, disk.qcow2, packed.qcow2, and the chain with what it shows as after.raw."""
    stage = Stage(folder, False, "safeimg")
    tree = folder / "tree"
    count, found = collect(tree, size)
    make_disk(stage, tree, "disk.raw", DISK, count, True)
    shutil.rmtree(tree)
    print(f"{count} files, {found // MIB} MiB, on a disk of {DISK // MIB} MiB", flush=True)
    rng = random.Random(1)
    commands = [
        f"write -P {rng.randrange(1, 256)} {rng.randrange(DISK // MIB - 1) * MIB} 1M" for _ in range(400)
    ]
    for words in (
        ("convert", "-O", "qcow2", "disk.raw", "disk.qcow2"),
        ("convert", "-c", "-O", "qcow2", "disk.raw", "packed.qcow2"),
        ("convert", "-O", "qcow2", "disk.raw", "base.qcow2"),
        ("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"),
    ):
        stage.must("qemu-img", *words)
    subprocess.run(
        ["qemu-io", "top.qcow2"],
        cwd=folder,
        input="\n".join(commands),
        text=True,
        check=True,
        capture_output=True,
    )
    stage.must("qemu-img", "convert", "-O", "raw", "top.qcow2", "after.raw")
    for name in ("base.qcow2", "top.qcow2"):
        (folder / name).rename(folder / f"{name}.kept")


def measure(work: Work, folder: Path, programs: dict[str, str], runs: int) -> dict[str, tuple[float, int]]:
    """Milliseconds (median) and bytes of the result, for each program."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    sizes = dict.fromkeys(programs, 0)
    for number in range(runs):
        for name in sorted(programs, reverse=bool(number % 2)):
            work.prepare(folder)
            os.sync()  # nobody pays for what the one before left to be written
            own = work.ours if name == "safeimg" else ()
            words = [programs[name], work.arguments[0], *own, *work.arguments[1:]]
            began = time.perf_counter()
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
            seconds[name].append(time.perf_counter() - began)
            if done.returncode:
                raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
            if work.result:
                same = subprocess.run(
                    ["qemu-img", "compare", "-q", work.result, work.expected], cwd=folder, check=False
                )
                if same.returncode:
                    raise SystemExit(f"{' '.join(words)}: the result is wrong")
                sizes[name] = (folder / work.result).stat().st_blocks * 512
    return {name: (statistics.median(seconds[name]) * 1000, sizes[name]) for name in programs}


def main() -> int:
    parser = argparse.ArgumentParser(description="safeimg against qemu-img: whole-process wall time.")
    parser.add_argument("--runs", type=int, default=3, help="of each program (3)")
    parser.add_argument(
        "--size", type=int, default=740, metavar="MIB", help="how much of files the disk holds (740)"
    )
    parser.add_argument("--only", default="", help="work whose name contains this")
    parser.add_argument("--dir", help="where the temporary folder goes")
    options = parser.parse_args()
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    own = shutil.which("safeimg", path=os.path.dirname(sys.executable)) or shutil.which("safeimg")
    missing = [name for name in ("qemu-img", "qemu-io", "mke2fs") if shutil.which(name) is None]
    if own is None or missing:
        print(f"bench: needs {', '.join(missing or ['safeimg'])}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="safeimg-bench-", dir=options.dir) as name:
        folder = Path(name)
        os.environ["SAFEIMG_STATE_DIR"] = str(folder / "state")
        build(folder, options.size * MIB)
        print(
            f"\n| {'work':<36} | qemu-img, ms | safeimg, ms | ratio | size |\n| --- | --- | --- | --- | --- |"
        )
        for work in WORKS:
            if options.only in work.name:
                found = measure(work, folder, {"qemu-img": "qemu-img", "safeimg": own}, options.runs)
                (theirs, their_size), (ours, our_size) = found["qemu-img"], found["safeimg"]
                size = f"{our_size / their_size:.2f}" if their_size else ""
                print(
                    f"| {work.name:<36} | {theirs:>12.0f} | {ours:>11.0f} | {ours / theirs:>5.2f} | {size:>4} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
