"""Crash states: everything that a kill or a power cut could leave of a traced run, or as much of it as asked
for.

    initial ──e1──e2──e3──e4── … ──en          the trace; a crash after any prefix of it
                   │
                   ├─ kill: the prefix as it is, its unsynced changes still unsynced
                   │    whole      nothing in flight
                   │    partial    the next write half done
                   │
                   └─ power: the disk copy plus some of the unsynced changes (the model: `durability.py`); what is
                      left is durable
                        none, all            nothing survived; everything did
                        lose:U               unit U lost, everything else survived. A unit is one change's
                        data, one
                                             new length, one file's new attributes, or one change of names
                        last                 of all data, only the newest change survived
                        data, names          data without lengths and names; lengths and names without data
                        lose-file:N, only-file:N       all that is unsynced of inode N lost, or only that
                        survived head, tail, comb     the newest data torn: its first half, its second half,
                        every other
                                             sector arrived, and everything else
                        head-alone, tail-alone         the same, and nothing else
                        reverse              overlapping writes arrived newest first
                        old-times            everything but times and attributes
                        random:J             seeded subsets, orders and tears, sector by sector

A `CrashState` is a file system of its own. Its `description` names it: `replay` makes the same state again.
`crash_states` on a kill state and the trace of a recovery run on it gives the second crash.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from safeimg.drivers.storage.durability import (
    SECTOR,
    TICK,
    Attributes,
    Change,
    Entry,
    Model,
    NameChange,
    Node,
    clip,
    set_names,
)
from safeimg.drivers.storage.simulated import SimulatedFileSystem, Trace
from safeimg.drivers.storage.sparse import PAGE

Sectors = tuple[tuple[int, int], ...]  # half-open ranges of bytes, multiples of the sector size

_DESCRIPTION = re.compile(r"prefix=(\d+) seed=(-?\d+) kind=(kill|power) member=(\S+)")


class _Kept(NamedTuple):
    """A change whose data arrived: all of it, or only these sectors."""

    change: Change
    sectors: Sectors | None


class _Length(NamedTuple):
    """A new length that did not arrive."""

    inode: int
    wanted: int
    got: int


_Lost = Change | NameChange | _Length


@dataclass(slots=True)
class _Survival:
    """What of one file survived."""

    writes: list[_Kept]  # in the order in which they arrived
    length: int
    times: tuple[int, int]
    attributes: Attributes
    version: int = 0  # which of the attributes, to tell states apart


@dataclass(slots=True)
class _Plan:
    files: dict[int, _Survival]
    names: list[NameChange]


@dataclass(frozen=True, slots=True, eq=False)
class CrashState:
    """The files as a crash left them."""

    fs: SimulatedFileSystem  # its own copy, with an empty trace
    prefix: int  # entries of the trace that had happened
    seed: int
    kind: str  # "kill", "power"
    member: str  # which of the states possible at this prefix
    marks: tuple[str, ...]  # labels set before the crash
    _lost: tuple[_Lost, ...] = field(default=(), repr=False)

    @property
    def description(self) -> str:
        """One line for messages; `replay` reads what is before the `#`."""
        lost = ", ".join(_describe(change) for change in self._lost[:8])
        more = f", and {len(self._lost) - 8} more" if len(self._lost) > 8 else ""
        tail = f" # lost: {lost}{more}" if lost else ""
        return f"prefix={self.prefix} seed={self.seed} kind={self.kind} member={self.member}{tail}"


def crash_states(
    initial: SimulatedFileSystem,
    trace: Trace,
    *,
    seed: int = 0,
    prefixes: str | int | Sequence[int] = "all",
    subsets_per_prefix: int = 4,
    singles_per_prefix: int = 12,
    kinds: Sequence[str] = ("kill", "power"),
    unique: bool = True,
) -> Iterator[CrashState]:
    """The crash states of a run that began at `initial` (see `begin_trace`) and did `trace`.

    `prefixes`: "all", a number of them to sample, or which. Each gives the deterministic members, of `lose:U`
    at most `singles_per_prefix` (sampled; those of the newest change are always there), and
    `subsets_per_prefix` random ones. `unique` leaves out states that came before with the same marks: a crash
    right after a sync, for example, is mostly the same as many others. `initial` and `trace` are not changed,
    and may both be used again.
    """
    wanted = _prefixes(prefixes, len(trace), seed)
    model = initial.clone()._model
    done = 0
    seen: set[object] = set()
    for prefix in wanted:
        for entry in trace.entries[done:prefix]:
            model.apply(entry)
        done = prefix
        marks = trace.labels(prefix)
        following = trace.entries[prefix] if prefix < len(trace) else None
        place = (len(marks), following is None)  # a judge may expect more after a mark, and at the very end
        for kind, member in _members(model, following, seed, prefix, subsets_per_prefix, singles_per_prefix):
            if kind not in kinds:
                continue
            if kind == "kill":
                if unique and member == "whole" and prefix - 1 in wanted and _only_synced(trace, prefix):
                    continue
                plan = None
            else:
                plan = _plan(model, member, seed, prefix)
                key = (place, _key(model, plan))
                if unique and key in seen:
                    continue
                if unique:
                    seen.add(key)
            yield _state(initial, model, plan, following, prefix, seed, kind, member, marks)


def replay(initial: SimulatedFileSystem, trace: Trace, description: str) -> CrashState:
    """The one state that a description names. Takes as long as running the prefix."""
    found = _DESCRIPTION.match(description.strip())
    if found is None:
        raise ValueError(f"not the description of a crash state: {description!r}")
    prefix, seed, kind, member = int(found[1]), int(found[2]), found[3], found[4]
    if prefix > len(trace):
        raise ValueError(f"prefix {prefix} of a trace of {len(trace)} entries")
    model = initial.clone()._model
    for entry in trace.entries[:prefix]:
        model.apply(entry)
    following = trace.entries[prefix] if prefix < len(trace) else None
    plan = _plan(model, member, seed, prefix) if kind == "power" else None
    return _state(initial, model, plan, following, prefix, seed, kind, member, trace.labels(prefix))


def power_cut(fs: SimulatedFileSystem, member: str = "none", *, seed: int = 0) -> SimulatedFileSystem:
    """What is left of `fs` if the power goes now: by default nothing that is not synced."""
    model = fs.clone()._model
    return _state(fs, model, _plan(model, member, seed, 0), None, 0, seed, "power", member, ()).fs


def _prefixes(prefixes: str | int | Sequence[int], total: int, seed: int) -> Sequence[int]:
    if prefixes == "all":
        return range(total + 1)
    if isinstance(prefixes, int):
        inner = range(1, total)
        chosen = random.Random(f"{seed}:prefixes").sample(inner, max(min(prefixes - 2, len(inner)), 0))
        return sorted({0, total, *chosen})
    if isinstance(prefixes, str):
        raise ValueError(f"prefixes={prefixes!r}: it is 'all', a number or a list of numbers")
    if any(not 0 <= prefix <= total for prefix in prefixes):
        raise ValueError(f"prefixes outside the trace, which has {total} entries")
    return sorted(set(prefixes))


def _only_synced(trace: Trace, prefix: int) -> bool:
    """Whether a process killed after the last entry leaves what it left before it, only less of it
    unsynced."""
    if prefix == len(trace) or any(position == prefix for position, _ in trace.marks):
        return False
    return trace.entries[prefix - 1].kind in ("sync", "sync_all", "sync_directory")


# ---- which states


def _units(model: Model) -> list[tuple[str, int, int]]:
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


def _newest(model: Model) -> Change | None:
    changes = [change for node in model.nodes.values() for change in node.changes[-1:] if change.pieces]
    return max(changes, key=lambda change: change.serial, default=None)


def _members(
    model: Model, following: Entry | None, seed: int, prefix: int, subsets: int, singles: int
) -> Iterator[tuple[str, str]]:
    yield "kill", "whole"
    if following is not None and following.kind == "write" and len(following.data) > PAGE:
        yield "kill", "partial"
    yield "power", "none"
    yield "power", "all"
    units = _units(model)
    if not units:
        if any(node.disk.ctime != node.live.ctime for node in model.nodes.values()):
            yield "power", "old-times"
        return
    numbers = list(range(len(units)))
    if len(numbers) > singles:
        latest = max(serial for _, _, serial in units)
        always = [number for number in numbers if units[number][2] == latest]
        others = [number for number in numbers if units[number][2] != latest]
        numbers = sorted(
            always
            + random.Random(f"{seed}:{prefix}:singles").sample(
                others, max(min(singles - len(always), len(others)), 0)
            )
        )
    for number in numbers:
        yield "power", f"lose:{number}"
    for member in ("last", "data", "names"):
        yield "power", member
    files = [node.number for node in model.nodes.values() if node.changes]
    if len(files) > 1:
        for inode in files:
            yield "power", f"lose-file:{inode}"
            yield "power", f"only-file:{inode}"
    newest = _newest(model)
    if newest is not None and sum(piece.length for piece in newest.pieces) > SECTOR:
        for member in ("head", "tail", "comb", "head-alone", "tail-alone"):
            yield "power", member
    if any(_overlapping(node.changes) for node in model.nodes.values()):
        yield "power", "reverse"
    yield "power", "old-times"
    for number in range(subsets):
        yield "power", f"random:{number}"


def _overlapping(changes: Sequence[Change]) -> bool:
    ranges = sorted((p.offset, p.offset + p.length) for c in changes for p in c.pieces if p.kind != "reserve")
    return any(first[1] > second[0] for first, second in pairwise(ranges))


# ---- what survives in each of them


def _plan(model: Model, member: str, seed: int, prefix: int) -> _Plan:
    name, _, argument = member.partition(":")
    if name == "random":
        return _random_plan(model, random.Random(f"{seed}:{prefix}:{member}"))
    if name == "none":
        return _Plan({node.number: _nothing(node) for node in model.nodes.values()}, [])
    everything = _Plan(
        {node.number: _everything(node) for node in model.nodes.values()}, list(model.name_changes)
    )
    files = everything.files
    if name == "all":
        pass
    elif name == "lose":
        _lose(model, everything, _units(model)[int(argument)])
    elif name in ("lose-file", "only-file"):
        for number in files:
            if (number == int(argument)) == (name == "lose-file"):
                files[number] = _nothing(model.nodes[number])
    elif name == "last":
        newest = _newest(model)
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


def _nothing(node: Node) -> _Survival:
    return _Survival([], node.disk.length, (node.disk.mtime, node.disk.ctime), node.disk.attributes)


def _everything(node: Node) -> _Survival:
    live = node.live
    writes = [_Kept(change, None) for change in node.changes if change.pieces]
    return _Survival(writes, live.length, (live.mtime, live.ctime), live.attributes, len(node.old_attributes))


def _lose(model: Model, plan: _Plan, unit: tuple[str, int, int]) -> None:
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


def _tear_newest(model: Model, plan: _Plan, how: str) -> None:
    newest = _newest(model)
    for number, survival in plan.files.items():
        alone = how.endswith("-alone")
        writes = [kept for kept in survival.writes if not alone or kept.change is newest]
        if alone and not writes:
            plan.files[number] = _nothing(model.nodes[number])
            continue
        survival.writes = [
            _Kept(kept.change, _part(kept.change, how)) if kept.change is newest else kept for kept in writes
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


def _random_plan(model: Model, rng: random.Random) -> _Plan:
    """Each file all, none or part of it; then each change whole, torn or lost, in order or not."""
    files: dict[int, _Survival] = {}
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
    return _Plan(files, [change for change in model.name_changes if rng.random() < rate])


def _random_survival(node: Node, rng: random.Random) -> _Survival:
    rate, tearing = rng.choice((0.1, 0.5, 0.9)), rng.choice((0.0, 0.1, 0.5))
    survival = _nothing(node)
    for change in node.changes:
        if change.pieces and rng.random() < rate:
            start, end = _extent(change)
            torn = end - start > SECTOR and rng.random() < tearing
            survival.writes.append(_Kept(change, _random_sectors(start, end, rng) if torn else None))
    if len(survival.writes) > 1 and rng.random() < 0.5:
        rng.shuffle(survival.writes)
    lengths = [node.disk.length, *(change.length for change in node.changes if change.length is not None)]
    survival.length = lengths[-1] if rng.random() < 0.5 else rng.choice(lengths)
    return survival


def _random_sectors(start: int, end: int, rng: random.Random) -> Sectors:
    """Some sectors of a range: each by a coin if they are few, else between a few random cuts."""
    sectors = (end - start) // SECTOR
    cuts = range(1, sectors) if sectors <= 16 else sorted(rng.sample(range(1, sectors), rng.randint(1, 6)))
    bounds = [start, *(start + cut * SECTOR for cut in cuts), end]
    return tuple(pair for pair in pairwise(bounds) if rng.random() < 0.5)


# ---- making them


def _surviving_names(model: Model, plan: _Plan) -> dict[str, dict[str, int]]:
    names = {path: dict(entries) for path, entries in model.disk_names.items()}
    for change in plan.names:
        set_names(names, change)
    return names


def _key(model: Model, plan: _Plan) -> object:
    """Equal for plans that leave the same: what cannot be reached does not count."""
    names = _surviving_names(model, plan)
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


def _survivor(node: Node, survival: _Survival) -> Node:
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


def _state(
    initial: SimulatedFileSystem,
    model: Model,
    plan: _Plan | None,
    following: Entry | None,
    prefix: int,
    seed: int,
    kind: str,
    member: str,
    marks: tuple[str, ...],
) -> CrashState:
    lost: tuple[_Lost, ...] = ()
    if plan is None:
        after = model.clone()
        if member == "partial":
            if following is None or following.kind != "write":
                raise ValueError(f"no write follows prefix {prefix}")
            pages = len(following.data) // 2 // PAGE
            after.apply(following._replace(data=following.data[: max(pages, 1) * PAGE]))
        elif member != "whole":
            raise ValueError(f"no state of a killed process is called {member!r}")
    else:
        after = Model()
        after.directories = _surviving_names(model, plan)
        after.disk_names = {path: dict(entries) for path, entries in after.directories.items()}
        after.clock, after.serial, after.next_number = model.clock + TICK, model.serial, model.next_number
        reachable = sorted({number for entries in after.directories.values() for number in entries.values()})
        after.nodes = {number: _survivor(model.nodes[number], plan.files[number]) for number in reachable}
        whole = {
            kept.change.serial for file in plan.files.values() for kept in file.writes if kept.sectors is None
        }
        lost = (
            *(
                change
                for node in model.nodes.values()
                for change in node.changes
                if change.pieces and change.serial not in whole
            ),
            *(
                _Length(number, model.nodes[number].live.length, file.length)
                for number, file in plan.files.items()
                if file.length != model.nodes[number].live.length
            ),
            *(change for change in model.name_changes if change not in plan.names),
        )
    return CrashState(initial._with_model(after), prefix, seed, kind, member, marks, lost)


def _describe(change: _Lost) -> str:
    if isinstance(change, Change):
        return f"{change.kind} #{change.serial} {change.offset:#x}+{change.size}"
    if isinstance(change, _Length):
        return f"inode {change.inode} is {change.got} long, not {change.wanted}"
    return f"{change.kind} " + " ".join(
        f"{directory.rstrip('/')}/{name}" for (directory, name), _ in change.sets
    )
