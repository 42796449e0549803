"""What survives a power cut: plans for the crash states that `powercut` names, and carrying them out.

A plan says for each file which of its unsynced changes arrived (whole or some sectors, in which order), how
long it is and which times and attributes it has, and which changes of names arrived.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.durability import (
    SECTOR,
    TICK,
    Attributes,
    Change,
    Model,
    NameChange,
    Node,
    clip,
    set_names,
)
from safeimg.drivers.storage.lookup import joined

Sectors = tuple[tuple[int, int], ...]  # half-open ranges of bytes, multiples of the sector size


class Kept(NamedTuple):
    """A change whose data arrived: all of it, or only these sectors."""

    change: Change
    sectors: Sectors | None


class Loss(NamedTuple):
    """A change (the data of a file, or of names) that did not arrive, or the length that a file has
    instead."""

    inode: int
    what: Change | NameChange | int


@dataclass(slots=True)
class Survival:
    """What of one file survived."""

    writes: list[Kept]  # in the order in which they arrived
    length: int
    times: tuple[int, int]
    attributes: Attributes
    version: int = 0  # which of the attributes, to tell states apart


@dataclass(slots=True)
class Plan:
    """What survives a power cut."""

    files: dict[int, Survival]  # by inode
    names: list[NameChange]


# ---- what can be lost


def units(model: Model) -> list[tuple[str, int, int]]:
    """What can be lost alone: (kind, inode, serial), oldest first in each file."""
    units: list[tuple[str, int, int]] = []
    for node in model.nodes.values():
        for change in node.changes:
            if change.pieces:
                units.append(("data", node.number, change.serial))
            if change.length is not None:
                units.append(("length", node.number, change.serial))
        if node.old_attributes:
            units.append(("attributes", node.number, 0))
    units.extend(("names", 0, change.serial) for change in model.name_changes)
    return units


def newest_data(model: Model) -> Change | None:
    """The newest unsynced change of any file that has data."""
    changes = [change for node in model.nodes.values() for change in node.changes[-1:] if change.pieces]
    return max(changes, key=lambda change: change.serial, default=None)


def overlapping(changes: Sequence[Change]) -> bool:
    """Whether the order in which they arrive makes a difference."""
    ranges = sorted((p.offset, p.offset + p.length) for c in changes for p in c.pieces if p.kind != "reserve")
    return any(first[1] > second[0] for first, second in pairwise(ranges))


# ---- plans: which of it is


def plan_of(model: Model, member: str, seed: int, prefix: int) -> Plan:
    """What survives in the member of that name (`powercut` lists them). `ValueError` if there is none."""
    name, _, argument = member.partition(":")
    if name == "random":
        return _random_plan(model, random.Random(f"{seed}:{prefix}:{member}"))
    if name == "none":
        return Plan({node.number: _nothing(node) for node in model.nodes.values()}, [])
    everything = Plan(
        {node.number: _everything(node) for node in model.nodes.values()}, list(model.name_changes)
    )
    files = everything.files
    if name == "all":
        pass
    elif name == "lose":
        _lose(model, everything, units(model)[int(argument)])
    elif name in ("lose-file", "only-file"):
        for number in files:
            if (number == int(argument)) == (name == "lose-file"):
                files[number] = _nothing(model.nodes[number])
    elif name == "last":
        newest = newest_data(model)
        for survival in files.values():
            survival.writes = [kept for kept in survival.writes if kept.change is newest]
    elif name == "data":
        for number, survival in files.items():
            survival.length = model.nodes[number].disk.length
        everything.names = []
    elif name == "names":
        for survival in files.values():
            survival.writes = []
    elif name in ("head", "tail", "comb", "head-alone", "tail-alone"):
        _tear_newest(model, everything, name)
    elif name == "reverse":
        for survival in files.values():
            survival.writes.reverse()
    elif name == "old-times":
        for number, survival in files.items():
            old = _nothing(model.nodes[number])
            survival.times, survival.attributes, survival.version = old.times, old.attributes, old.version
    else:
        raise ValueError(f"no crash state is called {member!r}")
    return everything


def _nothing(node: Node) -> Survival:
    return Survival([], node.disk.length, (node.disk.mtime, node.disk.ctime), node.disk.attributes)


def _everything(node: Node) -> Survival:
    live = node.live
    writes = [Kept(change, None) for change in node.changes if change.pieces]
    return Survival(writes, live.length, (live.mtime, live.ctime), live.attributes, len(node.old_attributes))


def _lose(model: Model, plan: Plan, unit: tuple[str, int, int]) -> None:
    kind, number, serial = unit
    if kind == "names":
        plan.names = [change for change in plan.names if change.serial != serial]
        return
    node, survival = model.nodes[number], plan.files[number]
    if kind == "data":
        survival.writes = [kept for kept in survival.writes if kept.change.serial != serial]
    elif kind == "length":
        lengths = [
            change.length for change in node.changes if change.length is not None and change.serial != serial
        ]
        survival.length = lengths[-1] if lengths else node.disk.length
    else:
        survival.attributes, survival.version = node.disk.attributes, 0


def _tear_newest(model: Model, plan: Plan, how: str) -> None:
    newest = newest_data(model)
    for number, survival in plan.files.items():
        alone = how.endswith("-alone")
        writes = [kept for kept in survival.writes if not alone or kept.change is newest]
        if alone and not writes:
            plan.files[number] = _nothing(model.nodes[number])
            continue
        survival.writes = [
            Kept(kept.change, _part(kept.change, how)) if kept.change is newest else kept for kept in writes
        ]


def _part(change: Change, how: str) -> Sectors:
    start, end = _extent(change)
    middle = (start + end) // 2 // SECTOR * SECTOR
    if how.startswith("head"):
        return ((start, middle),)
    if how.startswith("tail"):
        return ((middle, end),)
    step = max((end - start) // 64 // SECTOR, 1) * SECTOR  # long ones in 64 parts
    return tuple((at, at + step) for at in range(start, end, 2 * step))


def _extent(change: Change) -> tuple[int, int]:
    start = (
        min(piece.offset for piece in change.pieces) // SECTOR * SECTOR
    )  # "reserve" is not in whole sectors
    return start, -(-max(piece.offset + piece.length for piece in change.pieces) // SECTOR) * SECTOR


def _random_plan(model: Model, rng: random.Random) -> Plan:
    """Each file all, none or part of it; then each change whole, torn or lost, in order or not."""
    files: dict[int, Survival] = {}
    for node in model.nodes.values():
        mode = rng.random()
        if mode < 0.2:
            survival = _nothing(node)
        elif mode < 0.4:
            survival = _everything(node)
        else:
            survival = _random_survival(node, rng)
        survival.times = rng.choice(
            ((node.disk.mtime, node.disk.ctime), node.synced_times, (node.live.mtime, node.live.ctime))
        )
        versions = [node.disk.attributes, *node.old_attributes[1:], node.live.attributes]
        survival.version = rng.randrange(len(node.old_attributes) + 1)
        survival.attributes = versions[survival.version]
        files[node.number] = survival
    rate = rng.choice((0.0, 0.5, 0.9, 1.0))
    return Plan(files, [change for change in model.name_changes if rng.random() < rate])


def _random_survival(node: Node, rng: random.Random) -> Survival:
    """Each change whole, torn or lost. Kept in order: one that another overtook is one torn where they
    overlap."""
    rate, tearing = rng.choice((0.1, 0.5, 0.9)), rng.choice((0.0, 0.3, 0.9))
    survival = _nothing(node)
    for change in node.changes:
        if change.pieces and rng.random() < rate:
            start, end = _extent(change)
            torn = end - start > SECTOR and rng.random() < tearing
            survival.writes.append(Kept(change, _random_sectors(start, end, rng) if torn else None))
    lengths = [node.disk.length, *(change.length for change in node.changes if change.length is not None)]
    survival.length = lengths[-1] if rng.random() < 0.5 else rng.choice(lengths)
    return survival


def _random_sectors(start: int, end: int, rng: random.Random) -> Sectors:
    """Some sectors of a range: each by a coin if they are few, else between a few random cuts."""
    sectors = (end - start) // SECTOR
    cuts = range(1, sectors) if sectors <= 16 else sorted(rng.sample(range(1, sectors), rng.randint(1, 6)))
    bounds = [start, *(start + cut * SECTOR for cut in cuts), end]
    return tuple(pair for pair in pairwise(bounds) if rng.random() < 0.5)


# ---- carrying them out


def surviving_names(model: Model, plan: Plan) -> dict[str, dict[str, int]]:
    names = {path: dict(entries) for path, entries in model.disk_names.items()}
    for change in plan.names:
        set_names(names, change)
    return names


def key_of(model: Model, plan: Plan) -> object:
    """Equal for plans that leave the same: what cannot be reached does not count."""
    names = surviving_names(model, plan)
    reachable = sorted({number for entries in names.values() for number in entries.values()})
    files = tuple(
        (
            number,
            model.nodes[number].disk_version,
            survival.length,
            survival.times,
            survival.version,
            tuple((kept.change.serial, kept.sectors) for kept in survival.writes),
        )
        for number, survival in ((number, plan.files[number]) for number in reachable)
    )
    return hash(
        (files, tuple((path, tuple(sorted(entries.items()))) for path, entries in sorted(names.items())))
    )


def _survivor(node: Node, survival: Survival) -> Node:
    copy = node.disk.clone()
    for change, sectors in survival.writes:
        for piece in change.pieces:
            if sectors is None:
                copy.apply(piece)
                continue
            for start, end in sectors:
                part = clip(piece, start, end)
                if part is not None:
                    copy.apply(part)
    ends = [0, *(_extent(kept.change)[1] for kept in survival.writes)]
    if max(node.disk.length, *ends) > survival.length:
        copy.content.erase(survival.length, copy.content.end() - survival.length)
    copy.length = survival.length
    copy.mtime, copy.ctime = survival.times
    copy.attributes = survival.attributes
    return Node(node.number, node.home, copy, copy.clone(), node.target)


def survivors(model: Model, plan: Plan) -> Model:
    """The files after the power cut, all of it durable."""
    after = Model()
    after.directories = surviving_names(model, plan)
    after.disk_names = {path: dict(entries) for path, entries in after.directories.items()}
    after.clock, after.serial, after.next_number = model.clock + TICK, model.serial, model.next_number
    reachable = sorted({number for entries in after.directories.values() for number in entries.values()})
    after.nodes = {number: _survivor(model.nodes[number], plan.files[number]) for number in reachable}
    return after


def losses(model: Model, plan: Plan) -> tuple[Loss, ...]:
    """What did not arrive, or not whole."""
    whole = {
        kept.change.serial for file in plan.files.values() for kept in file.writes if kept.sectors is None
    }
    kept_names = {change.serial for change in plan.names}
    return (
        *(
            Loss(node.number, change)
            for node in model.nodes.values()
            for change in node.changes
            if change.pieces and change.serial not in whole
        ),
        *(
            Loss(number, file.length)
            for number, file in plan.files.items()
            if file.length != model.nodes[number].live.length
        ),
        *(Loss(0, change) for change in model.name_changes if change.serial not in kept_names),
    )


def tell(loss: Loss) -> str:
    """In words, for descriptions of crash states."""
    what = loss.what
    if isinstance(what, Change):
        return f"{what.kind} inode {loss.inode} {what.offset:#x}+{what.size}"
    if isinstance(what, int):
        return f"inode {loss.inode} is {what} bytes long"
    return f"{what.kind} " + " ".join(joined(place) for place, _ in what.sets)
