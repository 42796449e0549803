"""Placements as planners of every format hand them out (see `api.Planner.place`)."""

from __future__ import annotations

from safeimg.drivers.formats.api import Placement


def add_placement(placements: list[Placement], new: Placement) -> None:
    """Appends a placement, joined to the last one if it continues it in the guest and in the file."""
    if placements:
        last = placements[-1]
        joins = last.start + last.length == new.start and last.offset + last.length == new.offset
        if joins and last.fresh == new.fresh:
            placements[-1] = last._replace(length=last.length + new.length)
            return
    placements.append(new)
