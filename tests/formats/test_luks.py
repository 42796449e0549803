"""LUKS images against qemu-img: what one makes the other reads, with each cipher, mode and hash that both have;
options, messages and exit codes are the same; unfinished ones are refused; a key slot changes in one sector."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import pytest
from luks_images import FS, KIB, WORDS, made, made_by_qemu, opened, opts, run
from planner_harness import needs_qemu
from safeimg.drivers.crypto.ciphers import ALGORITHMS, supported
from safeimg.drivers.errors import FormatError, SecretMissing, StorageError, UsageError
from safeimg.drivers.formats.chain import OpenError, open_chain
from safeimg.drivers.formats.luks.create import finish_patch
from safeimg.drivers.formats.luks.driver import driver
from safeimg.drivers.formats.registry import probe
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import View
from twin import Outcome, assert_same, qemu_img, safeimg

pytestmark = needs_qemu
SIZE = 96 * KIB

WAYS = [
    *({"cipher_alg": name} for name in ALGORITHMS if supported(name) and not name.startswith("cast5")),
    {"cipher_alg": "serpent-256", "cipher_mode": "cbc", "ivgen_alg": "essiv"},
    {"cipher_alg": "cast5-128", "cipher_mode": "cbc"},
    {"cipher_alg": "cast5-128", "cipher_mode": "ecb", "ivgen_alg": "plain", "hash_alg": "sha1"},
    {"cipher_mode": "cbc", "ivgen_alg": "essiv", "ivgen_hash_alg": "md5", "cipher_alg": "aes-128"},
    {"cipher_mode": "ctr", "hash_alg": "ripemd160"},
    {"cipher_mode": "ecb", "cipher_alg": "aes-256"},
    *({"hash_alg": name} for name in ("md5", "sha224", "sha384")),
]


def content_of(path: Path) -> bytes:
    """What safeimg reads."""
    image = opened(path)
    data = bytearray(image.size)
    View([image]).read_into(0, memoryview(data))
    image.close()
    return bytes(data)


def read_by_qemu(path: Path) -> bytes:
    out = path.with_suffix(".guest")
    run("qemu-img", "convert", *WORDS, "--image-opts", "-O", "raw", opts(path), out)
    return out.read_bytes()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_qemu_reads_ours(tmp_path: Path, way: dict[str, str]) -> None:
    path = made(tmp_path / "image.luks", SIZE, **way)
    written = random.Random(2).randbytes(40 * KIB)
    image = opened(path, write=True)
    for start in (0, SIZE - 40 * KIB):
        for place in driver.planner(image).place(start, 40 * KIB):
            Target(image.data, image.cipher).write(memoryview(bytearray(written)), place.offset, place.start)
    image.close()
    found = read_by_qemu(path)
    assert found[: 40 * KIB] == found[-40 * KIB :] == written
    assert found == content_of(path)


THEIRS = [
    {"hash_alg": "sha512"}, {"cipher_mode": "cbc", "ivgen_alg": "essiv", "cipher_alg": "aes-128"},
    {"cipher_alg": "cast5-128", "cipher_mode": "cbc", "hash_alg": "ripemd160"}, {"cipher_mode": "ctr"},
    {"cipher_alg": "serpent-192"}, {"cipher_alg": "twofish-128", "cipher_mode": "cbc"},
]  # fmt: skip


@pytest.mark.parametrize("way", THEIRS, ids=lambda way: " ".join(way.values()))
def test_we_read_qemu_s(tmp_path: Path, way: dict[str, str]) -> None:
    path = made_by_qemu(tmp_path / "image.luks", SIZE, **way)
    writes = ("write -P 7 5k 33k", "write -P 9 70k 20k")
    run("qemu-io", *WORDS, "--image-opts", *(word for line in writes for word in ("-c", line)), opts(path))
    expected = read_by_qemu(path)
    assert expected[5 * KIB : 38 * KIB] == b"\7" * 33 * KIB and len(expected) == SIZE
    assert content_of(path) == expected


def comparable(path: Path) -> dict[str, object]:
    """What qemu-img says of an image, but for what is chosen at random or measured."""
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    data = info["format-specific"]["data"]
    del data["uuid"], data["master-key-iters"], data["slots"][0]["iters"]
    return {name: info[name] for name in ("virtual-size", "format", "format-specific", "encrypted")}


@pytest.mark.parametrize(("size", "preallocation"), [(0, "off"), (1000, "falloc"), (SIZE, "full")])
def test_as_qemu_img_makes_them(tmp_path: Path, size: int, preallocation: str) -> None:
    ours, theirs = tmp_path / "ours.luks", tmp_path / "theirs.luks"
    ours.write_bytes(b"something" * 10000)
    made(ours, size, preallocation=preallocation)
    made_by_qemu(theirs, size, preallocation=preallocation)
    assert comparable(ours) == comparable(theirs)
    assert ours.stat().st_size == theirs.stat().st_size
    assert ours.stat().st_blocks == theirs.stat().st_blocks
    assert opened(ours).size == opened(theirs).size


def test_an_unfinished_image_is_refused_until_it_is_finished(tmp_path: Path) -> None:
    path = made(tmp_path / "image.luks", SIZE, unfinished="convert")
    refused = "Could not open .*Hash algorithm 'safeimg-unfinished:sha256' not supported"
    assert b"'safeimg-unfinished:sha256' not supported" in qemu_img(["info", path.name], tmp_path).stderr
    with pytest.raises(OpenError, match=refused):
        open_chain(FS, str(path), inspect=True)
    image = opened(path, write=True, repair=True)
    (patch,) = driver.unfence(image)
    image.file.pwrite(patch.offset, patch.after)
    assert driver.unfence(driver.reopen(image)) == ()
    with pytest.raises(FormatError, match="not an unfinished one"):
        finish_patch(image.file)
    image.close()
    assert comparable(path) == comparable(made(tmp_path / "finished.luks", SIZE))


def test_probing(tmp_path: Path) -> None:
    path = made(tmp_path / "image.luks", SIZE)
    assert probe(FS.open(str(path))).name == "luks"
    with path.open("r+b") as file:
        file.seek(7)
        file.write(b"\2")  # as in qemu-img, version 2 is a raw disk
    assert probe(FS.open(str(path))).name == "raw"
    assert json.loads(run("qemu-img", "info", "--output=json", path))["format"] == "raw"


def test_without_the_secret(tmp_path: Path) -> None:
    path = made(tmp_path / "image.luks", SIZE)
    (image,) = open_chain(FS, str(path), inspect=True)
    with pytest.raises(SecretMissing, match="Parameter 'key-secret' is required for cipher"):
        View([image]).read_into(0, memoryview(bytearray(512)))
    with pytest.raises(UsageError, match="Invalid password"):
        opened(path, secret="w")


LINES = """\
create -f luks -o help
create -f luks -o help new
amend -f luks -o help
create -f luks -o key-secret=s,iter-time=1 new 1M
create -f luks new
create -f luks -b a.luks -F luks -o key-secret=s new
create -f luks -o key-secret=zz new 1M
create -f luks new 1M
create -f luks -o key-secret=s,iter-time=1,cipher-alg=foo new 1M
create -f luks -o key-secret=s,iter-time=1,hash-alg=foo new 1M
create -f luks -o key-secret=s,iter-time=1,preallocation=foo new 1M
create -f luks -o key-secret=s,iter-time=1,cipher-alg=des new 1M
create -f luks -o key-secret=s,iter-time=1,cipher-alg=cast5-128 new 1M
create -f luks -o key-secret=s,iter-time=1,preallocation=full,nocow=on new 1M
create -f luks -o key-secret=s,iter-time=1 new 7E
create -f luks -o key-secret=s,iter-time=1 nowhere/new 1M
create -f qcow2 -F luks -b a.luks new
create -f qcow2 -b a.luks new
info a.luks
info --output=json a.luks
info --image-opts driver=luks,key-secret=zz,file.filename=a.luks
info --output=json --image-opts LUKS
info short.luks
map a.luks
map --image-opts driver=luks,key-secret=w,file.filename=a.luks
map --output=json --image-opts LUKS
map --output=json --image-opts driver=luks,key-secret=s,file.filename=odd.luks
map --image-opts driver=luks,key-secret=s,foo=1,file.filename=a.luks
check a.luks
check --image-opts LUKS
check -r all --image-opts LUKS
snapshot -c x --image-opts LUKS
rebase -u -b '' --image-opts LUKS
compare --image-opts LUKS RAW
compare --image-opts LUKS driver=luks,key-secret=s,file.filename=odd.luks
resize --image-opts LUKS 1000
resize --shrink --image-opts LUKS 1000
resize --preallocation=metadata --image-opts LUKS 2M
resize --preallocation=falloc --image-opts driver=luks,key-secret=s,file.filename=odd.luks +1M
resize --image-opts LUKS +1500000
resize --image-opts LUKS 7E
resize --image-opts LUKS 9223372035781033984
resize --image-opts LUKS 9223372035781033985
dd -f raw -O luks if=a.raw of=new
dd -O raw --image-opts if=LUKS of=new bs=1000 skip=3
convert -f raw -O luks a.raw new
convert -c -f raw -O luks -o key-secret=s,iter-time=1 a.raw new
convert -B a.raw -F raw -f raw -O luks -o key-secret=s,iter-time=1 a.raw new
convert -O raw --image-opts LUKS new
convert -n -c --image-opts --target-image-opts RAW LUKS
convert -n --image-opts --target-image-opts RAW LUKS
measure -O luks -o key-secret=zz --size 1M
measure -O luks -o key-secret=s,cipher-alg=aes-128,cipher-mode=cbc,iter-time=1 --size 7E
measure -O luks -o key-secret=s,cipher-alg=des --size 1M
measure -O luks -o key-secret=s,foo=1 --size 1M
measure -O luks --output=json -o key-secret=s,iter-time=1 --image-opts driver=luks,key-secret=s,file.filename=odd.luks
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made")
    made_by_qemu(folder / "a.luks", SIZE)
    (folder / "a.raw").write_bytes(random.Random(1).randbytes(SIZE - 1536) + bytes(1536))
    target = f"driver=raw,file.filename={folder / 'a.raw'}", opts(folder / "a.luks")
    run("qemu-img", "convert", "-n", *WORDS, "--image-opts", "--target-image-opts", *target)
    odd = (folder / "a.luks").read_bytes()[:-1500]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"odd.luks": odd, "short.luks": odd[:70000]}


def laid_out(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def with_secrets(line: list[str]) -> list[str]:
    """Behind the command, unless help is asked for."""
    return line if "help" in line else [line[0], *WORDS, *line[1:]]


@pytest.mark.parametrize("line", LINES.splitlines())
def test_as_qemu_img_says(tmp_path: Path, made_once: dict[str, bytes], line: str) -> None:
    named = line.replace("RAW", "driver=raw,file.filename=a.raw").replace("LUKS", opts("a.luks"))
    words = with_secrets(shlex.split(named))
    theirs, ours = (laid_out(tmp_path / name, made_once) for name in ("theirs", "ours"))
    expected = qemu_img(words, theirs)
    assert safeimg(words, ours, name="qemu-img") == expected
    found = {path.name: path.stat().st_size for path in ours.iterdir()}
    assert found == {path.name: path.stat().st_size for path in theirs.iterdir()}
    if expected.code == 0:
        changed = [(folder / "a.luks").read_bytes() != made_once["a.luks"] for folder in (ours, theirs)]
        assert changed[0] == changed[1]
        if changed[0]:
            assert content_of(ours / "a.luks")[:1000] == content_of(theirs / "a.luks")[:1000]


SLOTS = """\
state=active,new-secret=n,iter-time=1
state=active,new-secret=n,iter-time=1,keyslot=0
state=active,new-secret=n,iter-time=1,keyslot=6
state=active,new-secret=n,iter-time=1,keyslot=7
state=active,new-secret=zz,keyslot=2
state=active,new-secret=n,keyslot=8
state=active,new-secret=n,keyslot=-1
state=active,iter-time=1,keyslot=3
state=inactive
state=inactive,old-secret=w
state=inactive,keyslot=5
state=inactive,keyslot=8
state=inactive,old-secret=n,keyslot=0
state=inactive,old-secret=n,new-secret=s
state=inactive,old-secret=n,iter-time=3
state=foo
new-secret=n
size=2M
cipher-alg=aes-128
preallocation=off
foo=1
state=inactive,old-secret=n
state=inactive,old-secret=s
state=inactive,keyslot=0
"""


def test_key_slots(tmp_path: Path, made_once: dict[str, bytes]) -> None:
    theirs, ours = (laid_out(tmp_path / name, {"a.luks": made_once["a.luks"]}) for name in ("theirs", "ours"))
    content = content_of(ours / "a.luks")
    for options in SLOTS.splitlines():
        line = ["amend", *WORDS, "--image-opts", opts("a.luks"), "-o", options]
        assert safeimg(line, ours, name="qemu-img") == qemu_img(line, theirs), options
        assert slots_of(ours / "a.luks") == slots_of(theirs / "a.luks"), options
    assert content_of(ours / "a.luks") == content
    line = ["amend", "--force", *WORDS, "--image-opts", opts("a.luks"), "-o", "state=inactive,keyslot=0"]
    assert safeimg(line, ours).code == 0
    assert slots_of(ours / "a.luks") == [None] * 8
    with pytest.raises(UsageError, match="Invalid password"):
        opened(ours / "a.luks")


def slots_of(path: Path) -> list[int | None]:
    """Where the key material of the active ones lies."""
    slots = json.loads(run("qemu-img", "info", "--output=json", path))["format-specific"]["data"]["slots"]
    return [slot["key-offset"] if slot["active"] else None for slot in slots]


def amended(path: Path, options: str, *, force: bool = False) -> Outcome:
    line = ["amend", *(["--force"] if force else []), *WORDS, "--image-opts", opts(path), "-o", options]
    return safeimg(line, path.parent)


def test_a_password_that_is_replaced_opens_the_disk_until_the_new_one_does(tmp_path: Path) -> None:
    path = made(tmp_path / "image.luks", SIZE)
    content, before = content_of(path), path.read_bytes()
    assert amended(path, "state=active,new-secret=n,iter-time=1,keyslot=0", force=True).code == 0
    assert opened(path, secret="n").size == SIZE
    with pytest.raises(UsageError, match="Invalid password"):
        opened(path)
    run("qemu-img", "map", "--output=json", *WORDS, "--image-opts", opts(path, "n"))
    after = path.read_bytes()
    (old,) = (slot for slot in opened(path, secret="n").header.slots[1:] if slot.offset == 4096)
    assert not old.active
    material = slice(4096, 4096 + 64 * 4000)
    same = sum(before[at : at + 512] == after[at : at + 512] for at in range(material.start, material.stop, 512))
    assert same == 0, "the old key material is still there"
    assert after[len(after) - SIZE :] == before[len(before) - SIZE :]
    assert content == bytes(_read(opened(path, secret="n")))


def _read(image: object) -> bytearray:
    data = bytearray(image.size)  # type: ignore[attr-defined]
    View([image]).read_into(0, memoryview(data))  # type: ignore[list-item]
    return data


def test_a_slot_that_one_sector_cannot_exchange_has_to_be_erased_first(tmp_path: Path) -> None:
    path = made(tmp_path / "image.luks", SIZE)
    assert amended(path, "state=active,new-secret=n,iter-time=1,keyslot=6").code == 0
    before = path.read_bytes()
    refused = amended(path, "state=active,new-secret=w,iter-time=1,keyslot=6", force=True)
    assert refused.stderr == b"safeimg: Refusing to overwrite active keyslot 6 - please erase it first\n"
    assert path.read_bytes() == before


def test_a_convert_into_a_disk_that_is_full_of_noise(tmp_path: Path) -> None:
    """Zeroes of the source are written: what is not there is no zero once it is decrypted."""
    (tmp_path / "a.raw").write_bytes(bytes(200 * KIB) + b"x" * 100 + bytes(100 * KIB - 100))
    line = ["convert", *WORDS, "-f", "raw", "-O", "luks", "-o", "key-secret=s,iter-time=1", "a.raw", "new"]
    assert safeimg(line, tmp_path).code == 0
    assert content_of(tmp_path / "new") == (tmp_path / "a.raw").read_bytes()
    same = ["compare", *WORDS, "--image-opts", "driver=raw,file.filename=a.raw", opts("new")]
    assert_same(same, tmp_path)


def overlay_of(base: Path, size: int) -> str:
    top = base.with_name("top.qcow2")
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", "luks", top, str(size))
    below = f"backing.driver=luks,backing.key-secret=s,backing.file.filename={base}"
    return f"driver=qcow2,file.filename={top},{below}"


def test_a_base_grows_only_where_its_overlay_holds_all(tmp_path: Path) -> None:
    """Where it does not, zeroes would become noise."""
    base = made(tmp_path / "base.luks", 64 * KIB)
    top = overlay_of(base, 192 * KIB)
    run("qemu-io", *WORDS, "--image-opts", "-c", "write -P 5 64k 64k", top)
    before = base.read_bytes()
    refused = safeimg(["commit", *WORDS, "--image-opts", top], tmp_path)
    assert (refused.code, refused.stderr.count(b"would read as noise")) == (1, 1)
    assert base.read_bytes() == before
    run("qemu-io", *WORDS, "--image-opts", "-c", "write -P 6 128k 64k", top)
    assert safeimg(["commit", *WORDS, "--image-opts", top], tmp_path).code == 0
    content = read_by_qemu(base)
    assert content[64 * KIB :] == b"\5" * 64 * KIB + b"\6" * 64 * KIB


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was emptied is gone after an error, as with qemu-img."""
    path = tmp_path / "image.luks"
    path.write_bytes(b"something")

    def full(*_: object, **__: object) -> None:
        raise StorageError(str(path), "write", OSError(28, "No space left on device"))

    monkeypatch.setattr("safeimg.drivers.storage.file.LocalFile.write_zeroes", full)
    with pytest.raises(StorageError, match="No space left"):
        made(path, SIZE, preallocation="full")
    assert not path.exists()
