"""Planning writes into VDI images: steps applied as the engine does, crash states, qemu-img's opinion of each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from planner_harness import needs_qemu
from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.api import Changes, Patch, Placement
from safeimg.drivers.formats.vdi.driver import driver
from vdi_images import MIB, block_map, create, filled, guest, opened, poke, run, write

pytestmark = needs_qemu


def check(path: Path) -> None:
    run("qemu-img", "check", "-f", "vdi", path)


def leaks_at_worst(path: Path) -> None:
    """More blocks are counted than referred to: what qemu-img calls a mismatch is all that may be wrong."""
    output = run("qemu-img", "check", "-f", "vdi", path, ok=(0, 2))
    count, entries = block_map(path)
    used = [entry for entry in entries if entry < 0xFFFFFFFE]
    assert count >= len(used) and all(entry < count for entry in used)
    assert output.count("ERROR") == output.count("mismatch") == (count > len(used))


def apply(path: Path, changes: Changes) -> None:
    with path.open("r+b") as file:
        if changes.length is not None and changes.length > path.stat().st_size:
            file.truncate(changes.length)
        for patch in (*changes.allocate, *changes.link):
            if patch.before is not None:
                file.seek(patch.offset)
                assert file.read(len(patch.before)) == patch.before
            file.seek(patch.offset)
            file.write(patch.after)


def fill(path: Path, places: list[Placement], model: bytearray) -> None:
    """Writes what the guest disk holds to where it goes."""
    with path.open("r+b") as file:
        for place in places:
            file.seek(place.offset)
            file.write(model[place.start : place.start + place.length])


@pytest.mark.parametrize("seed", range(4))
def test_steps_crashes_and_rollback(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = filled(tmp_path / "image.vdi", rng, static=seed == 3)
    original, before = path.read_bytes(), guest(path)
    model = bytearray(before)
    steps: list[Changes] = []
    planner = driver.planner(opened(path, write=True))
    for _ in range(2):
        start = rng.randrange(len(model)) & ~511
        length = min(len(model) - start, 512 * rng.randrange(1, 6000))
        places = list(planner.place(start, length))
        model[start : start + length] = rng.randbytes(length)
        fresh = [place for place in places if place.fresh]
        live = [place for place in places if not place.fresh]
        assert all(place.start % MIB == 0 for place in fresh)
        unlinked = guest(path)
        sectors = range(0, len(model), 512)
        fill(path, fresh, model)
        assert guest(path) == unlinked
        changes = planner.take()
        lost = changes._replace(link=tuple(patch for patch in changes.link if rng.random() < 0.5))
        crashed = tmp_path / "crashed.vdi"
        crashed.write_bytes(path.read_bytes())
        apply(crashed, lost)
        leaks_at_worst(crashed)
        seen = guest(crashed)
        assert all(seen[at : at + 512] in (unlinked[at : at + 512], model[at : at + 512]) for at in sectors)
        fill(path, live, model)
        apply(path, changes)
        steps.append(changes)
        check(path)
        assert guest(path) == model
    assert not planner.release()
    assert planner.freed() == ()
    for changes in reversed(steps):
        for patch in reversed((*changes.allocate, *changes.link)):
            assert patch.before is not None
            with path.open("r+b") as file:
                file.seek(patch.offset)
                file.write(patch.before)
    assert path.read_bytes()[:1024] == original[:1024]


def test_zero_is_in_place_and_free_where_there_is_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "image.vdi", "4M")
    write(path, "write -P 1 1M 2M")
    planner = driver.planner(opened(path, write=True))
    assert planner.zero(0, 4 * MIB) == [Placement(MIB, 2 * MIB, 1024, False)]
    assert planner.zero(MIB + 512, 1024) == [Placement(MIB + 512, 1024, 1536, False)]
    assert planner.zero(0, 700) == []
    assert not planner.take()


def test_places(tmp_path: Path) -> None:
    path = create(tmp_path / "image.vdi", str(4 * MIB + 512))
    write(path, "write -P 1 1M 512")
    planner = driver.planner(opened(path, write=True))
    assert planner.place(MIB + 512, 3 * MIB) == [
        Placement(MIB + 512, MIB - 512, 1536, False),
        Placement(2 * MIB, 2 * MIB + 512, 1024 + MIB, True),
    ]
    changes = planner.take()
    assert changes.allocate == (Patch(0x184, b"\1\0\0\0", b"\4\0\0\0"),)
    assert [patch.offset for patch in changes.link] == [520]
    assert changes.length == 1024 + 4 * MIB
    assert planner.place(2 * MIB, 512) == [Placement(2 * MIB, 512, 1024 + MIB, False)]
    assert planner.place(5, 0) == planner.zero(MIB + 5, 0) == []
    with pytest.raises(ValueError, match="is not in"):
        planner.place(4 * MIB, 513)


def test_a_block_that_a_crash_left_behind_is_used_next(tmp_path: Path) -> None:
    """Counted, and referred to by nobody: taking it makes the image right again."""
    path = create(tmp_path / "image.vdi", "4M")
    write(path, "write -P 1 1M 512")
    planner = driver.planner(opened(path, write=True))
    planner.place(0, MIB)
    apply(path, planner.take()._replace(link=()))
    run("qemu-img", "check", "-f", "vdi", path, ok=(2,))
    write(path, "write -P 3 3M 512")  # a guest takes the next one
    assert block_map(path) == (3, [0xFFFFFFFF, 0, 0xFFFFFFFF, 2])
    planner = driver.planner(opened(path, write=True))
    assert planner.place(2 * MIB, MIB) == [Placement(2 * MIB, MIB, 1024 + MIB, True)]
    apply(path, planner.take())
    assert block_map(path) == (3, [0xFFFFFFFF, 0, 1, 2])
    check(path)


def test_blocks_behind_the_count_are_not_given_away(tmp_path: Path) -> None:
    path = create(tmp_path / "image.vdi", "4M")
    write(path, "write -P 1 1M 512")
    poke(path, (512 + 4, 2))
    planner = driver.planner(opened(path, write=True))
    assert [place.offset for place in planner.place(2 * MIB, 2 * MIB)] == [1024]
    apply(path, planner.take())
    assert block_map(path) == (3, [0xFFFFFFFF, 2, 0, 1])
    check(path)


@pytest.mark.parametrize("entry", [0, 10, 0xFFFFFFFD])
def test_a_damaged_map_is_not_written_to(tmp_path: Path, entry: int) -> None:
    path = create(tmp_path / "image.vdi", "4M")
    write(path, "write -P 1 1M 512")
    poke(path, (512, entry))
    planner = driver.planner(opened(path, write=True))
    with pytest.raises(FormatError, match="the block map is damaged"):
        planner.place(2 * MIB, 512)


def test_what_the_format_has_not(tmp_path: Path) -> None:
    image = opened(create(tmp_path / "image.vdi", "4M"), write=True)
    planner = driver.planner(image)
    for size in (8 * MIB, 4 * MIB, MIB):
        with pytest.raises(UnsupportedError, match=r"^Image format driver does not support resize$"):
            planner.prepare_resize(size)
    with pytest.raises(UnsupportedError, match="compressed"):
        planner.place_compressed(0, [100])
    with pytest.raises(UnsupportedError, match="emptied"):
        planner.empty()
    assert not planner.reserve(10)
    assert not planner.mark_dirty([(0, MIB)])
    assert not driver.fence(image)
    assert driver.unfence(image) == ()


def test_what_is_in_use(tmp_path: Path) -> None:
    path = create(tmp_path / "image.vdi", "4M")
    image = opened(path)
    assert driver.used_end(image) == 1024
    write(path, "write -P 1 1M 512", "write -P 1 3M 512")
    poke(path, (512 + 4, 0xFFFFFFFF))
    ranges = [(0, 512), (512, 512), (1024, MIB), (1024 + MIB - 512, 1024), (1024 + MIB, 512), (1024 + 3 * MIB, MIB)]
    assert driver.referenced(image, ranges) == [ranges[0], ranges[1], ranges[3], ranges[4]]
    assert driver.used_end(image) == 1024 + 2 * MIB
    assert driver.undercounted(image, image, ranges) == ()
