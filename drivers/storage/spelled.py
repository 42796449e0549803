"""What a power cut left, spelled out: the name of a crash state that lists what was lost, so that it can be shortened.

    lost:ITEM+ITEM+…    everything survived, but

    d12                 the data of change 12 (its serial in the run)
    d12@0-512,1024-1536 …except for these bytes of the file
    n12                 the change of names 12
    l104=4096           the length of inode 104, which is 4096
    t104=0, t104=1      the times of inode 104: as on disk, as at its last sync
    a104=1              the attributes of inode 104: which of their versions it has
    r104                the order of the data of inode 104, which arrived newest first
"""

from __future__ import annotations

import re

from safeimg.drivers.storage.durability import Model, Node
from safeimg.drivers.storage.survival import Kept, Plan, Survival, plan_of

PREFIX = "lost:"
_ITEM = re.compile(r"([dnltar])(\d+)(?:=(\d+)|@([\d,-]+))?")


def spell(model: Model, plan: Plan) -> list[str]:
    """The items of a plan."""
    kept = {change.serial for change in plan.names}
    items = [f"n{change.serial}" for change in model.name_changes if change.serial not in kept]
    for number, survival in plan.files.items():
        node = model.nodes[number]
        arrived = {kept.change.serial: kept for kept in survival.writes}
        for change in node.changes:
            if change.pieces and change.serial not in arrived:
                items.append(f"d{change.serial}")
            elif change.pieces and arrived[change.serial].sectors is not None:
                sectors = arrived[change.serial].sectors or ()
                items.append(f"d{change.serial}" + (f"@{_ranges(sectors)}" if sectors else ""))
        if survival.length != node.live.length:
            items.append(f"l{number}={survival.length}")
        if survival.times != (node.live.mtime, node.live.ctime):
            items.append(f"t{number}={int(survival.times != (node.disk.mtime, node.disk.ctime))}")
        if survival.version != len(node.old_attributes):
            items.append(f"a{number}={survival.version}")
        serials = [kept.change.serial for kept in survival.writes]
        if serials != sorted(serials):
            items.append(f"r{number}")
    return items


def spelled(model: Model, items: list[str]) -> Plan:
    """The plan that the items spell. `ValueError` if they do not fit what is unsynced in `model`."""
    plan = plan_of(model, "all", 0, 0)
    for item in items:
        found = _ITEM.fullmatch(item)
        if found is None:
            raise ValueError(f"{item!r} is nothing that can be lost")
        kind, number, value, ranges = found[1], int(found[2]), int(found[3] or 0), found[4]
        if kind == "n":
            names = [change for change in plan.names if change.serial != number]
            if len(names) == len(plan.names):
                raise ValueError(f"{item}: there is no such change")
            plan.names = names
        elif kind == "d":
            _lose(model, plan, number, ranges)
        else:
            _change(model, plan, kind, number, value)
    return plan


def _lose(model: Model, plan: Plan, serial: int, ranges: str | None) -> None:
    for survival in plan.files.values():
        for at, kept in enumerate(survival.writes):
            if kept.change.serial == serial:
                pairs = [part.partition("-") for part in ranges.split(",")] if ranges else []
                if pairs:
                    survival.writes[at] = Kept(kept.change, tuple((int(low), int(high)) for low, _, high in pairs))
                else:
                    del survival.writes[at]
                return
    raise ValueError(f"d{serial}: there is no such change")


def _change(model: Model, plan: Plan, kind: str, number: int, value: int) -> None:
    if number not in plan.files:
        raise ValueError(f"{kind}{number}: there is no such inode")
    node, survival = model.nodes[number], plan.files[number]
    if kind == "l":
        if value not in (node.disk.length, *(change.length for change in node.changes)):
            raise ValueError(f"l{number}={value}: it never had that length")
        survival.length = value
    elif kind == "t":
        survival.times = node.synced_times if value else (node.disk.mtime, node.disk.ctime)
    elif kind == "a":
        _attributes(node, survival, value)
    else:
        survival.writes.reverse()


def _attributes(node: Node, survival: Survival, version: int) -> None:
    versions = [node.disk.attributes, *node.old_attributes[1:], node.live.attributes]
    if version >= len(versions):
        raise ValueError(f"a{node.number}={version}: there is no such version")
    survival.version, survival.attributes = version, versions[version]


def _ranges(sectors: tuple[tuple[int, int], ...]) -> str:
    return ",".join(f"{low}-{high}" for low, high in sectors)
