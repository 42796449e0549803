"""safeimg against qemu-img: the same work, in turns, on one machine.

    make bench        or        .venv/bin/python bench/speed.py [--gib 2] [--runs 5] [--only WORD] [--json FILE]

The disk is an ext4 file system of this machine's files. Both programs run alternately on a warm page cache, each on
images made anew, with the same options and the same cache mode; what they made is compared with `qemu-img compare`. The
ratio is that of the medians of the wall time of whole processes. Needs qemu-img, qemu-io and mke2fs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from measure import Failed, Measured, Runs, measure
from sets import GIB, Set
from works import WORKS

HEAD = (
    "| work | qemu-img, ms | safeimg, ms | ratio | target | MB/s | CPU, s | memory, MB | syncs | size |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def row(found: Measured, size: int) -> str:
    """A line of the table; where two numbers stand, qemu-img's comes first."""
    work, theirs, ours = found.work, found.theirs, found.ours
    mark = {None: "", True: " ✓", False: " ✗"}[found.good]
    fields = (
        work.name,
        f"{_ms(theirs):.0f}",
        f"{_ms(ours):.0f}",
        f"{found.ratio:.2f}{mark}",
        "" if work.target is None else f"{work.target:.2f}",
        f"{size / 1000 / _ms(theirs):.0f}, {size / 1000 / _ms(ours):.0f}",
        f"{statistics.median(theirs.cpu):.2f}, {statistics.median(ours.cpu):.2f}",
        f"{max(theirs.memory) / 1e6:.0f}, {max(ours.memory) / 1e6:.0f}",
        "" if theirs.syncs is None else f"{theirs.syncs}, {ours.syncs}",
        f"{ours.size / theirs.size:.3f}" if theirs.size and ours.size else "",
    )
    return f"| {' | '.join(fields)} |"


def _ms(runs: Runs) -> float:
    return statistics.median(runs.wall) * 1000


def machine() -> str:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    version = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} × {model}, {system}, {version.splitlines()[0]}"


def results(options: argparse.Namespace, folder: Path, own: str) -> Iterator[Measured]:
    made = Set(folder, int(options.gib * GIB))
    for work in WORKS:
        if options.only in work.name:
            yield measure(work, made, {"qemu-img": "qemu-img", "safeimg": own}, options.runs)


def main() -> int:
    parser = argparse.ArgumentParser(description="safeimg against qemu-img: whole-process wall time.")
    parser.add_argument("--gib", type=float, default=2, help="size of the disk (2)")
    parser.add_argument("--runs", type=int, default=5, help="of each program (5)")
    parser.add_argument("--only", default="", help="work whose name contains this")
    parser.add_argument("--dir", help="where the temporary folder goes")
    parser.add_argument("--set", type=Path, help="a folder whose images are used, and made where they are missing")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    own = shutil.which("safeimg", path=os.path.dirname(sys.executable)) or shutil.which("safeimg")
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [name for name in ("qemu-img", "qemu-io", "mke2fs") if shutil.which(name) is None]
    if own is None or missing:
        print(f"bench: needs {', '.join(missing or ['safeimg'])}", file=sys.stderr)
        return 1
    kept: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="safeimg-bench-", dir=options.dir) as name:
        os.environ["SAFEIMG_STATE_DIR"] = str(Path(name) / "state")
        folder = Path(name) if options.set is None else options.set.resolve()
        folder.mkdir(exist_ok=True)
        print(f"{machine()}; a disk of {options.gib:g} GiB, {options.runs} runs of each\n", flush=True)
        print("\n".join(HEAD), flush=True)
        try:
            for found in results(options, folder, own):
                print(row(found, int(options.gib * GIB)), flush=True)
                kept.append({**asdict(found), "ratio": found.ratio, "good": found.good})
        except Failed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        finally:
            if options.json is not None:
                text = {"machine": machine(), "gib": options.gib, "runs": options.runs, "works": kept}
                options.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
