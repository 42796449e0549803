"""The snapshot table as `check` reads it: what is wrong with it is told, and put right with `-r all`.

Spec: docs/interop/qcow2, "Snapshots". Too much of anything is discarded; what version 3 requires is filled in.
"""

from __future__ import annotations

from safeimg.drivers.errors import CheckFailed, FormatError
from safeimg.drivers.formats.qcow2.findings import Findings
from safeimg.drivers.formats.qcow2.header import MAX_SNAPSHOTS
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.snapshots import MAX_EXTRA_DATA, Snapshot, TooMuch, read_snapshots
from safeimg.drivers.records import NamedTuple

_TOO_LARGE = "File too large"
_REMEDY = "You can force-remove {} with qemu-img check -r all"


class Table(NamedTuple):
    """The snapshot table, as far as it makes sense."""

    snapshots: tuple[Snapshot, ...]
    mended: int  # how many mistakes a new table puts right


def read_table(image: Qcow2Image, findings: Findings, *, fix: bool) -> Table:
    """The snapshots, with mistakes reported. Raises `CheckFailed` for a table that cannot be read: one out of place,
    or, without `fix`, one with too much in it."""
    header = image.header
    mended = 0

    def discard(index: int, size: int) -> None:
        nonlocal mended
        what = f"too much extra metadata in snapshot table entry {index} ({size} > {MAX_EXTRA_DATA})"
        findings.say(f"Discarding {what}")
        mended += 1

    if header.snapshots_offset % header.cluster_size or header.snapshots_offset + 40 * header.nb_snapshots >= 1 << 63:
        raise CheckFailed("Invalid argument", problem="ERROR snapshot table offset invalid")
    if header.nb_snapshots > MAX_SNAPSHOTS:
        many = header.nb_snapshots - MAX_SNAPSHOTS
        if not fix:
            remedy = _REMEDY.format(f"all {many} overhanging snapshots")
            raise CheckFailed(_TOO_LARGE, problem=f"ERROR snapshot table too large\n{remedy}")
        findings.say(f"Discarding {many} overhanging snapshots")
        mended += many
        header = header._replace(nb_snapshots=MAX_SNAPSHOTS)
    try:
        snapshots = read_snapshots(image.file, header, discard=discard if fix else None)
    except TooMuch as error:
        what = "this extra metadata" if error.entry is not None else f"all {error.snapshots} overhanging snapshots"
        problem = f"ERROR failed to read the snapshot table: {error.problem}\n{_REMEDY.format(what)}"
        raise CheckFailed(_TOO_LARGE, problem=problem) from None
    except FormatError as error:
        problem = f"ERROR failed to read the snapshot table: {error.problem}"
        raise CheckFailed("Invalid argument", problem=problem) from None
    dropped = header.nb_snapshots - len(snapshots)
    if dropped:
        findings.say(f"Discarding {dropped} overhanging snapshots (snapshot table is too big)")
        mended += dropped
    for index, snapshot in enumerate(snapshots):
        if header.version >= 3 and snapshot.is_incomplete:
            problem = f"snapshot table entry {index} is incomplete"
            if fix:
                findings.say(f"Repairing {problem}")
                mended += 1
            else:
                findings.corrupt(f"ERROR {problem}")
    return Table(snapshots, mended)
