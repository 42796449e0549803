"""check -r, given to safeimg and to qemu-img on equal copies of damaged images: same report, same guest content."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from twin import Outcome, qemu_img, qemu_io, safeimg, words

sys.path.insert(0, str(Path(__file__).parent.parent / "formats"))

from qcow2_damage import damage, spots
from qcow2_images import Recipe, build, patched, u64

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-img and qemu-io")

# Opened for writing, images with bitmaps are changed by QEMU before they are checked; and with snapshots too, those
# are lost (see below).
RECIPES = (
    Recipe("cluster_size=65536", snapshots=2),
    Recipe("cluster_size=512,refcount_bits=1"),
    Recipe("cluster_size=4096,refcount_bits=2"),
    Recipe("cluster_size=16384,refcount_bits=4", snapshots=1),
    Recipe("cluster_size=1024,refcount_bits=64", snapshots=1),
    Recipe("cluster_size=65536,compat=0.10", snapshots=1),
    Recipe("cluster_size=32768,refcount_bits=8,lazy_refcounts=on"),
)
SIDES = ("ours", "theirs")


@pytest.fixture
def sides(tmp_path: Path) -> Path:
    for side in SIDES:
        (tmp_path / side).mkdir()
    return tmp_path


def both(folder: Path, data: bytes, line: str) -> Outcome:
    """What both programs answer to the same damage. Where QEMU thinks that a repair would write over something else,
    or where a table has not been before, it gives up."""
    for side in SIDES:
        (folder / side / "image").write_bytes(data)
    expected = qemu_img(words(line), folder / "theirs")
    found = safeimg(words(line), folder / "ours", name="qemu-img")
    assert [path.name for path in (folder / "ours").iterdir()] == ["image"]
    if b"qcow2: Marking image as corrupt: " not in expected.stderr:
        told = [line for line in expected.stderr.splitlines(True) if not line.startswith(b"qcow2_free_clusters ")]
        assert found == expected._replace(stderr=b"".join(told)), line
    return found


def content(path: Path) -> bytes | None:
    out = path.with_name("content")
    done = subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", path, out], capture_output=True)
    data = out.read_bytes() if done.returncode == 0 else None
    out.unlink(missing_ok=True)
    return data


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.options)
def test_damage_is_repaired_as_by_qemu(recipe: Recipe, sides: Path) -> None:
    sound = build(sides / "sound", recipe).read_bytes()
    places = spots(sound)
    rng = random.Random(recipe.options)
    for _ in range(5):
        data = damage(rng, sound, places)
        if not recipe.is_v2 and rng.random() < 0.3:  # marked as dirty, corrupt or both
            data = patched(data, (">B", 79, rng.choice((1, 2, 3))))
        line = rng.choice(("check -r leaks image", "check -r all image", "check -q -r all image",
                           "check -r all --output=json image"))  # fmt: skip
        (sides / "before").write_bytes(data)
        both(sides, data, line)
        kept = [content(path) for path in (sides / "before", sides / "theirs" / "image")]
        if kept[0] is not None and data[u64(data, u64(data, 48)):][:64] not in kept[0]:  # the guest sees refcounts
            assert content(sides / "ours" / "image") in kept


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("repair") / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    qemu_io(path.parent, "-c", "write -P 1 0 256k", "image")
    for name in ("one", "two", "three"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, path], check=True)
    qemu_io(path.parent, "-c", "write -P 2 0 64k", "-c", "write -z 1M 128k", "-c", "write -c 2M 64k", "image")
    return path.read_bytes()


def table(data: bytes, position: int = 0) -> int:
    return u64(data, 64) + position


SNAPSHOTS: list[tuple[str, int, int]] = [
    (">I", -60, 5), (">Q", -64, 1 << 40), (">Q", -64, 0x50200), (">Q", -64, 1 << 63),
    (">I", 36, 1100), (">I", 36, 0), (">I", 36, 16), (">I", 36, 8), (">I", 36, 0xFFFFFFFF),
    (">Q", 0, 0x50200), (">Q", 0, 1 << 40), (">I", 8, 0x500000), (">I", 8, 0),
]  # fmt: skip


@pytest.mark.parametrize(("form", "place", "value"), SNAPSHOTS)
def test_snapshot_tables(known: bytes, sides: Path, form: str, place: int, value: int) -> None:
    data = patched(known, (form, -place if place < 0 else table(known, place), value))
    for line in ("check image", "check -r leaks image", "check -r all image"):
        both(sides, data, line)


def test_more_snapshots_than_there_can_be(known: bytes, sides: Path) -> None:
    """QEMU takes what it makes of them for a table that lies where it wants to put the new one."""
    data = patched(known, (">I", 60, 65540))
    assert both(sides, data, "check image").code == 1
    found = safeimg(words("check -r all image"), sides / "ours", name="qemu-img")
    assert found.stderr.startswith(b"Discarding 4 overhanging snapshots\n")
    assert qemu_img(words("check -q image"), sides / "ours").code == found.code


SINGLE: list[tuple[str, int, int]] = [
    *(("l1", 0, value) for value in (1 << 40, 0x40200 | 1 << 63, 0xB0000, 1 << 60 | 0xB0000)),
    *(("l2", 1, value) for value in (0x20000 | 1 << 63, 0xB0000 | 1 << 63, 0x60000, 0xC0201, 0xC0001, 0x50200)),
    *(("l2", 60, value) for value in (2, 1 << 56, 1 << 62 | 1 << 63 | 0x50000, 0xD0200, 1 << 40)),
    *(("table", 0, value) for value in (0, 0x20200, 0x20001, 1 << 34, 1 << 30)),
    *(("table", 1, value) for value in (1 << 30, 0x50200, 0x20000, 0x50000, 1)),
    ("header", 48, 1 << 30), ("header", 72, 1), ("header", 72, 2), ("header", 72, 3),
]  # fmt: skip


@pytest.mark.parametrize(("where", "index", "value"), SINGLE)
def test_single_mistakes(known: bytes, sides: Path, where: str, index: int, value: int) -> None:
    l1 = u64(known, 40)
    starts = {"l1": l1, "l2": u64(known, l1) & (1 << 56) - 512, "table": u64(known, 48), "header": 0}
    data = patched(known, (">Q", starts[where] + (index if where == "header" else 8 * index), value))
    found = both(sides, data, "check -r all image")
    both(sides, data, "check -r leaks image")
    if found.code == 0:
        (sides / "ours" / "image").write_bytes(data)
        safeimg(words("check -r all image"), sides / "ours")
        assert qemu_img(words("check image"), sides / "ours").code == 0


def test_snapshots_and_bitmaps_are_kept(sides: Path) -> None:
    """QEMU loses the snapshots of an image that has bitmaps, too."""
    sound = build(sides / "sound", Recipe("cluster_size=65536", snapshots=2, bitmap=True)).read_bytes()
    path = sides / "ours" / "image"
    path.write_bytes(sound)
    assert safeimg(words("check -r all image"), path.parent).code == 0
    assert path.read_bytes() == sound
    cluster = -(-len(sound) // 65536)
    leak = (">H", u64(sound, u64(sound, 48)) + 2 * cluster, 7)
    path.write_bytes(patched(sound, leak).ljust((cluster + 1) << 16, b"\0"))
    assert b"1 leaked clusters" in safeimg(words("check -r leaks image"), path.parent).stdout
    assert path.read_bytes()[: len(sound)] == sound


@pytest.mark.parametrize("line", ["amend -o lazy_refcounts=off image", "rebase -u -b '' image", "check -r all image"])
def test_what_was_not_closed_is_repaired_first(known: bytes, sides: Path, line: str) -> None:
    block = u64(known, u64(known, 48))
    dirty = patched(known, (">Q", 72, 1), (">Q", 80, 1), (">H", block + 2 * 5, 0), (">H", block + 2 * 9, 7))
    if line.startswith("rebase") and safeimg(["rebase", "-h"], sides / "ours").code:
        pytest.skip("no rebase yet")
    both(sides, dirty, line)
    assert qemu_img(words("check image"), sides / "ours").code == 0
    assert content(sides / "ours" / "image") == content(sides / "theirs" / "image")


@pytest.mark.parametrize("line", ["check -U -r all image", "check -r foo image", "check -r all missing", "check -r all",
                                  "check -r all -f raw image", "check -r all -T foo image"])  # fmt: skip
def test_what_is_refused(known: bytes, sides: Path, line: str) -> None:
    both(sides, known, line)


def test_hostile_images_end_in_one_line(known: bytes, sides: Path) -> None:
    path = sides / "ours" / "image"
    rng = random.Random(5)
    for _ in range(20):
        data = bytearray(damage(rng, known, spots(known)))
        for _ in range(rng.randrange(6)):
            at = rng.choice((rng.randrange(112), rng.randrange(len(data) - 8)))
            struct.pack_into(">Q", data, at, rng.choice((0, 1, 1 << 31, (1 << 64) - 1, 1 << 40, rng.getrandbits(64))))
        path.write_bytes(data)
        found = safeimg(words("check -f qcow2 -r all image"), path.parent)
        assert found.code in (0, 1, 2, 3), found.stderr
        assert b"internal error: " not in found.stderr and [each.name for each in path.parent.iterdir()] == ["image"]


@pytest.mark.parametrize("line", ["check image", "check -r leaks image", "check -r all image"])
def test_unknown_autoclear_features_do_not_outlive_a_repair(line: str, sides: Path) -> None:
    """Whoever opens an image for writing clears them; there need not be anything else to repair."""
    data = patched(build(sides / "sound", Recipe("cluster_size=65536")).read_bytes(), (">Q", 88, 1 << 63))
    both(sides, data, line)
    found = [(sides / side / "image").read_bytes()[72:96] for side in SIDES]
    assert found[0] == found[1] == bytes(16) + (b"\0" * 8 if "-r" in line else data[88:96])
