"""Where data and zeroes go, subcluster by subcluster; a standard cluster is one with a single subcluster (see `l2`).

Spec: docs/interop/qcow2, "Cluster mapping" and "Extended L2 Entries". What is not allocated of a cluster that has a
place already is nobody's: data goes there first, and the L2 entry makes it part of the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.formats.api import Patch, Placement
from safeimg.drivers.formats.placements import add_placement
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from safeimg.drivers.formats.qcow2.l2 import runs

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


class Placer:
    """Places for the parts of a guest range, and the L2 entries that go with them.

    Subclusters are counted from the start of a cluster, in runs of clusters from the start of the first one."""

    def __init__(self, planner: Qcow2Planner) -> None:
        self._planner = planner
        self._l2 = planner.header.l2
        self._bits = planner.header.cluster_bits
        self._size = planner.header.cluster_size
        self._unit = self._l2.subcluster_size
        self._vacated: dict[int, int] = {}  # host cluster → subclusters that this operation took out of use
        self._vacated_now: list[tuple[int, int]] = []  # the same since `take_vacated`, as host ranges
        self._tails: list[Patch] = []

    def place(self, start: int, end: int) -> list[Placement]:
        """See `api.Planner.place`."""
        placements: list[Placement] = []
        for cluster, entries in self._planner.tables.entries(start, end - start):
            self._place(cluster, entries, start, end, placements)
        return placements

    def zero(self, start: int, end: int) -> list[Placement]:
        """See `api.Planner.zero`."""
        placements: list[Placement] = []
        for first, entries in self._planner.tables.entries(start, end - start):
            for cluster, entry in enumerate(entries, first):
                left, right = max(start, cluster * self._size), min(end, (cluster + 1) * self._size)
                self._zero(cluster, entry, left, right, placements)
        return placements

    def take_tails(self) -> tuple[Patch, ...]:
        """Zeroes for what lies behind the end of the virtual disk in places given since the last time: should the
        disk grow, no remains of other data are exposed. (Encrypted ones are up to who writes the data.)"""
        tails, self._tails = self._tails, []
        return tuple(tails)

    def take_vacated(self) -> tuple[tuple[int, int], ...]:
        """Host ranges (offset, length), parts of clusters, taken out of use since the last time."""
        vacated, self._vacated_now = self._vacated_now, []
        return tuple(vacated)

    def recall(self, offset: int, length: int) -> None:
        """An earlier step took this part of one cluster out of use: its bytes are needed to take the step back."""
        first = offset % self._size // self._unit
        mask = mask_of(first, first + -(-length // self._unit))
        host = offset >> self._bits
        self._vacated[host] = self._vacated.get(host, 0) | mask

    # Data

    def _place(self, first: int, entries: Sequence[int], start: int, end: int, placements: list[Placement]) -> None:
        """Places for the part of start…end that lies in guest clusters of one L2 table."""
        every, index = self._l2.every, 0
        while index < len(entries):
            cluster, entry, count = first + index, entries[index], 1
            if self._is_own(cluster, entry, start, end):
                allocated, _ = self._l2.masks(entry)
                if allocated in (0, every) and not self._vacated:
                    while index + count < len(entries) and entries[index + count] == entry + count * self._size:
                        count += 1
                host = self._planner.tables.standard(cluster, entry)
                self._planner.tables.exclusive(host, count, True, "data")
                if allocated == every:
                    left, right = max(start, cluster * self._size), min(end, (cluster + count) * self._size)
                    offset = host * self._size + left - cluster * self._size
                    add_placement(placements, Placement(left, right - left, offset, False))
                elif not allocated:
                    old = entries[index:index + count]
                    self._use(cluster, host, old, self._wanted(cluster, old, start, end), placements)
                else:
                    self._place_mixed(cluster, entry, host, start, end, placements)
            else:
                while index + count < len(entries) and not self._is_own(
                        first + index + count, entries[index + count], start, end):
                    count += 1
                self._place_elsewhere(cluster, entries[index:index + count], start, end, placements)
            index += count

    def _is_own(self, cluster: int, entry: int, start: int, end: int) -> bool:
        """Whether data for start…end may go where the entry points to: the place is this entry's alone, and what
        this operation took out of use there is not touched."""
        if not entry & COPIED or entry & COMPRESSED:
            return False
        vacated = self._vacated.get((entry & OFFSET_MASK) >> self._bits, 0) if self._vacated else 0
        return not vacated or not vacated & mask_of(*self._touched(cluster, start, end))

    def _place_mixed(self, cluster: int, entry: int, host: int, start: int, end: int,
                     placements: list[Placement]) -> None:
        """Places in a cluster of our own some of whose subclusters are allocated."""
        allocated, zeroes = self._l2.masks(entry)
        first, behind = self._touched(cluster, start, end)
        mask = mask_of(first, behind)
        if mask & ~allocated:
            self._planner.tables.put(cluster, [self._l2.with_masks(entry, allocated | mask, zeroes & ~mask)])
            self._planner.view.extend((host + 1) * self._size)
        shift = (host - cluster) * self._size  # from the guest to the file
        for run, length, is_live in runs(allocated, self._l2.subclusters):
            low, high = max(run, first), min(run + length, behind)
            if low >= high:
                continue
            if is_live:
                left = max(start, cluster * self._size + low * self._unit)
                right = min(end, cluster * self._size + high * self._unit)
                add_placement(placements, Placement(left, right - left, left + shift, False))
            else:
                self._add_fresh(cluster, host, low, high, placements)

    def _place_elsewhere(self, cluster: int, old: Sequence[int], start: int, end: int,
                         placements: list[Placement]) -> None:
        """Places in new clusters instead of the old ones, if there are any."""
        wanted = self._wanted(cluster, old, start, end)
        self._planner.tables.prepare(cluster)
        for number, entry in enumerate(old, cluster):
            if entry:
                self._planner.tables.unlink(number, entry)
        done = 0
        while done < len(old):
            host, count = self._planner.allocator.allocate(len(old) - done)
            part = slice(done, done + count)
            self._use(cluster + done, host, old[part], wanted[part], placements)
            done += count

    def _wanted(self, cluster: int, old: Sequence[int], start: int, end: int) -> list[int]:
        """What of each cluster has to be written in another place: what the range touches, and all that lies
        between that and what the old place holds, so that it is one piece."""
        if not self._l2.extended:
            return [1] * len(old)
        masks = []
        for number, entry in enumerate(old, cluster):
            first, behind = self._touched(number, start, end)
            held = self._l2.every if entry & COMPRESSED else self._l2.masks(entry)[0]
            if held:
                first, behind = min(first, _lowest(held)), max(behind, held.bit_length())
            masks.append(mask_of(first, behind))
        return masks

    def _use(self, cluster: int, host: int, old: Sequence[int], wanted: Sequence[int],
             placements: list[Placement]) -> None:
        """Makes the `wanted` subclusters, one piece, of clusters at `host` part of the disk. Nothing there is."""
        at = range(host * self._size, (host + len(old)) * self._size, self._size)
        entries = [offset | COPIED for offset in at]
        if self._l2.extended:
            zeroes = [0 if entry & COMPRESSED else self._l2.masks(entry)[1] for entry in old]
            entries = [
                self._l2.with_masks(entry, mask, zero & ~mask)
                for entry, mask, zero in zip(entries, wanted, zeroes, strict=True)
            ]
        self._planner.tables.put(cluster, entries)
        self._planner.view.extend((host + len(old)) * self._size)
        behind = (len(old) - 1) * self._l2.subclusters + wanted[-1].bit_length()
        self._add_fresh(cluster, host, _lowest(wanted[0]), behind, placements)

    def _add_fresh(self, cluster: int, host: int, first: int, behind: int, placements: list[Placement]) -> None:
        start, offset = cluster * self._size + first * self._unit, host * self._size + first * self._unit
        whole = (behind - first) * self._unit
        length = min(whole, self._planner.size - start)
        add_placement(placements, Placement(start, length, offset, True))
        tail = offset + length
        if length < whole and tail < self._planner.original_length and not self._planner.header.crypt_method:
            self._tails.append(Patch(tail, None, bytes(whole - length)))

    # Zeroes

    def _zero(self, cluster: int, entry: int, left: int, right: int, placements: list[Placement]) -> None:
        """Makes left…right, in one guest cluster, zero."""
        tables, l2 = self._planner.tables, self._l2
        first, behind = self._touched(cluster, left, right)
        inside = self._covered(cluster, left, right)
        touched = mask_of(first, behind)
        missing = touched & ~tables.reads_zero(cluster, entry)
        if self._planner.header.version > 2:  # as QEMU: what was made zero is marked so, not left to the images below
            missing |= touched & inside & ~tables.says_zero(entry)
        if not missing:
            return
        if inside == l2.every and self._zero_entry is not None:
            tables.unlink(cluster, entry)
            tables.put(cluster, [self._zero_entry])
            return
        cut = missing & ~inside  # subclusters that stay in part
        placed = not entry & COMPRESSED and entry & OFFSET_MASK
        if not l2.extended or entry & COMPRESSED or (cut and placed and not self._is_own(cluster, entry, left, right)):
            self._place(cluster, [entry], left, right, placements)
            return
        if missing & inside:
            entry = self._zero_parts(cluster, entry, missing & inside)
        for number in (first, behind - 1)[:behind - first]:
            if cut >> number & 1:
                start = cluster * self._size + number * self._unit
                low, high = max(left, start), min(right, start + self._unit)
                self._place(cluster, [entry], low, high, placements)
                (entry,) = tables.entries(low, 1)[0][1]

    def _zero_parts(self, cluster: int, entry: int, parts: int) -> int:
        """Makes subclusters zero in the L2 entry: the new one."""
        tables, l2 = self._planner.tables, self._l2
        allocated, zeroes = l2.masks(entry)
        if allocated and not allocated & ~parts:
            tables.unlink(cluster, entry)
            new = l2.with_masks(0, 0, zeroes | parts)
        else:
            new = l2.with_masks(entry, allocated & ~parts, zeroes | parts)
            if entry & COPIED:
                self._vacate(tables.standard(cluster, entry), allocated & parts)
        tables.put(cluster, [new])
        return new

    def _vacate(self, host: int, parts: int) -> None:
        """Remembers what is out of use from now on, which is nobody's only once the operation is settled."""
        if parts:
            self._vacated[host] = self._vacated.get(host, 0) | parts
            base = host * self._size
            self._vacated_now += [(base + run * self._unit, length * self._unit)
                                  for run, length, is_set in runs(parts, self._l2.subclusters) if is_set]

    @property
    def _zero_entry(self) -> int | None:
        """What makes a whole cluster read as zeroes by metadata alone, if anything does."""
        if self._planner.header.version > 2:
            return self._l2.zero
        return 0 if self._planner.header.backing_file is None else None

    # Subclusters

    def _touched(self, cluster: int, start: int, end: int) -> tuple[int, int]:
        """The subclusters (first, end) of a cluster that start…end overlaps; it does overlap the cluster."""
        base = cluster * self._size
        return max(start - base, 0) // self._unit, -(-min(end - base, self._size) // self._unit)

    def _covered(self, cluster: int, left: int, right: int) -> int:
        """The subclusters that left…right, in one cluster, covers as a whole, as far as the virtual disk goes."""
        base = cluster * self._size
        behind = self._l2.subclusters if right == self._planner.size else (right - base) // self._unit
        return mask_of(-(-(left - base) // self._unit), behind)


def mask_of(first: int, behind: int) -> int:
    return (1 << behind) - (1 << first) if behind > first else 0


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1
