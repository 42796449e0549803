"""create, in twin folders: the same messages, and images that mean the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from twin import qemu_img, safeimg, words

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

# Where safeimg differs on purpose, it says so itself: see the other tests.
LINES = r"""
raw x 0
raw x 1k
raw x 1.5G
raw x 1Z
raw x 1.5
raw x 1.1k
raw x 0x10
raw x 0x1k
raw x 0x
raw x 1kk
raw x 1e3
raw x .5k
raw x 5.
raw x 1b
raw x 0.1b
raw x 1.0b
raw x ' 1'
raw x '1 '
raw x +1
raw x 010
raw x ''
raw x nan
raw x -1
raw x -- -1
raw x 513
raw x 9223372036854775808
raw x 9223372036854775807
raw x 99999999999999999999
raw x 8E
raw x 7E
raw x 15.9E
raw x
raw -q x 1M
raw /nowhere/x 1M
raw . 1M
raw '' 1M
raw base.raw/x 1M
raw foo:bar 1M
raw ./foo:bar 1M
raw file:x 1M
raw -b base.raw x 1M
raw -F raw -b base.raw x 1M
raw -F raw x 1M
raw -o foo=1 x 1M
raw -o backing_file=base.raw x 1M
raw -o preallocation=off x 1M
raw -o preallocation=falloc x 1M
raw -o preallocation=full x 1M
raw -o nocow=maybe x 1M
raw -o nocow=off x 1M
raw -o nocow x 1M
raw -o extent_size_hint=1M,nocow=off,preallocation=off x 1M
raw -o extent_size_hint=1Z x 1M
foo x 1M
QCOW2 x 1M
'' x 1M
qcow2 x 1M
qcow2 x
qcow2 x 0
qcow2 x 1000
qcow2 x 64P
qcow2 x 8191P
qcow2 /nowhere/x 1M
qcow2 . 1M
qcow2 'a,b' 1M
qcow2 -o '' x 1M
qcow2 -o , x 1M
qcow2 -o cluster_size=4k, x 1M
qcow2 -o ,cluster_size=4k x 1M
qcow2 -o cluster_size=4k,, x 1M
qcow2 -o cluster_size=4k -o '' x 1M
qcow2 -o =5 x 1M
qcow2 -o foo x 1M
qcow2 -o nofoo x 1M
qcow2 -o foo=1 x 1M
qcow2 -o help=foo x 1M
qcow2 -o ' cluster_size=4k' x 1M
qcow2 -o size=3M x
qcow2 -o size=3M x 4M
qcow2 -o size=1Z x
qcow2 -o size=1.5k x
qcow2 -o size=-1 x
qcow2 -o size=16E x
qcow2 -o size=8E x
qcow2 -o cluster_size=4k -o cluster_size=8k x 1M
qcow2 -o cluster_size=0x1000 x 1M
qcow2 -o cluster_size=1.5k x 1M
qcow2 -o cluster_size=3k x 1M
qcow2 -o cluster_size=4M x 1M
qcow2 -o cluster_size=256 x 1M
qcow2 -o cluster_size= x 1M
qcow2 -o cluster_size=-4k x 1M
qcow2 -o cluster_size x 1M
qcow2 -o refcount_bits=1 x 1M
qcow2 -o refcount_bits=64,cluster_size=512 x 1M
qcow2 -o refcount_bits=3 x 1M
qcow2 -o refcount_bits=128 x 1M
qcow2 -o refcount_bits=a x 1M
qcow2 -o refcount_bits= x 1M
qcow2 -o refcount_bits=1k x 1M
qcow2 -o refcount_bits=-1 x 1M
qcow2 -o refcount_bits=0x10 x 1M
qcow2 -o refcount_bits=010 x 1M
qcow2 -o 'refcount_bits= 8' x 1M
qcow2 -o refcount_bits=18446744073709551616 x 1M
qcow2 -o compat=0.10 x 1M
qcow2 -o compat=1.1 x 1M
qcow2 -o compat=v2 x 1M
qcow2 -o compat=v3 x 1M
qcow2 -o compat=foo x 1M
qcow2 -o compat= x 1M
qcow2 -o compat x 1M
qcow2 -o compat=0.10,refcount_bits=1 x 1M
qcow2 -o compat=0.10,lazy_refcounts=on x 1M
qcow2 -o compat=0.10,compression_type=zstd x 1M
qcow2 -o compression_type=zstd x 1M
qcow2 -o compression_type=foo x 1M
qcow2 -o lazy_refcounts x 1M
qcow2 -o nolazy_refcounts x 1M
qcow2 -o lazy_refcounts=yes x 1M
qcow2 -o lazy_refcounts=ON x 1M
qcow2 -o lazy_refcounts= x 1M
qcow2 -o lazy_refcounts=maybe x 1M
qcow2 -o preallocation=off x 4M
qcow2 -o preallocation=metadata x 4M
qcow2 -o preallocation=falloc x 4M
qcow2 -o preallocation=full x 4M
qcow2 -o preallocation=foo x 4M
qcow2 -o preallocation x 4M
qcow2 -o preallocation=falloc,,help x 4M
qcow2 -o extended_l2=off x 4M
qcow2 -b base.raw -F raw x
qcow2 -b base.qcow2 -F qcow2 x
qcow2 -b base.qcow2 -F qcow2 x 5M
qcow2 -b base.qcow2 -F qcow2 x 20M
qcow2 -b base.qcow2 -F raw x
qcow2 -b junk.bin -F raw x
qcow2 -b junk.bin -F qcow2 x
qcow2 -b missing -F qcow2 x 5M
qcow2 -b missing x 5M
qcow2 -b missing x
qcow2 -u -b missing -F qcow2 x 5M
qcow2 -u -b missing -F qcow2 x
qcow2 -u -b missing x 5M
qcow2 -u -b missing -F foo x 5M
qcow2 -u -b a,b -F raw x 5M
qcow2 -u -o backing_file=a,,b,backing_fmt=raw x 1M
qcow2 -o backing_file=base.raw,backing_fmt=raw x
qcow2 -o backing_fmt=qcow2 -b base.raw -F raw x
qcow2 -b base.raw -F foo x 1M
qcow2 -b base.raw -F '' x 1M
qcow2 -b '' x 1M
qcow2 -F raw x 1M
qcow2 -F '' x 1M
qcow2 -b x -F qcow2 x
qcow2 -b foo:bar -F raw x 1M
qcow2 -b file:base.raw -F raw x 1M
qcow2 -b overlay.qcow2 -F qcow2 x
qcow2 -b dangling.qcow2 -F qcow2 x
qcow2 -b base.raw -F raw folder/x
qcow2 -b ../base.raw -F raw folder/x
qcow2 -o preallocation=metadata -b base.raw -F raw x 1M
qcow2 -o size=1 -b base.raw -F raw x
qcow2 x 1M -q
""".strip().splitlines()


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("create")
    (folder / "folder").mkdir()
    (folder / "junk.bin").write_bytes(b"junk")
    for line in (
        "-f raw base.raw 640k", "-f qcow2 base.qcow2 640k", "-f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        "-f qcow2 -u -b missing -F raw dangling.qcow2 1M",
    ):  # fmt: skip
        subprocess.run(["qemu-img", "create", "-q", *words(line)], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("line", LINES)
def test_as_qemu_img(line: str, master: Path, tmp_path: Path) -> None:
    fmt, *rest = words(line)
    arguments = ["create", "-f", fmt, *rest]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        shutil.copytree(master, folder)
    mine, qemus = safeimg(arguments, ours), qemu_img(arguments, theirs)
    assert mine.stdout == qemus.stdout
    assert mine.stderr.rstrip(b"\n").replace(b"safeimg", b"qemu-img") == qemus.stderr.rstrip(b"\n")
    assert mine.code == qemus.code
    if qemus.code == 0:
        made = next((name for name in ("x", "foo:bar", "a,b", "folder/x") if (theirs / name).exists()), None)
        assert made is not None
        assert _info(ours / made) == _info(theirs / made)
        if fmt == "qcow2" and "-u" not in rest:
            checked = qemu_img(["check", f"./{made}"], ours)
            assert checked.code == 0, checked


def _info(path: Path) -> list[str]:
    lines = qemu_img(["info", f"./{path.name}"], path.parent).stdout.decode().splitlines()
    return [line for line in lines if not line.startswith("disk size")]


def test_the_backing_image_is_never_overwritten(master: Path, tmp_path: Path) -> None:
    """qemu-img compares names only, and makes an image that is its own backing image."""
    shutil.copytree(master, tmp_path / "here")
    before = (tmp_path / "here/base.raw").read_bytes()
    result = safeimg(words("create -f qcow2 -b ./base.raw -F raw base.raw 1M"), tmp_path / "here")
    assert result.code == 1
    assert b"same filename as the backing file" in result.stderr
    assert (tmp_path / "here/base.raw").read_bytes() == before


def test_an_image_in_use_is_not_overwritten(tmp_path: Path) -> None:
    assert safeimg(words("create -f raw x 1M"), tmp_path).code == 0
    (tmp_path / "x").write_bytes(b"precious" * 64)
    guest = subprocess.Popen(
        ["qemu-io", "-f", "raw", "x"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert guest.stdin is not None and guest.stdout is not None
        guest.stdin.write(b"read 0 512\n")
        guest.stdin.flush()
        guest.stdout.readline()  # the lock is held once it answers
        result = safeimg(words("create -f qcow2 x 1M"), tmp_path)
        assert (tmp_path / "x").read_bytes() == b"precious" * 64
        theirs = qemu_img(words("create -f qcow2 x 1M"), tmp_path)  # which removes the file, used or not
        assert result.code == theirs.code == 1
        assert result.stderr.replace(b"safeimg", b"qemu-img") == theirs.stderr
    finally:
        guest.communicate(b"quit\n")
