"""`check -r`: what is wrong is put right on a draft of the file, as QEMU goes about it, and the changes come out.

    snapshot table       read, with too much in it left out
    scan                 references are counted; L2 entries without sense become zeroes, the file as long as its
                         refcount blocks ask for
    comparison           refcounts that are wrong are set, or where that will not do, new ones are made by one switch of
                         the header, after which the old ones are leaks like others
    COPIED flags         as the refcounts are now
    snapshot table       a new one, by one switch of the header, if the old one lacked something

The report is QEMU's line by line. Nothing of the image is relied on: memory and time are bounded as those of a check,
and by what a draft holds. Loaded only when an image is repaired: it needs numpy.
"""

from __future__ import annotations

from collections.abc import Iterator

from safeimg.drivers.errors import CheckFailed
from safeimg.drivers.formats.api import Changes, Patch
from safeimg.drivers.formats.features import Repair
from safeimg.drivers.formats.qcow2.check import Comparison, result
from safeimg.drivers.formats.qcow2.entries import SECTOR
from safeimg.drivers.formats.qcow2.findings import Findings
from safeimg.drivers.formats.qcow2.header import parse_header
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.rebuild import new_refcounts
from safeimg.drivers.formats.qcow2.scan import ReferenceScan
from safeimg.drivers.formats.qcow2.snapshot_repair import Table, read_table
from safeimg.drivers.formats.qcow2.snapshots import encode_snapshots
from safeimg.drivers.storage.draft import Change, DraftFile

STEP_BYTES = 4 << 20  # of an image that one step changes
PATCH_BYTES = 1 << 20

# Header fields, all in the first sector
_REFCOUNT_TABLE = 48  # refcount_table_offset, refcount_table_clusters
_SNAPSHOTS = 60  # nb_snapshots, snapshots_offset


def plan_repair(image: Qcow2Image, *, errors: bool) -> Repair:
    """Repairs leaks, and with `errors` everything else. Nothing is written. Raises as `check.check` does;
    `CheckFailed` also for what cannot be repaired, with the report until then."""
    parse_header(image.file, snapshots=False)  # as in `check`
    procedure = _Procedure(image, errors)
    try:
        procedure.run()
    except CheckFailed as failed:
        messages = (*procedure.findings.messages, *failed.messages)
        raise CheckFailed(failed.reason, messages=messages, problem=failed.problem) from None
    report = result(image, procedure.findings, procedure.highest)
    return Repair(report, tuple(procedure.changes))


class _Procedure:
    def __init__(self, image: Qcow2Image, errors: bool) -> None:
        self._draft = DraftFile(image.file)
        self._header = image.header
        self._errors = errors
        self.findings = Findings()
        self.highest = 0
        self.changes: list[Changes] = []

    def run(self) -> None:
        found = self.findings
        table = read_table(self._image(), found, fix=self._errors)
        old_corruptions, found.corruptions = found.corruptions, 0
        comparison = self._repair_refcounts(table)
        self._take_in_place()
        if table.mended:
            self._write_snapshots(table, comparison)
            found.corruptions_fixed += table.mended
        found.corruptions += old_corruptions

    def _image(self) -> Qcow2Image:
        return Qcow2Image(self._draft, self._header)

    def _repair_refcounts(self, table: Table) -> Comparison:
        found, errors = self.findings, self._errors
        scan = ReferenceScan(self._image(), found, fix=errors)
        scan.run(table.snapshots)
        self._take_in_place()
        comparison = Comparison(scan)
        before = found.corruptions, found.leaks, found.check_errors
        sound = comparison.compare() and not scan.broken
        if not sound and not errors:
            raise CheckFailed("Input/output error", messages=("ERROR need to rebuild refcount structures",))
        if not sound:
            comparison = self._rebuild(scan, table)
        elif (found.corruptions, found.leaks) != (0, 0):
            found.corruptions, found.leaks, found.check_errors = before
            comparison.compare(fix_errors=errors, fix_leaks=True)
            self._take_in_place()
        # Without `errors`, flags are wrong only because leaks were repaired: if nothing else is wrong.
        comparison.check_copied_flags(fix=errors or not (found.corruptions or found.leaks or found.check_errors))
        self.highest = comparison.highest
        return comparison

    def _rebuild(self, scan: ReferenceScan, table: Table) -> Comparison:
        """New refcounts, and the old ones freed."""
        found = self.findings
        found.say("Rebuilding refcount structure")
        old = found.corruptions, found.leaks
        header = new_refcounts(self._draft, self._header, scan.counts)
        changed, length = self._draft.take()
        fields = header.refcount_table_offset.to_bytes(8, "big") + header.refcount_table_clusters.to_bytes(4, "big")
        self._draft.pwrite(_REFCOUNT_TABLE, fields)
        self._take_switch(changed, length)
        self._header = header
        found.corruptions = found.leaks = found.check_errors = 0
        found.allocated_clusters = found.fragmented_clusters = found.compressed_clusters = 0
        again = ReferenceScan(self._image(), found)
        again.run(table.snapshots)
        counters = found.corruptions, found.leaks, found.check_errors, found.corruptions_fixed, found.leaks_fixed
        comparison = Comparison(again)
        if not comparison.compare(fix_leaks=True) or again.broken:
            found.say("ERROR rebuilt refcount structure is still broken")
        self._take_in_place()
        (found.corruptions, found.leaks, found.check_errors, found.corruptions_fixed, found.leaks_fixed) = counters
        found.corruptions_fixed += max(0, old[0] - found.corruptions)
        found.leaks_fixed += max(0, old[1] - found.leaks)
        return comparison

    def _write_snapshots(self, table: Table, comparison: Comparison) -> None:
        """The snapshot table anew, in other clusters."""
        size, old = self._header.cluster_size, self._header.snapshots_offset
        old_length = table.snapshots[-1].end - old if table.snapshots else 0
        counted = old + old_length - self._draft.length() < size  # else it was no reference to anything
        content = encode_snapshots(table.snapshots)
        clusters = -(-len(content) // size)
        try:
            first = comparison.allocate(clusters) if clusters else 0
        except CheckFailed as failed:
            raise CheckFailed(
                failed.reason, messages=(f"ERROR failed to update snapshot table: {failed.reason}",)
            ) from None
        self._draft.pwrite(first * size, content.ljust(clusters * size, b"\0"))
        changed, length = self._draft.take()
        self._draft.pwrite(_SNAPSHOTS, len(table.snapshots).to_bytes(4, "big") + (first * size).to_bytes(8, "big"))
        self._take_switch(changed, length)
        if counted:
            comparison.free(old // size, -(-old_length // size))
        self._take_in_place()

    # What becomes of the draft

    def _take_in_place(self) -> None:
        """Changes of live structures: each makes sense without the others."""
        changed, length = self._draft.take()
        if length is not None:
            self.changes.append(Changes(length=length))
        self.changes += [Changes(link=group) for group in _grouped(changed)]

    def _take_switch(self, changed: list[Change], length: int | None) -> None:
        """New structures, and then what makes them live."""
        link, _ = self._draft.take()
        if length is not None:
            self.changes.append(Changes(length=length))
        groups = list(_grouped(changed))
        self.changes += [Changes(allocate=group) for group in groups[:-1]]
        self.changes.append(Changes(allocate=groups[-1] if groups else (), link=tuple(map(_patch, link))))


def _patch(change: Change) -> Patch:
    return Patch(change.offset, change.before, change.after)


def _grouped(changed: list[Change]) -> Iterator[tuple[Patch, ...]]:
    """Patches of a bounded size, in groups for one step each."""
    group: list[Patch] = []
    size = 0
    for change in changed:
        start = 0
        while start < len(change.after):
            end = start + PATCH_BYTES - (change.offset + start) % SECTOR  # no sector is cut
            before = None if change.before is None else change.before[start:end]
            group.append(Patch(change.offset + start, before, change.after[start:end]))
            size += len(group[-1].after)
            start = end
            if size >= STEP_BYTES:
                yield tuple(group)
                group, size = [], 0
    if group:
        yield tuple(group)
