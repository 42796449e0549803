"""amend, given to safeimg and to qemu-img on equal copies: same answers, same images."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from twin import Outcome, qemu_img, qemu_io, safeimg, words

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-img and qemu-io")

SIDES = ("ours", "theirs")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("amend")

    def make(name: str, *options: str, size: str = "4M") -> None:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, name, size], cwd=folder, check=True)

    pieces = ("-c", "write -P 1 10k 200k", "-c", "write -z 1M 256k", "-c", "write -z 64k 64k", "-c", "write -c 3M 64k")
    make("new")
    make("lazy", "-o", "lazy_refcounts=on")
    make("old", "-o", "compat=0.10")
    make("wide", "-o", "refcount_bits=64,cluster_size=512")
    make("zstd", "-o", "compression_type=zstd")
    make("zstd-used", "-o", "compression_type=zstd,cluster_size=4k")
    make("overlay", "-b", "new", "-F", "qcow2", "-o", "cluster_size=16k")
    make("unnamed", "-u", "-b", "new", "-F", "qcow2")
    make("prealloc", "-o", "preallocation=metadata")
    make("outside", "-o", "data_file=data.raw,data_file_raw=on")
    make("lost", "-u", "-b", "missing", "-F", "raw")
    for name in ("new", "old", "wide", "zstd-used", "overlay"):
        qemu_io(folder, *pieces, name)
    qemu_io(folder, *pieces[:6], "prealloc")
    for name in ("shot", "vm"):
        make(name, "-o", "cluster_size=4k")
        qemu_io(folder, *pieces, name)
        for number in range(3):
            subprocess.run(["qemu-img", "snapshot", "-c", str(number), name], cwd=folder, check=True)
            qemu_io(folder, "-c", f"write -z {number}M 100k", "-c", "write -P 7 200k 50k", name)
    subprocess.run(["qemu-img", "resize", "-q", "vm", "8M"], cwd=folder, check=True)
    (folder / "raw").write_bytes(bytes(1 << 20))
    return folder


@pytest.fixture
def sides(pristine: Path, tmp_path: Path) -> Path:
    for side in SIDES:
        shutil.copytree(pristine, tmp_path / side)
    return tmp_path


def both(folder: Path, line: str) -> Outcome:
    expected = qemu_img(words(line), folder / "theirs")
    assert safeimg(words(line), folder / "ours", name="qemu-img") == expected, line
    return expected


def info(path: Path) -> dict[str, object]:
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", path.name], cwd=path.parent, capture_output=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout)
    return {name: found[name] for name in ("format-specific", "virtual-size")} | {
        "backing": found.get("backing-filename"), "snapshots": found.get("snapshots")
    }


def content(path: Path, snapshot: str | None = None) -> bytes:
    out = path.with_name("content")
    chosen = [] if snapshot is None else ["-l", snapshot]
    subprocess.run(["qemu-img", "convert", *chosen, "-O", "raw", path.name, out], cwd=path.parent, check=True)
    return out.read_bytes()


def same_images(folder: Path, name: str) -> None:
    ours, theirs = (folder / side / name for side in SIDES)
    assert info(ours) == info(theirs)
    assert content(ours) == content(theirs)
    subprocess.run(["qemu-img", "check", "-q", ours.name], cwd=ours.parent, check=True)
    leftovers = [path.name for path in ours.parent.iterdir() if ".safeimg" in path.name]
    assert not leftovers


REFUSED = """
amend
amend new
amend -o help
amend -f raw -o help
amend -f foo -o help
amend -f qcow2 -o help
amend -f qcow2 -o help new nonsense
amend -o help new
amend -o ? old
amend -o compat=1.1,help new
amend -o help missing
amend -o help raw
amend -o foo=bar new
amend -o cluster_size=512 new
amend -o nocow=on new
amend -o encryption=on new
amend -o preallocation=full new
amend -o extended_l2=on new
amend -o compression_type=zstd new
amend -o encrypt.format=luks new
amend -o encrypt.state=active new
amend -o encrypt.state=active,compat=0.9 new
amend -o compat=0.9 new
amend -o compat new
amend -o compat=0.9,refcount_bits=3 new
amend -o refcount_bits=3 new
amend -o refcount_bits=0 new
amend -o refcount_bits=128 new
amend -o refcount_bits=x new
amend -o refcount_bits=8 old
amend -o refcount_bits=8,compat=0.10 new
amend -o refcount_bits=3,backing_file=x new
amend -o lazy_refcounts=maybe new
amend -o lazy_refcounts=on old
amend -o lazy_refcounts=on,compat=0.10 new
amend -o compat=0.10 wide
amend -o compat=0.10 zstd-used
amend -o compat=0.10 vm
amend -o data_file=x new
amend -o data_file=x,refcount_bits=3 new
amend -o data_file_raw=on new
amend -o backing_file=x overlay
amend -o backing_file=new overlay
amend -o backing_file= new
amend -o backing_fmt=qcow2 overlay
amend -o backing_file=x,lazy_refcounts=on overlay
amend -o size=1000 new
amend -o size=8M,compat=0.10 shot
amend -o compat=0.10 outside
amend -o data_file_raw=on,data_file=x new
amend -o size=1X new
amend -o size=-1 new
amend -o ,compat=1.1 new
amend -o compat=1.1, new
amend -t foo -o compat=1.1 new
amend -f raw -o compat=1.1 new
amend -f foo -o compat=1.1 new
amend -o compat=1.1 raw
amend -o compat=1.1 missing
amend -o compat=1.1 lost
amend -o compat=1.1 new old
amend -f qcow2 --image-opts -o compat=1.1 driver=qcow2,file.filename=new
amend --image-opts -o help driver=qcow2,file.filename=new
amend --foo -o compat=1.1 new
"""


def test_what_is_refused_and_what_is_listed(sides: Path) -> None:
    before = {path.name: path.read_bytes() for path in (sides / "ours").iterdir()}
    for line in REFUSED.split("\n"):
        if line:
            both(sides, line)
    assert {path.name: path.read_bytes() for path in (sides / "ours").iterdir()} == before


DONE = [
    ("new", ["compat=0.10", "compat=1.1", "compat=0.10", "compat=1.1"]),
    ("new", ["lazy_refcounts=on", "lazy_refcounts", "nolazy_refcounts", "compat=1.1"]),
    ("lazy", ["compat=0.10,lazy_refcounts=on", "compat=v3,lazy_refcounts=on,refcount_bits=1"]),
    ("old", ["compat=0.10", "refcount_bits=16", "compat=1.1,refcount_bits=8,lazy_refcounts=on"]),
    ("wide", ["refcount_bits=1", "refcount_bits=16,compat=0.10,lazy_refcounts=off"]),
    ("zstd", ["compat=0.10"]),
    ("overlay", ["compat=0.10,backing_file=new,backing_fmt=qcow2", "compat=1.1"]),
    ("prealloc", ["compat=0.10"]),
    ("new", ["size=5M,lazy_refcounts=on", "size=1M", "size=1M,compat=0.10", "size=6M,compat=1.1"]),
    ("old", ["size=8M", "compat=1.1,size=4M"]),
    ("shot", ["size=4M,compat=0.10"]),
    ("outside", ["data_file_raw=on", "data_file_raw=off", "data_file_raw=off", "data_file=data.raw"]),
    ("shot", ["refcount_bits=2", "refcount_bits=4", "refcount_bits=1", "refcount_bits=16", "compat=0.10"]),
]


@pytest.mark.parametrize(("name", "steps"), DONE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_changed(sides: Path, name: str, steps: list[str]) -> None:
    for options in steps:
        both(sides, f"amend -o {options} {name}")
        same_images(sides, name)


def test_snapshots_keep_their_content_in_version_2(sides: Path) -> None:
    """QEMU zeroes clusters that a snapshot still has data in."""
    path = sides / "ours" / "shot"
    before = [content(path, number) for number in "012"]
    assert safeimg(words("amend -o compat=0.10 shot"), path.parent, name="qemu-img").code == 0
    assert [content(path, number) for number in "012"] == before


def test_generated_changes(sides: Path) -> None:
    rng = random.Random(3)
    for _ in range(10):
        name = rng.choice(("new", "old", "wide", "overlay", "shot"))
        values = {
            "compat": ("0.10", "1.1"), "lazy_refcounts": ("on", "off"), "refcount_bits": ("1", "8", "16", "16", "64"),
        }
        chosen = rng.sample(sorted(values), rng.randrange(1, 4))
        both(sides, f"amend -o {','.join(f'{key}={rng.choice(values[key])}' for key in chosen)} {name}")
        if not rng.randrange(3):
            same_images(sides, name)


@pytest.mark.parametrize("bits", [8, 32, 64])
def test_refcounts_are_taken_over_as_they_are(tmp_path: Path, bits: int) -> None:
    """Too high or too low: that is for `check` to tell, and to repair."""
    folders = tmp_path / "ours", tmp_path / "theirs"
    for folder in folders:
        folder.mkdir()
    assert qemu_img(["create", "-q", "-f", "qcow2", "i", "64M"], folders[1]).code == 0
    qemu_io(folders[1], "-c", "write 0 256k", "i")
    data = bytearray((folders[1] / "i").read_bytes())
    data[0x40008:0x40010] = data[0x40000:0x40008]  # two guest clusters in one host cluster
    data[0x20000 + 2 * 7 : 0x20000 + 2 * 8] = b"\0\3"
    data[0x20000 + 2 * 20 : 0x20000 + 2 * 21] = b"\0\5"  # behind the end of the file
    found = []
    for folder, program in zip(folders, (safeimg, qemu_img), strict=True):
        (folder / "i").write_bytes(data)
        assert program(["amend", "-o", f"refcount_bits={bits}", "i"], folder) == (0, b"", b"")
        checked = qemu_img(["check", "i"], folder)
        found.append((checked.code, checked.stdout.partition(b"Image end offset")[0], checked.stderr))
    assert found[0] == found[1]
    assert found[0][0] == 2 and found[0][2].count(b"Leaked cluster") == 2
    narrow = ["amend", "-o", "refcount_bits=1", "i"]
    refused = safeimg(narrow, folders[0], name="qemu-img")
    assert refused == qemu_img(narrow, folders[1])
    assert refused.code == 1
