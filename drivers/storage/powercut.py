"""Crash states: what a kill or a power cut could leave of a traced run, all of it or as much as asked for.

    initial ──e1──e2──e3──e4── … ──en      the trace; a crash after any prefix of it
                   │
                   ├─ kill: the prefix as it is, its unsynced changes still unsynced
                   └─ power: the disk copy plus some of the unsynced changes; what is left is durable

    member             what happened (`durability.py` has the rules)
    kill whole         nothing in flight
    kill partial       the next write half done
    power none, all    nothing unsynced survived; everything did
    lose:U             unit U was lost, everything else survived. A unit is one change's data, one new length,
                       one file's new attributes, or one change of names
    last               of all data, only the newest change survived
    data, names        data without lengths and names; lengths and names without data
    lose-file:N        all that is unsynced of inode N was lost
    only-file:N        of data, lengths and attributes, only those of inode N survived
    head, tail, comb   the newest data torn: its first or second half or every other sector; the rest survived
    head-alone, …      the same, and nothing else survived
    reverse            overlapping writes arrived newest first
    old-times          everything but times and attributes
    random:J           seeded subsets and tears (and so orders) of everything, sector by sector
    lost:…             what was lost, item by item (`spelled.py`): not among `crash_states`, to be replayed

A `CrashState` is a file system of its own. Its `description` names it: `replay` makes the same state again.
`crash_states` on a kill state and the trace of a recovery run on it gives the second crash.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from safeimg.drivers.storage.durability import SECTOR, Entry, Model
from safeimg.drivers.storage.simulated import SimulatedFileSystem, Trace
from safeimg.drivers.storage.sparse import PAGE
from safeimg.drivers.storage.spelled import PREFIX, spell, spelled
from safeimg.drivers.storage.survival import (
    Loss,
    Plan,
    key_of,
    losses,
    newest_data,
    overlapping,
    plan_of,
    survivors,
    tell,
    units,
)

_DESCRIPTION = re.compile(r"prefix=(\d+) seed=(-?\d+) kind=(kill|power) member=(\S+)")


@dataclass(frozen=True, slots=True, eq=False)
class CrashState:
    """The files as a crash left them."""

    fs: SimulatedFileSystem  # its own copy, with an empty trace
    prefix: int  # entries of the trace that had happened
    seed: int
    kind: str  # "kill", "power"
    member: str  # which of the states possible at this prefix
    marks: tuple[str, ...]  # labels set before the crash
    _lost: tuple[Loss, ...] = field(default=(), repr=False)

    @property
    def description(self) -> str:
        """One line for messages; `replay` reads what is before the `#`."""
        lost = ", ".join(tell(loss) for loss in self._lost[:8])
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
    chosen = frozenset(wanted)
    model = initial.clone().model
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
                if unique and member == "whole" and prefix - 1 in chosen and _only_synced(trace, prefix):
                    continue
                plan = None
            else:
                plan = plan_of(model, member, seed, prefix)
                key = (place, key_of(model, plan))
                if unique and key in seen:
                    continue
                if unique:
                    seen.add(key)
            yield _state(initial, model, following, prefix, seed, kind, member, marks, plan)


def replay(initial: SimulatedFileSystem, trace: Trace, description: str) -> CrashState:
    """The one state that a description names. Takes as long as running the prefix."""
    prefix, seed, kind, member = _parsed(description)
    model = _after(initial, trace, prefix)
    following = trace.entries[prefix] if prefix < len(trace) else None
    return _state(initial, model, following, prefix, seed, kind, member, trace.labels(prefix))


def spell_out(initial: SimulatedFileSystem, trace: Trace, description: str) -> tuple[int, list[str]] | None:
    """What the power cut of a description lost, item by item, and the prefix; None for a process that was killed."""
    prefix, seed, kind, member = _parsed(description)
    if kind == "kill":
        return None
    model = _after(initial, trace, prefix)
    return prefix, spell(model, _plan(model, member, seed, prefix))


def spelled_description(prefix: int, items: Sequence[str]) -> str:
    """The description of the state in which that was lost."""
    return f"prefix={prefix} seed=0 kind=power member={PREFIX + '+'.join(items) if items else 'all'}"


def _parsed(description: str) -> tuple[int, int, str, str]:
    found = _DESCRIPTION.match(description.strip())
    if found is None:
        raise ValueError(f"not the description of a crash state: {description!r}")
    return int(found[1]), int(found[2]), found[3], found[4]


def _after(initial: SimulatedFileSystem, trace: Trace, prefix: int) -> Model:
    if prefix > len(trace):
        raise ValueError(f"prefix {prefix} of a trace of {len(trace)} entries")
    model = initial.clone().model
    for entry in trace.entries[:prefix]:
        model.apply(entry)
    return model


def _plan(model: Model, member: str, seed: int, prefix: int) -> Plan:
    if member.startswith(PREFIX):
        return spelled(model, member.removeprefix(PREFIX).split("+"))
    return plan_of(model, member, seed, prefix)


def power_cut(fs: SimulatedFileSystem, member: str = "none", *, seed: int = 0) -> SimulatedFileSystem:
    """What is left of `fs` if the power goes now: by default nothing that is not synced."""
    model = fs.clone().model
    return fs.with_model(survivors(model, plan_of(model, member, seed, 0)))


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


def _members(
    model: Model, following: Entry | None, seed: int, prefix: int, subsets: int, singles: int
) -> Iterator[tuple[str, str]]:
    yield "kill", "whole"
    if following is not None and following.kind == "write" and len(following.data) > PAGE:
        yield "kill", "partial"
    yield "power", "none"
    yield "power", "all"
    possible = units(model)
    if not possible:
        if any(node.disk.ctime != node.live.ctime for node in model.nodes.values()):
            yield "power", "old-times"
        return
    numbers = list(range(len(possible)))
    if len(numbers) > singles:
        latest = max(serial for _, _, serial in possible)
        always = [number for number in numbers if possible[number][2] == latest]
        others = [number for number in numbers if possible[number][2] != latest]
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
    newest = newest_data(model)
    if newest is not None and sum(piece.length for piece in newest.pieces) > SECTOR:
        for member in ("head", "tail", "comb", "head-alone", "tail-alone"):
            yield "power", member
    if any(overlapping(node.changes) for node in model.nodes.values()):
        yield "power", "reverse"
    yield "power", "old-times"
    for number in range(subsets):
        yield "power", f"random:{number}"


def _state(
    initial: SimulatedFileSystem,
    model: Model,
    following: Entry | None,
    prefix: int,
    seed: int,
    kind: str,
    member: str,
    marks: tuple[str, ...],
    plan: Plan | None = None,
) -> CrashState:
    lost: tuple[Loss, ...] = ()
    if kind == "power":
        plan = plan or _plan(model, member, seed, prefix)
        after, lost = survivors(model, plan), losses(model, plan)
    elif member == "whole":
        after = model.clone()
    elif member == "partial" and following is not None and following.kind == "write":
        after = model.clone()
        pages = max(len(following.data) // 2 // PAGE, 1)
        after.apply(following._replace(data=following.data[: pages * PAGE]))
    else:
        raise ValueError(f"no state of a process killed at prefix {prefix} is called {member!r}")
    return CrashState(initial.with_model(after), prefix, seed, kind, member, marks, lost)
