"""What was judged, by operation and by feature: `python -m powercut.report A.json B.json` adds up runs of the soak.

A state is told from others by a digest of all that it is: what two runs have both judged counts once.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from powercut import guest
from powercut.judge import Counter, Judge
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Image, Kind
from safeimg.drivers.formats.chain import close_chain
from safeimg.drivers.formats.features import BitmapState
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import entries
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.bitmap_plan import listed

DIGEST = 8  # bytes of a state's
_FLAGS = {
    "convert": ("-n",), "rebase": ("-u",), "resize": ("--shrink",), "snapshot": ("-c", "-a", "-d"),
    "check": ("-r leaks", "-r all"), "create": (),
}  # fmt: skip


@dataclass
class Tally:
    """What was judged of one scenario."""

    operation: str = ""
    features: tuple[str, ...] = ()
    counter: Counter = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    seconds: float = 0.0  # of processor time

    def to_json(self) -> dict[str, Any]:
        return {
            "operation": self.operation, "features": list(self.features), "counter": asdict(self.counter),
            "seconds": round(self.seconds, 1), "seen": base64.b64encode(b"".join(sorted(self.seen))).decode(),
        }  # fmt: skip

    def add_json(self, found: Mapping[str, Any]) -> None:
        self.operation, self.features = found["operation"], tuple(found["features"]) or self.features
        self.counter.add(Counter(**found["counter"]))
        self.seconds += found["seconds"]
        digests = base64.b64decode(found["seen"])
        self.seen.update(digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST))


def operation_of(name: str) -> str:
    """The operation of a scenario: its first word, with the option that makes another one of it."""
    head = name.partition(" ")[0].rstrip(",")
    rest = f"{name} ".replace(",", " ")
    return next((f"{head} {flag}" for flag in _FLAGS.get(head, ()) if f" {flag} " in rest), head)


def features_of(judge: Judge) -> tuple[str, ...]:
    """What the images have that are written, before the operation or after it, in the order of `FEATURES`."""
    found: set[str] = set()
    for fs in (judge.initial, judge.trace_of):
        for path, fmt in judge.scenario.images:
            if fs.stat(path) is not None:
                found.update(_features(fs, path, fmt))
    found.add("damaged" if judge.scenario.broken else "")
    return tuple(name for name in FEATURES if name in found)


FEATURES = (
    "raw", "vdi", "luks", "qcow2", "version 2", "version 3", "chain", "512-byte clusters", "other clusters",
    "64 KiB clusters", "narrow refcounts", "wide refcounts", "lazy refcounts", "extended L2", "data file",
    "raw data file", "AES", "LUKS", "compressed", "bitmaps", "snapshots", "marked as dirty", "damaged",
)  # fmt: skip


def _features(fs: SimulatedFileSystem, path: str, fmt: str) -> Iterable[str]:
    chain = guest.opened(fs, path, fmt, repair=True)
    try:
        yield fmt
        image = chain[0]
        others = [f"/{name}" for name in fs.list_directory("/") if f"/{name}" != path]
        if len(chain) > 1 or any(_leads_to(fs, other, path) for other in others):
            yield "chain"
        if fmt == "qcow2":
            yield from _qcow2(fs, path, image)
    finally:
        close_chain(chain)


def _qcow2(fs: SimulatedFileSystem, path: str, image: Image) -> Iterable[str]:
    details: Any = lookup("qcow2").specific_info(image) or {}
    yield "version 2" if details["compat"] == "0.10" else "version 3"
    yield {512: "512-byte clusters", 1 << 16: "64 KiB clusters"}.get(image.cluster_size, "other clusters")
    bits = details.get("refcount-bits", 16)
    if bits != 16:
        yield "narrow refcounts" if bits < 16 else "wide refcounts"
    if details.get("lazy-refcounts"):
        yield "lazy refcounts"
    if details.get("extended-l2"):
        yield "extended L2"
    if "data-file" in details:
        yield "raw data file" if details.get("data-file-raw") else "data file"
    if "encrypt" in details:
        yield {"aes": "AES", "luks": "LUKS"}[details["encrypt"]["format"]]
    with suppress(FormatError):  # damaged ones may have no map
        if any(extent.kind is Kind.COMPRESSED for extent in image.extents(0, image.size)):
            yield "compressed"
    bitmaps: list[BitmapState] = list(listed(image))
    if bitmaps:
        yield "bitmaps"
    if list(entries(image)):
        yield "snapshots"
    if fs.read_file(path)[79] & 1 and details["compat"] != "0.10":
        yield "marked as dirty"


def _leads_to(fs: SimulatedFileSystem, path: str, base: str) -> bool:
    """Whether an image names `base` as its backing image."""
    content = fs.read_file(path)[:4096] if path.endswith(".qcow2") else b""
    return content[:4] == b"QFI\xfb" and base[1:].encode() in content


def table(tallies: Mapping[str, Tally]) -> str:
    """By operation, and by operation and feature: how many different states were judged."""
    operations = list(dict.fromkeys(tally.operation for tally in tallies.values()))
    lines = [
        f"{'operation':<18} {'scenarios':>9} {'states':>8} | {'first':>8} {'recovery':>8} {'repeatedly':>10} "
        f"{'failed sync':>11} {'(repeated)':>10} {'ms each':>7}"
    ]
    for operation in [*operations, ""]:
        chosen = [tally for tally in tallies.values() if operation in (tally.operation, "")]
        counter, states = Counter(), sum(len(tally.seen) for tally in chosen)
        for tally in chosen:
            counter.add(tally.counter)
        cost = 1000 * sum(tally.seconds for tally in chosen) / max(counter.total, 1)
        lines.append(
            f"{operation or 'all':<18} {len(chosen):>9} {states:>8} | {counter.states:>8} {counter.second:>8} "
            f"{counter.deeper:>10} {counter.failed:>11} {counter.repeated:>10} {cost:>7.1f}"
        )
    lines += ["", f"{'feature':<18} {'states':>8}  of which"]
    for feature in FEATURES:
        counts = dict.fromkeys(operations, 0)
        for tally in tallies.values():
            counts[tally.operation] += len(tally.seen) * (feature in tally.features)
        told = ", ".join(f"{operation} {count}" for operation, count in counts.items() if count)
        lines.append(f"{feature:<18} {sum(counts.values()):>8}  {told}")
    return "\n".join(lines)


def save(path: Path, tallies: Mapping[str, Tally]) -> None:
    path.write_text(json.dumps({name: tally.to_json() for name, tally in tallies.items()}, indent=1) + "\n")


def add_up(file: Path, tallies: dict[str, Tally]) -> None:
    """Adds the results of a run."""
    for name, found in json.loads(file.read_text()).items():
        tallies.setdefault(name, Tally()).add_json(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what `soak --json` has written")
    parser.add_argument("--json", type=Path, help="where the sum goes")
    options = parser.parse_args()
    tallies: dict[str, Tally] = {}
    for file in options.files:
        add_up(file, tallies)
    print(table(tallies))
    if options.json is not None:
        save(options.json, tallies)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
