"""snapshot, convert -l: the command lines and messages of qemu-img."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest
from twin import Outcome, qemu_img, qemu_io, safeimg, words

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img or qemu-io is not installed"
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")

    def create(name: str, *options: str) -> None:
        assert qemu_img(["create", "-q", "-f", "qcow2", *options, name, "1M"], folder).code == 0

    create("disk.qcow2")
    for name in ("3", "2", "1", "x", "sp ace, é"):  # names that are other snapshots' ids
        qemu_io(folder, "-c", f"write -P {len(name)} 0 64k", "disk.qcow2")
        assert qemu_img(["snapshot", "-c", name, "disk.qcow2"], folder).code == 0
    create("narrow.qcow2", "-o", "refcount_bits=1")
    qemu_io(folder, "-c", "write -P 7 0 64k", "narrow.qcow2")
    create("marked.qcow2")
    assert qemu_img(["snapshot", "-c", "s", "marked.qcow2"], folder).code == 0
    assert qemu_img(["bitmap", "--add", "marked.qcow2", "marks"], folder).code == 0
    create("old.qcow2", "-o", "compat=0.10")
    assert qemu_img(["snapshot", "-c", "s", "old.qcow2"], folder).code == 0
    old = bytearray((folder / "old.qcow2").read_bytes())
    old[24:32] = struct.pack(">Q", 1 << 19)
    (folder / "old.qcow2").write_bytes(old)
    create("lost.qcow2", "-u", "-b", "missing", "-F", "raw")
    (folder / "disk.raw").write_bytes(bytes(1 << 20))
    return folder


LINES = [
    "snapshot", "snapshot -l", "snapshot disk.qcow2", "snapshot -l disk.qcow2", "snapshot -q -l disk.qcow2",
    "snapshot -U -l disk.qcow2", "snapshot --force-share disk.qcow2", "snapshot -l narrow.qcow2",
    "snapshot -l disk.raw", "snapshot disk.raw", "snapshot -U disk.qcow2", "snapshot lost.qcow2",
    "snapshot -l missing", "snapshot -l lost.qcow2", "snapshot -l disk.qcow2 disk.raw",
    "snapshot --image-opts -l driver=qcow2,file.filename=disk.qcow2", "snapshot -f qcow2 -l disk.qcow2",
    "snapshot -l -c x disk.qcow2", "snapshot -c x -d y disk.qcow2", "snapshot -a x -a y disk.qcow2", "snapshot -c",
    "snapshot -l -l disk.qcow2", "snapshot -c disk.qcow2", "snapshot -p disk.qcow2", "snapshot --foo disk.qcow2",
    "snapshot -c new disk.qcow2", "snapshot -c 3 disk.qcow2", "snapshot -q -c '' disk.qcow2",
    "snapshot -c new disk.raw", "snapshot -a x disk.raw", "snapshot -d x disk.raw", "snapshot -c new missing",
    "snapshot -c new lost.qcow2", "snapshot -U -c new disk.qcow2", "snapshot -c new narrow.qcow2",
    "snapshot -a 1 disk.qcow2", "snapshot -a 4 disk.qcow2", "snapshot -a x disk.qcow2", "snapshot -a no disk.qcow2",
    "snapshot -a s marked.qcow2", "snapshot -a no marked.qcow2", "snapshot -d s marked.qcow2",
    "snapshot -c t marked.qcow2", "snapshot -a s old.qcow2", "snapshot -d s old.qcow2",
    "snapshot -d 1 disk.qcow2", "snapshot -d 4 disk.qcow2", "snapshot -d no disk.qcow2",
    "snapshot -d 'sp ace, é' disk.qcow2", "snapshot --image-opts -d x driver=qcow2,file.filename=disk.qcow2",
    "convert -l 1 -O raw disk.qcow2 out", "convert -l x -O qcow2 disk.qcow2 out", "convert -l no disk.qcow2 out",
    "convert -l snapshot.id=1 disk.qcow2 out", "convert -l snapshot.name=1 disk.qcow2 out",
    "convert -l snapshot.id=1,snapshot.name=3 disk.qcow2 out", "convert -l snapshot.foo=1 disk.qcow2 out",
    "convert -l 'snapshot.name=sp ace,, é' disk.qcow2 out", "convert -l snapshot.id=1,snapshot.name=1 disk.qcow2 out",
    "convert -l 1 disk.raw out", "convert -l 1 disk.qcow2 disk.qcow2 out", "convert -l s old.qcow2 out",
    "convert -l no missing out", "convert -l no -O foo disk.qcow2 out", "convert -l no -n disk.qcow2 missing",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_same_as_qemu_img(pristine: Path, tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        shutil.copytree(pristine, folder)
    expected = qemu_img(words(line), theirs)
    assert safeimg(words(line), ours, name="qemu-img") == expected
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    if expected.code == 0 and "-l" not in words(line):
        for name in ("disk.qcow2", "marked.qcow2", "old.qcow2"):
            assert qemu_img(["check", name], ours).code == 0
            listed = [masked(qemu_img(["snapshot", "-l", name], folder)) for folder in (ours, theirs)]
            assert listed[0] == listed[1]
            compared = qemu_img(["compare", str(ours / name), str(theirs / name)], ours)
            assert compared.code == 0, compared
    if (theirs / "out").exists():
        compared = qemu_img(["compare", str(ours / "out"), str(theirs / "out")], ours)
        assert compared.code == 0, compared


def masked(outcome: Outcome) -> Outcome:
    """Without dates: those of new snapshots differ."""
    return outcome._replace(stdout=re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", b"DATE", outcome.stdout))


# Where QEMU puts things in the image below: the L2 table, and the snapshot's entry.
L2, ENTRY = 0x40000, 0x70000
DAMAGES = {
    "as it is": ("", []),
    "an L1 table out of place": ("old", [(">Q", ENTRY, 0x400200)]),
    "an L1 table too large": ("old", [(">I", ENTRY + 8, 1 << 28)]),
    "too many snapshots": ("new", [(">Q", 64, 1 << 24), (">I", 60, 1 << 16)]),
    "snapshots past the end": ("list", [(">Q", 64, 1 << 24), (">I", 60, 3)]),
    "data past all that can be": ("new", [(">Q", L2, 0x80FFFFFFFFFF0000)]),
    "and reserved bits": ("new", [(">Q", L2, 0xBFFFFFFFFFFF0000)]),
    "data past all that is counted": ("new", [(">Q", L2, 0x800000FFFFFF0000)]),
}
DAMAGED_LINES = {
    "old": ("convert -l s i out", "measure -O raw -l s i", "snapshot -a s i", "snapshot -d s i", "snapshot -l i",
            "amend -o compat=0.10 i"),
    "new": ("snapshot -c t i",),
    "list": ("snapshot -l i", "snapshot -a no i", "snapshot -d no i"),
    "": ("snapshot -a s i", "snapshot -d s i", "amend -o compat=0.10 i"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(tmp_path: Path, damage: str) -> None:
    """In QEMU's words; and whatever was begun is taken back."""
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder in folders:
        folder.mkdir()
    image = folders[1] / "i"
    assert qemu_img(["create", "-q", "-f", "qcow2", "i", "64M"], folders[1]).code == 0
    qemu_io(folders[1], "-c", "write 0 512", "i")
    kind, patches = DAMAGES[damage]
    if kind != "new":
        assert qemu_img(["snapshot", "-c", "s", "i"], folders[1]).code == 0
    data = bytearray(image.read_bytes())
    for layout, offset, value in patches:
        struct.pack_into(layout, data, offset, value)
    for line in DAMAGED_LINES[kind]:
        for folder in folders:
            (folder / "i").write_bytes(data)
        expected = qemu_img(words(line), folders[1])
        assert safeimg(words(line), folders[0], name="qemu-img") == expected, line
        assert [path.name for path in folders[0].iterdir()] == ["i"]
        if expected.code:
            assert (folders[0] / "i").read_bytes() == data


def test_what_meets_damage_is_taken_back(tmp_path: Path) -> None:
    """An amendment finds out behind its fence: nothing stays pending, and the image is as it was."""
    assert qemu_img(["create", "-q", "-f", "qcow2", "i", "64M"], tmp_path).code == 0
    qemu_io(tmp_path, "-c", "write 0 512", "i")
    assert qemu_img(["snapshot", "-c", "s", "i"], tmp_path).code == 0
    data = bytearray((tmp_path / "i").read_bytes())
    (table,) = struct.unpack_from(">Q", data, ENTRY)
    struct.pack_into(">Q", data, table, (1 << 63) + 512)  # of the snapshot: no place for an L2 table
    (tmp_path / "i").write_bytes(data)
    found = safeimg(words("amend -o compat=0.10 i"), tmp_path)
    assert (found.code, found.stderr.splitlines()[1:]) == (1, [])
    assert b"L2 table is not where a table can be" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["i"]
    assert (tmp_path / "i").read_bytes() == data
