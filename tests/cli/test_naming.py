"""Images named as JSON and as lists of options: what opens, what does not, and what QEMU calls it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from twin import assert_same, qemu_img, safeimg

FILE = {"driver": "file", "filename": "small.qcow2"}
RAW = {"driver": "file", "filename": "small.raw"}

DESCRIPTIONS: list[dict[str, object] | str] = [
    {"driver": "qcow2", "file": FILE},
    {"driver": "qcow2", "file": {"filename": "small.qcow2"}},
    {"file": FILE},
    {"driver": "qcow2", "file.filename": "small.qcow2"},
    {"driver": "file", "filename": "small.qcow2"},
    {"filename": "small.qcow2"},
    {"driver": "qcow2", "filename": "small.qcow2"},
    {"driver": "qcow2", "file": "small.qcow2"},
    {"driver": "qcow2", "file": "small.qcow2", "file.filename": "x"},
    {"driver": "raw", "offset": 512, "size": 1024, "file": RAW},
    {"driver": "raw", "offset": 512, "file": RAW},
    {"driver": "raw", "size": "1k", "file": RAW},
    {"driver": "raw", "size": 1000, "file": RAW},
    {"driver": "raw", "size": 0, "file": RAW},
    {"driver": "raw", "offset": 100, "file": RAW},
    {"driver": "raw", "offset": 100_000_000, "file": RAW},
    {"driver": "raw", "offset": 512, "size": 1 << 20, "file": RAW},
    {"driver": "raw", "offset": -1, "file": RAW},
    {"driver": "raw", "offset": "x", "file": RAW},
    {"driver": "raw", "offset": 1.5, "file": RAW},
    {"driver": "raw", "size": 10**23, "file": RAW},
    {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "junk.bin"}},
    {"driver": "raw", "foo": 1, "file": RAW},
    {"driver": "raw", "file": RAW | {"foo": 1}},
    {"driver": "raw", "file": RAW | {"driver": "foo"}},
    {"driver": "foo", "file": RAW},
    {"driver": "raw"},
    {"driver": "raw", "file": {"driver": "file"}},
    {},
    {"driver": "qcow2", "lazy-refcounts": True, "file": FILE},
    {"driver": "qcow2", "lazy-refcounts": "maybe", "file": FILE},
    {"driver": "qcow2", "lazy-refcounts": 1, "file": FILE},
    {"driver": "qcow2", "node-name": "foo", "read-only": True, "cache": {"direct": False}, "file": FILE},
    {"driver": "qcow2", "discard": "unmap", "detect-zeroes": "on", "file": FILE},
    {"driver": "qcow2", "detect-zeroes": "x", "file": FILE},
    {"driver": "qcow2", "discard": "x", "file": FILE},
    {"driver": "qcow2", "file": FILE | {"filename": "missing"}},
    {"driver": "qcow2", "file": FILE | {"filename": "json:{}"}},
    {"driver": "raw", "file": {"driver": "raw", "offset": 512, "file": RAW}},
    {"driver": "qcow2", "file": {"driver": "raw", "file": FILE}},
    {"driver": "raw", "backing": {"driver": "raw"}, "file": RAW},
    "json:{", "json:[]", "json:x", "json:1", "json:", 'json:{"driver":"raw","driver":"raw"}', "json:{'a'",
]  # fmt: skip

OPTIONS = [
    "driver=qcow2,file.driver=file,file.filename=small.qcow2",
    "driver=qcow2,file.filename=small.qcow2",
    "file.filename=small.qcow2",
    "filename=small.qcow2",
    "small.qcow2",
    "qcow2,file.filename=small.qcow2",
    "driver=raw,offset=512,size=1k,file.filename=small.raw",
    "driver=raw,offset=512,size=1x,file.filename=small.raw",
    "driver=raw,size=,file.filename=small.raw",
    "driver=raw,size=-1,file.filename=small.raw",
    "driver=raw,foo=1,file.filename=small.raw",
    "driver=raw,foo,file.filename=small.raw",
    "driver=raw,nofoo,file.filename=small.raw",
    "driver=raw,file.foo=1,file.filename=small.raw",
    "driver=raw,read-only,file.filename=small.raw",
    "driver=qcow2,read-only=on,node-name=foo,auto-read-only=on,force-share=on,file.filename=small.qcow2",
    "driver=qcow2,read-only=maybe,file.filename=small.qcow2",
    "driver=qcow2,node-name=1,file.filename=small.qcow2",
    "driver=qcow2,cache.foo=1,file.filename=small.qcow2",
    "driver=qcow2,cache.direct=1,file.filename=small.qcow2",
    "driver=qcow2,file.filename=small.qcow2,file.filename=small.raw",
    "driver=file,filename=small.qcow2,foo=1",
    "driver=qcow2,file.filename=a,,b",
    "driver=qcow2,encrypt.key-secret=foo,file.filename=small.qcow2",
    "driver=qcow2,encrypt.format=luks,encrypt.key-secret=foo,file.filename=small.qcow2",
    "driver=qcow2,key-secret=foo,file.filename=small.qcow2",
    "driver=qcow2,l2-cache-size=1M,cache-clean-interval=1,pass-discard-request=on,file.filename=small.qcow2",
    "driver=qcow2,overlap-check=foo,file.filename=small.qcow2",
    "driver=qcow2,overlap-check.template=none,overlap-check.main-header=on,file.filename=small.qcow2",
    "driver=qcow2,l2-cache-entry-size=3,file.filename=small.qcow2",
    "driver=qcow2,file.aio=threads,file.locking=off,file.filename=small.qcow2",
    "driver=qcow2,file.aio=foo,file.filename=small.qcow2",
    "driver=qcow2,file.locking=foo,file.filename=small.qcow2",
    "driver=qcow2,file.aio=native,file.filename=small.qcow2",
    "driver=qcow2,file.drop-cache=off,file.x-check-cache-dropped=on,file.filename=small.qcow2",
    "driver=qcow2,file.pr-manager=x,file.filename=small.qcow2",
    "driver=raw,detect-zeroes=unmap,file.filename=small.raw",
    "driver=",
    "driver=qcow2,snapshot=on,file.filename=small.qcow2",
    "driver=host_device,filename=small.qcow2",
    "driver=qcow2,size=1,file.filename=small.qcow2",
    "driver=qcow2,backing.driver=raw,file.filename=overlay.qcow2",
    "driver=qcow2,backing=,file.filename=overlay.qcow2",
]

CHAINS = [
    {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"driver": "raw", "file": RAW},
     "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"driver": "raw"}, "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"file": {"filename": "small.raw"}},
     "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"file": {"filename": "missing"}},
     "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": "node", "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"driver": "raw", "foo": 1},
     "file": {"driver": "file", "filename": "overlay.qcow2"}},
    {"driver": "qcow2", "backing": {"driver": "raw"}, "file": FILE},
    {"driver": "raw", "offset": "64k", "size": "128k", "file": RAW},
]  # fmt: skip


def named(description: dict[str, object] | str) -> str:
    return description if isinstance(description, str) else "json:" + json.dumps(description)


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=named)
def test_json(images: Path, description: dict[str, object] | str) -> None:
    assert_same(["info", named(description)], images)
    assert_same(["info", "--output", "json", "-f", "raw", named(description)], images)


@pytest.mark.parametrize("text", OPTIONS)
def test_image_opts(images: Path, text: str) -> None:
    assert_same(["info", "--image-opts", text], images)


@pytest.mark.parametrize("description", CHAINS, ids=named)
def test_chains(images: Path, description: dict[str, object]) -> None:
    assert_same(["map", "--output", "json", named(description)], images)
    assert_same(["info", "--backing-chain", named(description)], images)
    assert_same(["check", "--output", "json", named(description)], images)


def test_with_format(images: Path) -> None:
    assert_same(["info", "--image-opts", "-f", "qcow2", OPTIONS[0]], images)
    assert_same(["info", "-f", "qcow2", named({"driver": "raw", "file": FILE})], images)
    assert_same(["compare", "--image-opts", OPTIONS[0], "driver=raw,file.filename=small.raw"], images)


BACKING = [
    {"driver": "raw", "file": RAW},
    {"driver": "raw", "offset": 512, "file": RAW},
    {"driver": "qcow2", "file": FILE},
    {"driver": "foo"},
    "json:{",
]


@pytest.mark.parametrize("backing", BACKING, ids=named)
def test_backing_files(images: Path, backing: dict[str, object] | str) -> None:
    name = "named.qcow2"
    fmt = backing.get("driver", "raw") if isinstance(backing, dict) else "raw"
    create = ["create", "-f", "qcow2", "-b", named(backing), "-F", str(fmt), name]
    assert_same(create, images)
    assert_same([*create[:3], "-u", *create[3:], "1M"], images)
    for words in (["info"], ["info", "--output", "json"], ["info", "--backing-chain"], ["map"]):
        assert_same([*words, name], images)


def test_an_image_inside_an_archive(images: Path, tmp_path: Path) -> None:
    """As virt-v2v reads an OVA: the image is a part of another file."""
    with tarfile.open(tmp_path / "disk.ova", "w") as archive:
        archive.addfile(tarfile.TarInfo("padding"), io.BytesIO(b""))
        archive.add(images / "small.qcow2", "disk.qcow2")
        member = archive.getmember("disk.qcow2")
    with tarfile.open(tmp_path / "disk.ova") as archive:
        member = archive.getmember("disk.qcow2")
    part = {"driver": "raw", "offset": member.offset_data, "size": member.size, "file": {"filename": "disk.ova"}}
    for driver in ({"driver": "qcow2"}, {}):
        name = named({**driver, "file": part})
        for words in (["info"], ["info", "--output", "json"], ["check"], ["map", "--output", "json"]):
            assert_same([*words, name], tmp_path)
        assert safeimg(["convert", "-O", "raw", name, "out.raw"], tmp_path).code == 0
        assert (tmp_path / "out.raw").read_bytes() == (images / "small.raw").read_bytes()


def test_writing_into_a_part_of_a_raw_image(images: Path, tmp_path: Path) -> None:
    """Only the part changes, and what is undone or resumed is that part."""
    target = named({"driver": "raw", "offset": "1M", "size": "1M", "file": {"filename": "target.raw"}})
    for words in ([target], ["--target-image-opts", "driver=raw,offset=1M,size=1M,file.filename=target.raw"]):
        (tmp_path / "target.raw").write_bytes(b"\xaa" * (3 << 20))
        assert safeimg(["convert", "-n", str(images / "small.qcow2"), *words], tmp_path).code == 0
        content = (tmp_path / "target.raw").read_bytes()
        assert content[1 << 20 : 2 << 20] == (images / "small.raw").read_bytes()
        assert {*content[: 1 << 20], *content[2 << 20 :]} == {0xAA}
    small = "driver=raw,offset=2M,size=512k,file.filename=target.raw"
    assert_same(["convert", "-n", "--target-image-opts", str(images / "small.qcow2"), small], tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["-n", "--target-image-opts", "small.qcow2", "driver=qcow2,read-only=on,file.filename=t.qcow2"],
        ["-n", "--target-image-opts", "small.qcow2", "driver=qcow2,force-share=on,file.filename=t.qcow2"],
        ["-n", "--target-image-opts", "-O", "qcow2", "small.qcow2", "driver=qcow2,file.filename=t.qcow2"],
        ["-n", "--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=small.qcow2", "t.qcow2"],
        ["-n", "-O", "qcow2", "small.qcow2", named({"driver": "raw", "file": {"filename": "small.raw"}})],
        ["-O", "raw", "small.qcow2", named({"driver": "raw", "file": {"filename": "new.raw"}})],
        ["-n", "--target-image-opts", "small.qcow2", "file.filename=t.qcow2"],
    ],
)
def test_converting(images: Path, words: list[str]) -> None:
    shutil.copy(images / "empty.qcow2", images / "t.qcow2")
    assert_same(["convert", *words], images)
    assert qemu_img(["check", "t.qcow2"], images).code == 0


def test_a_new_image_has_a_plain_name(images: Path) -> None:
    for fmt in ("raw", "qcow2"):
        assert_same(["create", "-f", fmt, named({"driver": "file", "filename": "zz"}), "1M"], images)
