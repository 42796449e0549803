"""The demonstration: a commit killed with SIGKILL half-way, twice; taken back the first time, finished the second.

    make demo        or        .venv/bin/python bench/demo.py [--keep] [--size MIB]

Builds an ext4 file system from files of this machine, makes a qcow2 base and an overlay with changed files of it, and
runs the `safeimg` program as a user would. Every PASS and FAIL is the result of a comparison made then and there; the
exit code is 1 if there was a FAIL. Works in a temporary folder, which it removes. Without mke2fs the disk holds a
tar archive of the same files; without qemu-img nobody gives a second opinion.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
ROOTS = ("/usr/share", "/usr/lib", "/usr/bin")  # where the files come from
SMALLEST, LARGEST = 8192, 16 * MIB  # bytes of a file that is taken
COPIES = 7  # tree, two disks, two images, the base's growth, undo file: so much must be free for each byte
COMMIT_SECONDS = 6  # that a commit is slowed down to, so that there is time to kill it
UUID = "5afe1396-0000-4000-8000-000000000001"
BASE, TOP = "base.qcow2", "top.qcow2"
OLD, NEW = "before.raw", "after.raw"  # what the base holds, and what it holds once the overlay is committed


class Stopped(Exception):
    """The demonstration cannot go on."""


@dataclass
class Stage:
    """Where it all happens: a folder, the programs, and what is printed."""

    folder: Path
    color: bool
    program: str
    failed: int = 0
    passed: int = 0
    started: float = field(default_factory=time.monotonic)

    def tell(self, text: str) -> None:
        print(f"\n{self._paint('1', text)}", flush=True)

    def note(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def verdict(self, good: bool, text: str) -> None:
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print(f"  {self._paint('32', 'PASS') if good else self._paint('1;31', 'FAIL')}  {text}", flush=True)

    def show(self, *words: str) -> None:
        print(self._paint("36", f"  $ {shlex.join(words)}"), flush=True)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    def line(self, words: Sequence[str]) -> list[str]:
        return [self.program, *words[1:]] if words[0] == "safeimg" else list(words)

    def run(self, *words: str, shown: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a program in the folder, what it prints included in the output if `shown`."""
        if shown:
            self.show(*words)
        done = subprocess.run(self.line(words), cwd=self.folder, capture_output=True, text=True, check=False)
        for text in (done.stdout + done.stderr).splitlines() if shown else ():
            print(f"    {text}", flush=True)
        return done

    def must(self, *words: str) -> None:
        """Runs a program without which there is nothing to demonstrate."""
        done = self.run(*words, shown=False)
        if done.returncode:
            raise Stopped(f"{shlex.join(words)}: {(done.stderr or done.stdout).strip()}")


# Building


def build(stage: Stage, budget: int) -> bool:
    """Disks before and after, the base and the overlay. Whether the disks hold an ext4 file system."""
    tree = stage.folder / "tree"
    count, size = collect(tree, budget)
    stage.note(f"{count} files of this machine, {size // MIB} MiB")
    ext4 = shutil.which("mke2fs") is not None
    if not ext4:
        stage.note(
            "mke2fs (e2fsprogs) is not installed: the disk holds a tar archive instead of an ext4 file system"
        )
    capacity = (size + count * 8192 + 96 * MIB) // MIB * MIB
    make_disk(stage, tree, OLD, capacity, count, ext4)
    changed, removed, added = change(tree)
    make_disk(stage, tree, NEW, capacity, count, ext4)
    shutil.rmtree(tree)
    stage.note(f"changed disk: {changed} files rewritten, {removed} removed, {added} added")
    for words in (
        ("safeimg", "convert", "-O", "qcow2", OLD, BASE),
        ("safeimg", "create", "-q", "-f", "qcow2", "-b", BASE, "-F", "qcow2", TOP),
        ("safeimg", "convert", "-n", "-O", "qcow2", NEW, TOP),
    ):
        stage.show(*words)
        stage.must(*words)
    return ext4


def collect(tree: Path, budget: int) -> tuple[int, int]:
    """Copies files of this machine, `budget` bytes of them at most, to `tree`. Their number and bytes."""
    count = total = 0
    for source, size in usable():
        if total + size > budget:
            break
        target = tree / f"{count // 500:03}" / f"{count:05}-{source.name[:100]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError:
            continue
        count, total = count + 1, total + size
    if total < 16 * MIB:
        raise Stopped(f"there are hardly any files below {', '.join(ROOTS)}")
    return count, total


def usable() -> Iterator[tuple[Path, int]]:
    for root in ROOTS:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                    continue
                size = path.stat().st_size
                if SMALLEST <= size <= LARGEST and name.isprintable():
                    yield path, size


def change(tree: Path) -> tuple[int, int, int]:
    """Rewrites two files in three, removes one in thirty, adds some: the numbers of each."""
    rng = random.Random(1)
    changed = removed = 0
    for number, path in enumerate(sorted(path for path in tree.rglob("*") if path.is_file())):
        if number % 30 == 29:
            path.unlink()
            removed += 1
        elif number % 3:
            content = path.read_bytes()
            path.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
            changed += 1
    (tree / "new").mkdir()
    for number in range(32):
        (tree / "new" / f"{number}.bin").write_bytes(rng.randbytes(256 * 1024))
    return changed, removed, 32


def make_disk(stage: Stage, tree: Path, name: str, capacity: int, count: int, ext4: bool) -> None:
    path = stage.folder / name
    if ext4:
        stage.must(
            "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-N", str(count + 1024), "-U", UUID,
            "-E", f"hash_seed={UUID}", "-d", str(tree), name, f"{capacity // 1024}k",
        )  # fmt: skip
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(tree, ".")
        os.truncate(path, capacity)


# Judging


def same(stage: Stage, disk: str, image: str, text: str) -> None:
    """The image shows the same content as the raw disk, by safeimg and by qemu-img."""
    for program in ("safeimg", "qemu-img"):
        if shutil.which(program) or program == "safeimg":
            done = stage.run(program, "compare", "-f", "raw", "-F", "qcow2", disk, image, shown=False)
            stage.verdict(done.returncode == 0, f"{program} compare: {text}")


def check(stage: Stage, *, leaks: bool) -> None:
    """Both images have no errors, but for leaked clusters where `leaks` are allowed."""
    for program in ("qemu-img", "safeimg"):
        if program != "safeimg" and shutil.which(program) is None:
            stage.note("qemu-img is not installed: no second opinion")
            continue
        for image in (BASE, TOP):
            done = stage.run(program, "check", "--output", "json", image, shown=False)
            found = json.loads(done.stdout) if done.returncode in (0, 2, 3) else {}
            errors = found.get("corruptions", 0)
            leaked = found.get("leaks", 0)
            good = done.returncode == 0 or (leaks and done.returncode == 3)
            what = f"errors: {errors}, leaked clusters: {leaked}" if found else done.stderr.strip()
            stage.verdict(good, f"{program} check: {image}: {what}")


def nothing_left(stage: Stage) -> None:
    left = sorted(path.name for path in stage.folder.iterdir() if ".safeimg" in path.name)
    stage.verdict(not left, f"nothing is left beside the images{': ' + ', '.join(left) if left else ''}")
    done = stage.run("safeimg", "status", BASE, TOP, shown=False)
    stage.verdict(done.returncode == 0, "safeimg status: nothing is pending")


def refused(stage: Stage) -> None:
    """Neither safeimg nor a guest changes the half-changed base."""
    done = stage.run("safeimg", "convert", "-O", "qcow2", OLD, BASE)
    named = "safeimg resume" in done.stderr and "safeimg rollback" in done.stderr
    stage.verdict(done.returncode != 0 and named, "another change is refused, and both ways out are named")
    if shutil.which("qemu-io"):
        done = stage.run("qemu-io", "-c", "write 0 64k", BASE)
        stage.verdict(done.returncode != 0, "QEMU does not write to it either")


def file_system(stage: Stage, image: str) -> None:
    """The guest's own file system, as it comes out of the image."""
    if shutil.which("e2fsck") is None:
        return
    stage.must("safeimg", "convert", "-O", "raw", image, "guest.raw")
    done = stage.run("e2fsck", "-f", "-n", "guest.raw", shown=False)
    (stage.folder / "guest.raw").unlink()
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    stage.verdict(done.returncode == 0, f"e2fsck of the guest's file system in {image}: {last}")


# Killing


def kill_part_way(stage: Stage, amount: int, share: float) -> None:
    """Starts the commit of `amount` bytes and kills it with SIGKILL as soon as it reports that share as done."""
    rate = max(amount // COMMIT_SECONDS, 8 * MIB)
    words = ("safeimg", "commit", "--progress=json", "-r", f"{rate // 1024}k", TOP)
    stage.show(*words)
    percent, seconds = 0.0, 0.0
    with subprocess.Popen(stage.line(words), cwd=stage.folder, stdout=subprocess.PIPE, text=True) as job:
        for line in job.stdout or ():
            report = json.loads(line)
            percent, seconds = report["percent"], report["seconds"]
            if report["done"] >= share * amount:
                break
        job.kill()
        code = job.wait()
    stage.verdict(code == -9, f"killed with SIGKILL after {seconds} s, at {percent:.0f} % (exit code {code})")
    if code != -9:
        raise Stopped("the commit ended before it could be killed")


def demonstrate(stage: Stage, budget: int) -> None:
    stage.tell("A base image with a file system, and an overlay in which files were changed")
    ext4 = build(stage, budget)
    same(stage, OLD, BASE, f"{BASE} holds the disk before")
    same(stage, NEW, TOP, f"{TOP} shows the disk after")
    amount = json.loads(stage.run("safeimg", "map", "--output", "json", TOP, shown=False).stdout)
    to_commit = sum(piece["length"] for piece in amount if piece["depth"] == 0 and piece["data"])
    stage.note(f"{TOP} holds {to_commit // MIB} MiB to commit into {BASE}")

    stage.tell("The commit is killed half-way")
    kill_part_way(stage, to_commit, 0.75)
    done = stage.run("safeimg", "status", BASE)
    stage.verdict(done.returncode == 3, "safeimg status: something is pending (exit code 3)")

    stage.tell("The images as the crash left them")
    check(stage, leaks=True)
    same(stage, NEW, TOP, f"{TOP} shows the same disk as ever")
    refused(stage)

    stage.tell("Taken back")
    done = stage.run("safeimg", "rollback", BASE)
    stage.verdict(done.returncode == 0 and "rolled back" in done.stdout, "safeimg rollback: exit code 0")
    same(stage, OLD, BASE, f"{BASE} holds the disk before")
    same(stage, NEW, TOP, f"{TOP} shows the disk after")
    check(stage, leaks=False)
    nothing_left(stage)

    stage.tell("The commit is started again, and killed again")
    kill_part_way(stage, to_commit, 0.9)
    same(stage, NEW, TOP, f"{TOP} shows the same disk as ever")

    stage.tell("Finished")
    done = stage.run("safeimg", "resume", BASE)
    stage.verdict(done.returncode == 0 and "finished" in done.stdout, "safeimg resume: exit code 0")
    same(stage, NEW, BASE, f"{BASE} holds the disk after")
    same(stage, NEW, TOP, f"{TOP} shows the disk after")
    size = (stage.folder / TOP).stat().st_size
    stage.verdict(size < 16 * MIB, f"{TOP} is empty: {size // 1024} KiB")
    check(stage, leaks=False)
    nothing_left(stage)
    if ext4:
        file_system(stage, BASE)

    stage.tell("The history")
    for image in (BASE, TOP):
        done = stage.run("safeimg", "audit", "verify", image)
        stage.verdict(done.returncode == 0, f"safeimg audit verify {image}: exit code {done.returncode}")
    done = stage.run("safeimg", "log", BASE)
    outcomes = [line for line in done.stdout.splitlines() if " commit " in line]
    both = len(outcomes) == 2 and "rolled back" in outcomes[0] and "completed" in outcomes[1]
    stage.verdict(both, "safeimg log: one commit rolled back, one completed")


# Running


def workplace(budget: int, parent: str | None) -> tuple[Path, int]:
    """A new temporary folder where there is room, and how many bytes of files the disk may hold there."""
    places = [parent] if parent else [tempfile.gettempdir(), "/var/tmp"]
    rooms = [(shutil.disk_usage(place).free, place) for place in places if os.access(place, os.W_OK)]
    if not rooms:
        raise Stopped(f"cannot write to {' or '.join(places)}")
    free, place = next((room for room in rooms if room[0] > COPIES * budget), max(rooms))
    budget = min(budget, free // COPIES)
    if budget < 64 * MIB:
        raise Stopped(f"{place}: needs {COPIES * 64} MiB of free space (--dir: another place)")
    return Path(tempfile.mkdtemp(prefix="safeimg-demo-", dir=place)), budget


def main() -> int:
    parser = argparse.ArgumentParser(description="A commit killed twice: rolled back, then finished.")
    parser.add_argument(
        "--size", type=int, default=384, metavar="MIB", help="how much of files the disk holds (384)"
    )
    parser.add_argument("--dir", help="where the temporary folder goes")
    parser.add_argument("--keep", action="store_true", help="do not remove the temporary folder")
    options = parser.parse_args()
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which("safeimg", path=os.path.dirname(sys.executable)) or shutil.which("safeimg")
    if program is None:
        print("demo: safeimg is not installed; run this as 'make demo'", file=sys.stderr)
        return 1
    folder = None
    try:
        folder, budget = workplace(options.size * MIB, options.dir)
        os.environ["SAFEIMG_STATE_DIR"] = str(folder / "state")
        stage = Stage(folder, sys.stdout.isatty() and "NO_COLOR" not in os.environ, program)
        demonstrate(stage, budget)
    except Stopped as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if folder is not None and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - stage.started
    stage.tell(f"{stage.passed} passed, {stage.failed} failed, {seconds:.0f} seconds")
    return 1 if stage.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
