"""Which key slots of a LUKS header a command changes, and how: QEMU's `amend`, with its options, rules and messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from safeimg.drivers.crypto.luks import DEFAULT_ITER_TIME, SLOTS, Luks, Read, open_slot
from safeimg.drivers.errors import UsageError
from safeimg.drivers.secrets import Secrets


@dataclass(frozen=True, slots=True)
class SlotChange:
    """What becomes of some slots."""

    slots: tuple[int, ...]
    password: bytes | None  # what opens them from now on; None: nothing does
    iter_time: int  # milliseconds


def slot_change(
    luks: Luks, read: Read, given: Mapping[str, str], secrets: Secrets, path: str, *, force: bool
) -> SlotChange:
    """From the options `state`, `keyslot`, `old-secret`, `new-secret`, `iter-time`. `read` reads key material.

    `force` allows what may make the disk unreadable. `UsageError` in QEMU's words for what cannot be done."""
    state = given.get("state")
    if state is None:
        raise UsageError("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise UsageError(f"Parameter 'state' does not accept value '{state}'")
    slot = int(given["keyslot"]) & 0xFFFF_FFFF if "keyslot" in given else None
    refused = ("old-secret",) if state == "active" else ("new-secret", "iter-time")
    what = "activating" if state == "active" else "erasing"
    if state == "active" and "new-secret" not in given:
        raise UsageError("'new-secret' is required to activate a keyslot")
    for name in refused:
        if name in given:
            raise UsageError(f"'{name}' must not be given when {what} keyslots")
    iter_time = int(given.get("iter-time", DEFAULT_ITER_TIME))
    if state == "active":
        password = secrets.password(given["new-secret"])
        return SlotChange((_slot_to_fill(luks, slot, force=force),), password, iter_time)
    old = secrets.password(given["old-secret"]) if "old-secret" in given else None
    if slot is not None and slot >= SLOTS:
        raise _invalid(slot)
    opens = None if old is None else partial(_opens, luks, read, old, path)
    active = [index for index, each in enumerate(luks.slots) if each.active]
    if slot is not None:
        return SlotChange((_slot_to_erase(slot, active, opens, force=force),), None, iter_time)
    return SlotChange(_slots_to_erase(active, opens, force=force), None, iter_time)


def refuse_overwriting(slot: int) -> UsageError:
    """QEMU's message where a slot has to be erased before it gets another password."""
    return UsageError(f"Refusing to overwrite active keyslot {slot} - please erase it first")


def _slot_to_fill(luks: Luks, slot: int | None, *, force: bool) -> int:
    if slot is None:
        free = next((index for index, each in enumerate(luks.slots) if not each.active), None)
        if free is None:
            raise UsageError("Can't add a keyslot - all keyslots are in use")
        return free
    if slot >= SLOTS:
        raise _invalid(slot)
    if luks.slots[slot].active and not force:
        raise refuse_overwriting(slot)
    return slot


def _invalid(slot: int) -> UsageError:
    return UsageError(f"Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}")


def _slot_to_erase(slot: int, active: list[int], opens: partial[bool] | None, *, force: bool) -> int:
    if opens is not None and not (slot in active and opens(slot)):
        raise UsageError(f"Given keyslot {slot} doesn't contain the given old password for erase operation")
    if slot not in active:
        raise UsageError(f"Given keyslot {slot} is already erased (inactive) ")
    if active == [slot] and not force:
        raise UsageError(
            f"Attempt to erase the only active keyslot {slot} which will erase all the data in the image "
            "irreversibly - refusing operation"
        )
    return slot


def _slots_to_erase(active: list[int], opens: partial[bool] | None, *, force: bool) -> tuple[int, ...]:
    if opens is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    matching = [index for index in active if opens(index)]
    if not matching:
        raise UsageError("No keyslots match given (old) password for erase operation")
    if matching == active and not force:
        raise UsageError(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation"
        )
    return tuple(matching)


def _opens(luks: Luks, read: Read, password: bytes, path: str, index: int) -> bool:
    material = read(luks.slots[index].offset, luks.material_bytes)
    return open_slot(luks, index, material, password, path) is not None
