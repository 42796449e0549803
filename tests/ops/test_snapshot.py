"""snapshot -c, -a and -d on images that QEMU made: what QEMU's own commands do to a copy, they do too."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from safeimg.drivers.errors import RefusedError
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.qcow2 import pieces
from safeimg.drivers.formats.snapshots import entries
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.journal.history import MemoryHistory
from safeimg.ops import snapshot
from safeimg.ops.launch import Environment
from safeimg.recovery.gate import begin_or_resume

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img or qemu-io is not installed"
)

KINDS = {
    "plain": "cluster_size=4096",
    "version 2": "cluster_size=4096,compat=0.10",
    "tiny clusters": "cluster_size=512,refcount_bits=4",
    "wide refcounts": "cluster_size=16384,refcount_bits=64",
    "subclusters": "cluster_size=16384,extended_l2=on",
    "two bits": "cluster_size=65536,refcount_bits=2",
}


def qemu(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def run(action: str, image: Path, name: str) -> None:
    env = Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=1)))

    async def begin() -> None:
        if action == "create":
            await snapshot.create(env, str(image), name, 1_700_000_000_123_456_000)
        else:
            await (snapshot.apply if action == "apply" else snapshot.delete)(env, str(image), name)

    trio.run(begin_or_resume, str(image), env, "snapshot", begin)
    assert [each.name for each in image.parent.iterdir() if ".safeimg" in each.name] == []


def looks(image: Path) -> tuple[object, ...]:
    """What QEMU shows of an image: that it is sound, its size, its snapshots, and the content of each."""
    checked = subprocess.run(["qemu-img", "check", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    info = json.loads(qemu("qemu-img", "info", "--output=json", image))
    listed = [
        {name: value for name, value in each.items() if not name.startswith("date")}
        for each in info.get("snapshots", [])
    ]
    raw = image.with_suffix(".raw")
    contents = []
    for which in ([], *(["-l", f"snapshot.id={each['id']}"] for each in listed)):
        qemu("qemu-img", "convert", *which, "-O", "raw", image, raw)
        contents.append(raw.read_bytes())
    return info["virtual-size"], listed, contents


def scribble(rng: random.Random, size: int) -> list[str]:
    """Writes of every kind, all over the disk."""
    commands: list[str] = []
    for _ in range(6):
        at = rng.randrange(size // 2048) * 1024
        length = min(rng.choice((1024, 5120, 70_000)), size - at) // 512 * 512
        commands += ["-c", rng.choice((f"write -P {rng.randrange(256)}", "write -z", "discard")) + f" {at} {length}"]
    return commands


def packed(rng: random.Random, cluster: int, size: int) -> list[str]:
    at = rng.randrange(size // cluster) * cluster
    return [word for n in range(4) for word in ("-c", f"write -c -P {n} {(at + n * cluster) % size} {cluster}")]


@pytest.mark.parametrize("kind", KINDS)
def test_like_qemu(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "STEP_BYTES", 16384)
    rng = random.Random(kind)
    ours, theirs, size = tmp_path / "ours", tmp_path / "theirs", 1 << 20
    cluster = int(KINDS[kind].split("=")[1].split(",")[0])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", KINDS[kind], ours, size)
    theirs.write_bytes(ours.read_bytes())
    letters = {"create": "-c", "apply": "-a", "delete": "-d"}
    names: list[str] = []
    for number in range(9):
        commands = [*packed(rng, cluster, size), *scribble(rng, size)]
        for image in (ours, theirs):  # compressed data does not go over what is there already
            subprocess.run(["qemu-io", "-f", "qcow2", *commands, image], check=False, capture_output=True)
        most = 2 if kind == "two bits" else 4
        action = rng.choice(("create", "apply", "delete")) if names else "create"
        if len(names) >= most and action == "create":
            action = "delete"
        name = f"s{number}" if action == "create" else rng.choice(names)
        if (kind, action) == ("two bits", "apply") and len(names) == most:
            continue  # QEMU counts the new references before it takes the old ones away
        if action != "apply":
            names = [*names, name] if action == "create" else [each for each in names if each != name]
        try:
            qemu("qemu-img", "snapshot", letters[action], name, theirs)
        except AssertionError:  # compressed clusters that share a host cluster, and are counted too often
            with pytest.raises(RefusedError):
                run(action, ours, name)
            assert looks(ours)[0] == size
            return
        run(action, ours, name)
        assert looks(ours) == looks(theirs)


def test_machine_states(tmp_path: Path) -> None:
    """The state of a machine lies behind the end of the disk, in clusters like its; its size may need 64 bits."""
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    qemu("qemu-io", "-c", "write -P 1 0 1M", "-c", "write -b -P 9 0 192k", image)
    run("create", image, "with state")
    edit_entry(image, vm_clock=3_723_004_000_000, state_size=5 << 32, icount=77, unknown=b"of a later version")
    listed = json.loads(qemu("qemu-img", "info", "--output=json", image))["snapshots"]
    qemu("qemu-io", "-c", "write -P 2 0 64k", "-c", "write -b -P 8 0 64k", image)
    run("create", image, "second")
    found = json.loads(qemu("qemu-img", "info", "--output=json", image))["snapshots"]
    assert found[0] == listed[0] and found[0]["icount"] == 77 and found[0]["vm-state-size"] == 5 << 32
    assert found[1]["vm-state-size"] == found[1]["vm-clock-sec"] == 0
    with image.open("rb") as file:
        assert b"of a later version1with state" in file.read()
    run("apply", image, "with state")
    qemu("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -b -P 9 0 192k", image)
    run("delete", image, "second")
    run("delete", image, "with state")
    qemu("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -b -P 9 0 192k", image)
    qemu("qemu-img", "check", image)


def edit_entry(image: Path, *, vm_clock: int, state_size: int, icount: int, unknown: bytes) -> None:
    """Rewrites the entry of the only snapshot, as another program might have written it."""
    data = bytearray(image.read_bytes())
    (start,) = struct.unpack(">Q", data[64:72])
    l1, entries, id_size, name_size, sec, nsec, _, _, extra = struct.unpack(">QIHHIIQII", data[start : start + 40])
    names = data[start + 40 + extra : start + 40 + extra + id_size + name_size]
    disk_size = data[start + 48 : start + 56]
    extra_data = struct.pack(">Q", state_size) + disk_size + struct.pack(">Q", icount) + unknown
    entry = struct.pack(">QIHHIIQII", l1, entries, id_size, name_size, sec, nsec, vm_clock, 7, len(extra_data))
    data[start : start + 40 + len(extra_data) + len(names)] = entry + extra_data + names
    image.write_bytes(data)


@pytest.mark.parametrize("cluster", [512, 65536])
def test_snapshots_with_sizes_of_their_own(tmp_path: Path, cluster: int) -> None:
    image, sizes = tmp_path / "image", {"small": 256 << 10, "large": 1 << 20, "middle": 640 << 10}
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", image, sizes["small"])
    for name, size in sizes.items():
        qemu("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", image, size)
        qemu("qemu-io", "-c", f"write -P {len(name)} {size - 65536} 65536", image)
        run("create", image, name)
    copy = tmp_path / "copy"
    for name in ("small", "large", "middle", "large", "small"):
        shutil.copy(image, copy)
        qemu("qemu-img", "snapshot", "-a", name, copy)
        run("apply", image, name)
        assert looks(image) == looks(copy)
        assert looks(image)[0] == sizes[name]


def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    narrow, marked, old = tmp_path / "narrow", tmp_path / "marked", tmp_path / "old"
    for image, options in ((narrow, "refcount_bits=1"), (marked, "compat=1.1"), (old, "compat=0.10")):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "1M")
        qemu("qemu-io", "-c", "write -P 1 0 64k", image)
    for image in (marked, old):
        run("create", image, "one")
    qemu("qemu-img", "bitmap", "--add", marked, "marks")
    with old.open("r+b") as file:  # QEMU does not resize such an image; others may
        file.seek(24)
        file.write((1 << 19).to_bytes(8, "big"))
    for action, image, name in (
        ("create", narrow, "one"), ("apply", marked, "one"), ("apply", old, "one"), ("apply", old, "none"),
        ("delete", old, "none"),
    ):  # fmt: skip
        before = image.read_bytes()
        with pytest.raises(RefusedError):
            run(action, image, name)
        assert image.read_bytes() == before


def test_damage_is_taken_back(tmp_path: Path) -> None:
    """What shows only while the change is planned, behind the fence."""
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    qemu("qemu-io", "-c", "write -P 1 0 64k", image)
    run("create", image, "one")
    good = image.read_bytes()
    (l1,) = struct.unpack(">Q", good[40:48])
    l2 = struct.unpack(">Q", good[l1 : l1 + 8])[0] & 0x00FFFFFFFFFFFE00
    (table,) = struct.unpack(">Q", good[48:56])
    (block,) = struct.unpack(">Q", good[table : table + 8])
    host = struct.unpack(">Q", good[l2 : l2 + 8])[0] & 0x00FFFFFFFFFFFE00
    for offset, value in ((l2, 1 << 55), (l2, 0x1FF), (block + 2 * (host >> 16), 0)):
        bad = bytearray(good)
        bad[offset : offset + (2 if not value else 8)] = value.to_bytes(2 if not value else 8, "big")
        image.write_bytes(bad)
        for action in ("create", "delete"):
            with pytest.raises(RefusedError, match="image"):
                run(action, image, "one")
            assert image.read_bytes() == bytes(bad)


def test_names_are_cut_as_in_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    for name in ("é" * 200, "\udcff, not UTF-8", ""):
        run("create", image, name)
    found: list[Any] = []
    layers = open_chain(LocalFileSystem(), str(image))
    found += [(each.id, each.name) for each in entries(layers[0])]
    close_chain(layers)
    assert found == [("1", "é" * 127 + "\udcc3"), ("2", "\udcff, not UTF-8"), ("3", "")]
    run("apply", image, "\udcff, not UTF-8")
    run("delete", image, "")
    assert "not UTF-8" in subprocess.run(
        ["qemu-img", "snapshot", "-l", image], capture_output=True, check=True
    ).stdout.decode(errors="replace")
