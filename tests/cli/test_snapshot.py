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
