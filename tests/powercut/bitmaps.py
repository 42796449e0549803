"""bitmap and convert --bitmaps, as scenarios: images with bitmaps of several granularities and cluster sizes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from unittest import mock

from powercut import guest
from powercut.judge import Scenario
from powercut.resizes import rebase_onto
from powercut.scenarios import KIB, NEW_QCOW2, SMALL, TOP, convert_to, overlay_pieces, two_bases
from safeimg.drivers.formats.qcow2 import pieces
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.bitmap import change_bitmaps
from safeimg.ops.bitmap_plan import BitmapAction
from safeimg.ops.launch import Environment


def _bitmaps(*actions: BitmapAction, source: str | None = None) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        with mock.patch.object(pieces, "STEP_BYTES", 1):  # so small, merged bits take several steps
            await change_bitmaps(env, "/top.qcow2", actions, source=source)

    return run


def with_bitmaps(fs: SimulatedFileSystem) -> None:
    """Two bitmaps with bits, one without; an image of another cluster size has bitmaps of other granularities."""
    two_bases(fs)
    guest.bitmaps(fs, "/top.qcow2", [("fine", 512, True), ("coarse", 16 * KIB, True), ("off", 4 * KIB, False)])
    guest.mark(fs, "/top.qcow2", [(0, 3 * KIB), (100 * KIB, 70 * KIB)])
    guest.create(fs, "/other.qcow2", "qcow2", 512 * KIB, cluster_size="512")
    guest.bitmaps(fs, "/other.qcow2", [("fine", 512, True), ("coarse", 64 * KIB, True)])
    guest.mark(fs, "/other.qcow2", [(5 * KIB, 500), (300 * KIB, 150 * KIB)])
    guest.create(fs, "/bare.qcow2", "qcow2", 512 * KIB, cluster_size="4096")
    guest.write(fs, "/bare.qcow2", overlay_pieces(4 * KIB))
    guest.bitmaps(fs, "/bare.qcow2", [("bare", 512, True), ("bare, too", 64 * KIB, False)])
    guest.mark(fs, "/bare.qcow2", [(0, 100 * KIB)])


BITMAPS = [
    *(
        Scenario(f"bitmap {name}", build, _bitmaps(*actions, source=source), "/top.qcow2", "/top.qcow2", TOP)
        for name, build, actions, source in (
            ("--add, the first", two_bases, [BitmapAction("add", "new")], None),
            ("--add --disable", with_bitmaps, [BitmapAction("add", "new"), BitmapAction("disable", "new")], None),
            ("--remove", with_bitmaps, [BitmapAction("remove", "coarse")], None),
            ("--remove, of all", with_bitmaps, [BitmapAction("remove", n) for n in ("fine", "coarse", "off")], None),
            ("--clear", with_bitmaps, [BitmapAction("clear", "fine")], None),
            ("--enable", with_bitmaps, [BitmapAction("enable", "off")], None),
            ("--merge", with_bitmaps, [BitmapAction("merge", "off", source="fine")], None),
            (
                "--add --merge -b", with_bitmaps,
                [
                    BitmapAction("add", "new", 2 * KIB), BitmapAction("merge", "new", source="coarse"),
                    BitmapAction("merge", "new", source="fine"), BitmapAction("merge", "fine", source="fine"),
                ],
                "/other.qcow2",
            ),
        )
    ),
    Scenario("rebase, with bitmaps", with_bitmaps, rebase_onto("other.qcow2"), "/top.qcow2", "/top.qcow2", TOP),
    Scenario(
        "convert --bitmaps", with_bitmaps,
        convert_to("/other.qcow2", "/target.qcow2", "qcow2", bitmaps=True, create_options=SMALL), "/target.qcow2",
        None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "convert -n --undo --bitmaps", with_bitmaps,
        convert_to("/bare.qcow2", "/top.qcow2", "qcow2", bitmaps=True, create=False, undo=True), "/top.qcow2", None,
        TOP,
    ),
]
