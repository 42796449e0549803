"""Encrypted images and external data files through the commands, judged by QEMU's tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from twin import TRIES, UNTIMED

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-img and qemu-io")

SECRET = ("--object", "secret,id=s0,data=hunter2")
WAYS = {
    "luks": "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10",
    "luks-cbc": "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,encrypt.cipher-mode=cbc,"
                "encrypt.ivgen-alg=essiv,cluster_size=4k",
    "aes": "encrypt.format=aes,encrypt.key-secret=s0,compat=0.10",
}  # fmt: skip


def opts(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=s0,file.filename={path}"


def qemu(tool: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    for _ in range(TRIES):
        done = subprocess.run([f"qemu-{tool}", *map(str, words)], capture_output=True, text=True, check=False)
        if UNTIMED.decode() not in done.stderr:
            break
    return done


def ours(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safeimg.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def both(*words: str | Path) -> None:
    """The same output, messages and exit code."""
    expected, found = qemu("img", *words), ours(*words)
    assert found.stdout == expected.stdout
    assert found.stderr.replace("safeimg:", "qemu-img:") == expected.stderr
    assert found.returncode == expected.returncode


def fine(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.qcow2"
    fine(qemu("img", "create", "-q", "-f", "qcow2", path, "3M"))
    fine(qemu("io", "-c", "write -P 3 10k 300k", "-c", "write -P 4 1M 65000", "-c", "write -z 100k 64k", path))
    return path


@pytest.mark.parametrize("way", WAYS)
def test_encrypted_images(tmp_path: Path, source: Path, way: str) -> None:
    """Made by convert, described, mapped, checked, compared, committed into, converted again."""
    image, top = tmp_path / "image.qcow2", tmp_path / "top.qcow2"
    fine(ours("convert", *SECRET, "-O", "qcow2", "-o", WAYS[way], source, image))
    fine(qemu("img", "check", *SECRET, "--image-opts", opts(image)))
    plain = f"driver=qcow2,file.filename={source}"
    fine(qemu("img", "compare", *SECRET, "--image-opts", opts(image), plain))
    assert b"\3" * 512 not in image.read_bytes()
    for words in (("info",), ("info", "--output=json"), ("check",), ("map",)):
        both(*words, image)
    for words in (("map",), ("map", "--output=json"), ("check",), ("info",)):
        both(*words, *SECRET, "--image-opts", opts(image))
    both("map", "--image-opts", opts(image))
    if way != "aes":
        both("map", "--object", "secret,id=s0,data=wrong", "--image-opts", opts(image))
    below = f"backing.driver=qcow2,backing.encrypt.key-secret=s0,backing.file.filename={image}"
    fine(ours("create", "-q", "-f", "qcow2", "-u", "-b", image, "-F", "qcow2", top, "3M"))
    chain = f"driver=qcow2,file.filename={top},{below}"
    write = ("-c", "write -P 7 0 3k", "-c", "write -z 1M 64k", "-c", "write -P 8 2900k 100k")
    fine(qemu("io", *SECRET, "--image-opts", chain, *write))
    want = tmp_path / "want.raw"
    fine(qemu("img", "convert", *SECRET, "--image-opts", chain, "-O", "raw", want))
    fine(ours("commit", *SECRET, "--image-opts", chain))
    fine(qemu("img", "compare", *SECRET, "--image-opts", opts(image), f"driver=raw,file.filename={want}"))
    fine(qemu("img", "check", *SECRET, "--image-opts", opts(image)))
    back = tmp_path / "back.raw"
    fine(ours("convert", *SECRET, "--image-opts", opts(image), "-O", "raw", back))
    assert back.read_bytes() == want.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "encrypt.format=luks", "encrypt.format=luks,encrypt.key-secret=s1", "encrypt.key-secret=s0", "encryption=on",
        "encryption=on,encrypt.format=aes,encrypt.key-secret=s0", "encrypt.format=lukx,encrypt.key-secret=s0",
        "encrypt.format=aes,encrypt.key-secret=s0,encrypt.cipher-alg=aes-256",
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.cipher-alg=foo",
        "data_file=/nonexistent/x", "data_file_raw=on", "data_file=x,compat=0.10",
    ],
)  # fmt: skip
def test_what_cannot_be_made(tmp_path: Path, options: str) -> None:
    both("create", *SECRET, "-f", "qcow2", "-o", options, tmp_path / "image.qcow2", "1M")
    assert not (tmp_path / "image.qcow2").exists()


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("layout", ["cluster_size=4k", "extended_l2=on"])
def test_data_files(tmp_path: Path, source: Path, raw: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = f"data_file=data.bin,data_file_raw={raw},{layout}"
    image, top, data = Path("image.qcow2"), Path("top.qcow2"), Path("data.bin")
    fine(ours("convert", "-O", "qcow2", "-o", options, source, image))
    fine(qemu("img", "compare", image, source))
    write = ("-c", "write -z 64k 64k", "-c", "write -P 5 2M 64k", "-c", "discard 2M 64k", "-c", "write -P 9 70k 1")
    fine(qemu("io", *write, image))
    for words in (("info",), ("info", "--output=json"), ("check",), ("map",), ("map", "--output=json")):
        both(*words, image)
    fine(qemu("img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", top, "4M"))
    fine(qemu("io", "-c", "write -P 7 1k 3k", "-c", "write -z 40k 64k", "-c", "write -P 8 3M 100k", top))
    want = tmp_path / "want.raw"
    fine(qemu("img", "convert", top, "-O", "raw", want))
    fine(ours("commit", top))
    fine(qemu("img", "compare", image, want))
    fine(qemu("img", "check", image))
    assert data.stat().st_size == 4 << 20
    if raw == "on":
        assert data.read_bytes() == want.read_bytes()
    fine(ours("convert", "-n", source, "-O", "qcow2", image))
    back = tmp_path / "back.raw"
    fine(ours("convert", image, "-O", "raw", back))
    fine(qemu("img", "compare", image, back))
    data.rename("moved.bin")
    both("map", image)
    both("info", image)
    both("map", "--image-opts", f"driver=qcow2,file.filename={image},data-file.filename=moved.bin")
    both("map", "--image-opts", f"driver=qcow2,file.filename={source},data-file.filename=moved.bin")


PASSWORDS = (*SECRET, "--object", "secret,id=s1,data=new1", "--object", "secret,id=s2,data=new2")
FAST = "encrypt.iter-time=10"
KEY_CHANGES = [
    ("encrypt.state=active,encrypt.new-secret=s1", FAST),
    ("encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=1", FAST),
    ("--force", "encrypt.state=active,encrypt.new-secret=s2,encrypt.keyslot=1", FAST),
    ("encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=8",),
    ("encrypt.state=active", FAST),
    ("encrypt.state=foo",),
    ("encrypt.keyslot=1",),
    ("encrypt.state=inactive",),
    ("encrypt.state=inactive,encrypt.keyslot=5",),
    ("encrypt.state=inactive,encrypt.old-secret=s1",),
    ("encrypt.state=inactive,encrypt.old-secret=s1,encrypt.keyslot=1",),
    ("encrypt.state=inactive,encrypt.old-secret=s2",),
    ("encrypt.state=inactive,encrypt.keyslot=0",),
    ("encrypt.state=inactive,encrypt.old-secret=s0",),
    ("encrypt.state=active,encrypt.new-secret=nope",),
]


def test_passwords_come_and_go(tmp_path: Path) -> None:
    """The same changes by qemu-img and safeimg: the same messages, and the same passwords open both images after."""
    image, twin = tmp_path / "image.qcow2", tmp_path / "twin.qcow2"
    fine(qemu("img", "create", "-q", *SECRET, "-f", "qcow2", "-o", WAYS["luks"], image, "1M"))
    shutil.copy(image, twin)
    for change in KEY_CHANGES:
        words = [word for text in change for word in ((text,) if text == "--force" else ("-o", text))]
        expected = qemu("img", "amend", *PASSWORDS, "--image-opts", opts(twin), *words)
        found = ours("amend", *PASSWORDS, "--image-opts", opts(image), *words)
        assert found.stderr.replace("safeimg:", "qemu-img:") == expected.stderr
        assert found.returncode == expected.returncode
    for name in ("s0", "s1", "s2"):
        with_it = [f"driver=qcow2,encrypt.key-secret={name},file.filename={path}" for path in (image, twin)]
        ours_opens, theirs_opens = (qemu("img", "map", *PASSWORDS, "--image-opts", text) for text in with_it)
        assert ours_opens.returncode == theirs_opens.returncode
    fine(qemu("img", "check", *SECRET, "--image-opts", opts(image)))


def test_a_password_that_was_removed_leaves_nothing(tmp_path: Path) -> None:
    """No key material of an erased slot is anywhere in the image, nor in what the journal keeps."""
    image = tmp_path / "image.qcow2"
    fine(qemu("img", "create", "-q", *SECRET, "-f", "qcow2", "-o", WAYS["luks"], image, "1M"))
    added = f"encrypt.state=active,encrypt.new-secret=s1,{FAST}"
    fine(qemu("img", "amend", *PASSWORDS, "--image-opts", opts(image), "-o", added))
    content = image.read_bytes()
    slot = content[0x40000 + 262144 : 0x40000 + 262144 + 4096]  # the beginning of the second slot's material
    assert slot.strip(b"\0") and slot in content
    removed = "encrypt.state=inactive,encrypt.old-secret=s1"
    fine(ours("amend", *PASSWORDS, "--image-opts", opts(image), "-o", removed))
    assert slot not in image.read_bytes()
    history = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert slot[:64] not in history and b"new1" not in history and b"hunter2" not in history
