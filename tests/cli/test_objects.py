"""`--object`: what it takes and refuses is what qemu-img does; what it holds shows nowhere."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC
from hypothesis import given
from hypothesis import strategies as st
from safeimg.cli.objects import store, user_object
from safeimg.cli.running import recorded
from safeimg.drivers.errors import UsageError
from safeimg.drivers.secrets import Secrets, decode_base64
from twin import assert_same

KEY = base64.b64encode(bytes(range(32))).decode()
IV = base64.b64encode(bytes(range(16))).decode()
KEY_OBJECT = f"secret,id=k,format=base64,data={KEY}"

OBJECTS = [
    ["secret,id=s,data=abc"], ["secret,data=abc"], ["secret,id=s"], ["secret,id=s,data=a,file=/dev/null"], ["secret"],
    ["secret,id=s,file=nope"], ["secret,id=s,file=."], ["secret,id=s,data="], ["secret,id=s,data=abc,format=base64"],
    ["secret,id=s,data=x,format=hex"], ["secret,id=s,data=x,format="], ["secret,id=s,data=x,foo=1"],
    ["secret,id=1s,data=x"], ["secret,id=,data=x"], ["secret,id=a/b,data=x"], ["secret,id=s,data=x,keyid=k"],
    ["secret,id=s,data=x,iv=k"], ["qom-type=secret,id=s,data=abc"], ["foo,id=s"], [""], ["id=s,data=abc"],
    ["secret,id=s,id=t,data=x"], ["secret,id=s,data=x,loaded=on"], ["secret,id=s,data=x,loaded=foo"],
    ["secret,id=s,data=YW Jj,format=base64"], ["secret,id=s,data"], ["secret,id=s,data=x,"], [",secret"],
    ["secret,=x"], ["secret,id=s,data=x,1=2"], ["secret,id=s,d$=2"], ["secret,id=s,foo.bar=1"],
    ["secret,id=s,data.x=1"], ["secret,id=s,,data=x"], ["secret,id=s,data=a,,b"], ["secret,id=s,data=a=b"],
    ["iothread,id=i"], ["iothread"], ["authz-list-file,id=x"], ["authz-list,id=x"],
    ["help"], ["secret,help"], ['{"qom-type":"secret","id":"s","data":"x"}'], ['{"qom-type":"secret","id":"s"'],
    ['{"qom-type":"secret","id":"s","data":1}'], ['{"id":"s"}'], ["secret,id=s,data=a", "secret,id=s,data=b"],
    [KEY_OBJECT, f"secret,id=s,data=AAAA,keyid=k,iv={IV},format=base64"],
    [KEY_OBJECT, "secret,id=s,data=AAAA,keyid=k,iv=AAAA,format=base64"],
    [KEY_OBJECT, "secret,id=s,data=AAAA,keyid=k,iv=!,format=base64"],
    [KEY_OBJECT, "secret,id=s,data=AAAA,keyid=k,format=base64"],
    [KEY_OBJECT, f"secret,id=s,data={'A' * 24},keyid=k,iv={IV}"],
    [KEY_OBJECT, f"secret,id=s,data={'A' * 16},keyid=k,iv={IV}"],
    [KEY_OBJECT, f"secret,id=s,data={'A' * 16},keyid=nope,iv={IV}"],
    ["secret,id=k,data=short", f"secret,id=s,data={'A' * 16},keyid=k,iv={IV}"],
]  # fmt: skip


@pytest.mark.parametrize("objects", OBJECTS, ids=lambda objects: objects[-1][:40])
def test_as_qemu_img(images: Path, objects: list[str]) -> None:
    words = [word for each in objects for word in ("--object", each)]
    assert_same(["info", *words, "small.qcow2"], images)


def load(*objects: str) -> Secrets:
    secrets, others = Secrets(), []
    for each in map(user_object, objects):
        store(each, others, secrets)
        others.append(each)
    return secrets


@given(st.binary(max_size=80))
def test_encrypted_secrets_as_openssl_makes_them(content: bytes) -> None:
    cipher = Cipher(AES(bytes(range(32))), CBC(bytes(range(16)))).encryptor()
    padding = 16 - len(content) % 16
    stored = cipher.update(content + bytes([padding]) * padding) + cipher.finalize()
    text = base64.b64encode(stored).decode()
    secrets = load(KEY_OBJECT, f"secret,id=s,format=base64,data={text},keyid=k,iv={IV}")
    assert secrets.lookup("s") == content


@given(st.binary(max_size=80))
def test_base64_is_what_the_standard_library_makes_of_it(content: bytes) -> None:
    assert decode_base64(base64.encodebytes(content)) == content


def test_contents(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"from a file\n")
    secrets = load("secret,id=a,data=x,,y", f"secret,id=b,file={tmp_path}/key", "secret,id=c,format=base64,data=/w==")
    assert [secrets.lookup(name) for name in "abc"] == [b"x,y", b"from a file\n", b"\xff"]
    assert secrets.password("a") == b"x,y"
    with pytest.raises(UsageError, match=r"^Data from secret c is not valid UTF-8$"):
        secrets.password("c")
    with pytest.raises(UsageError, match=r"^No secret with id 'd'$"):
        secrets.lookup("d")


def test_they_show_nowhere() -> None:
    secret = user_object("secret,id=s,data=hunter2")
    assert "hunter2" not in repr(secret) + str(secret) + repr(load("secret,id=sec0,data=hunter2"))


@pytest.mark.parametrize(
    "words",
    [["--object", "secret,id=s,data=hunter2"], ["--object=secret,id=s,data=hunter2"], ["--o", "secret,data=hunter2"],
     ["--obj=secret,data=hunter2"]],
)  # fmt: skip
def test_what_is_recorded_names_none(words: list[str]) -> None:
    assert recorded(["commit", *words, "-d", "a.qcow2"]) == ("commit", "-d", "a.qcow2")
