"""Images read over ssh: the same names, output and messages as qemu-img's, on a server made for the test."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from twin import assert_same, qemu_img, qemu_io, safeimg

paramiko = pytest.importorskip("paramiko")

from ssh_server import KEY, Rules, serving  # noqa: E402

HASH = {kind: hashlib.new(kind, KEY.asbytes()).hexdigest() for kind in ("md5", "sha1", "sha256")}
COLONS = ":".join(HASH["md5"][at : at + 2] for at in range(0, 32, 2)).upper()
WITHOUT_SERVER = (
    "", '"host": "localhost", "port": "0", "path": "/foo"', '"host": "localhost", "port": 0.42, "path": "/foo"',
    '"host": "localhost", "port": "0.42", "path": "/foo"', '"host": "localhost", "port": "-1", "path": "/foo"',
    '"host": "localhost", "port": 1', '"path": "/foo"', '"port": "1", "path": "/foo"',
    '"host": -1, "port": "1", "path": "/foo"', '"server.host": "localhost", "server.port": "1", "path": "/foo"',
    '"server.host": "localhost", "path": "/foo"', '"server.port": "1", "path": "/foo"',
    '"server.host": "localhost", "server.port": "x", "path": "/foo"',
    '"server.host": "localhost", "server.port": "1", "server.odd": "1", "path": "/foo"',
    '"server.host": "localhost", "server.port": "1", "server.type": "inet", "path": "/foo"',
    '"host": "localhost", "port": 1, "path": "/foo", "odd": 1',
    '"host": "localhost", "port": 1, "path": "/foo", "host_key_check": "odd"',
    '"host": "localhost", "port": 1, "path": "/foo", "host-key-check.mode": "odd"',
    '"host": "localhost", "port": 1, "path": "/foo", "host-key-check.mode": "hash"',
    '"host": "localhost", "port": 1, "path": "/foo", "host-key-check.mode": "none", "host-key-check.odd": "none"',
    '"host": "localhost", "port": 1, "path": "/foo", "host-key-check.mode": "hash", "host-key-check.type": "odd", '
    '"host-key-check.hash": "00"',
)  # fmt: skip
URIS = (
    "ssh://localhost:1/foo", "ssh://localhost:1", "ssh:///foo", "ssh://", "ssh:foo", "ssh:", "ssh://u@localhost:1/foo",
    "ssh://u:p@localhost:1/foo", "ssh://localhost:1/foo?host_key_check=odd", "ssh://localhost:1/foo?a=b",
    "ssh://localhost:x/foo", "ssh://[::1]:1/foo", "ssh://localhost:1/foo#x",
)  # fmt: skip
FILE = '"driver": "ssh", "host": "127.0.0.1", "port": %d, "path": "/a.qcow2"'
LINES = (
    ["info", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=no"],
    ["info", "--output=json", "-f", "raw", "ssh://127.0.0.1:%d/a.qcow2?host_key_check=no"],
    ["info", f"ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=md5:{HASH['md5']}"],
    ["info", f"ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=md5:{COLONS}"],
    ["info", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=md5:00"],
    ["info", f"ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=sha1:{HASH['sha1']}"],
    ["info", f"ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=sha256:{HASH['sha256']}"],
    ["info", "ssh://root@127.0.0.1:%d/nothing?host_key_check=no"],
    ["info", "ssh://root@127.0.0.1:%d/?host_key_check=no"],
    ["info", "ssh://root@localhost:%d/%%61.qcow2?host_key_check=no"],
    ["info", f'json:{{{FILE}, "host_key_check": "no"}}'],
    ["info", f'json:{{{FILE}, "user": "root", "host-key-check.mode": "none"}}'],
    ["info", f'json:{{{FILE}, "host-key-check": {{"mode": "hash", "type": "md5", "hash": "00"}}}}'],
    ["info", f'json:{{"driver": "raw", "offset": 512, "file": {{{FILE}, "user": "root", "host_key_check": "no"}}}}'],
    ["info", 'json:{"driver": "raw", "offset": 512, "file": {"driver": "ssh", "server": {"host": "127.0.0.1", "port": '
     '"%d", "ipv4": true}, "path": "/a.qcow2", "user": "root", "host-key-check": {"mode": "none"}}}'],
    ["map", "--output=json", "-f", "raw", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=no"],
    ["map", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=no"],
    ["compare", "a.qcow2", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=no"],
    ["convert", "-O", "raw", "ssh://root@127.0.0.1:%d/a.qcow2?host_key_check=no", "out.raw"],
)  # fmt: skip


def _has_ssh() -> bool:
    if shutil.which("qemu-img") is None:
        return False
    asked = subprocess.run(["qemu-img", "info", 'json:{"driver": "ssh"}'], capture_output=True, text=True, check=False)
    return "Unknown driver" not in asked.stderr  # its help names it without its module, too


needs_qemu = pytest.mark.skipif(not _has_ssh(), reason="no qemu-img with ssh (Debian: qemu-block-extra)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ssh")
    if shutil.which("qemu-img") is None:
        (folder / "a.qcow2").write_bytes(bytes(range(256)) * 1000)
    else:
        qemu_img(["create", "-q", "-f", "qcow2", "a.qcow2", "4M"], folder)
        qemu_io(folder, "-c", "write -P 3 1M 64k", "a.qcow2")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with serving(folder, Rules(anybody=True)) as port:
        yield port


@needs_qemu
@pytest.mark.parametrize("options", WITHOUT_SERVER)
def test_options(tmp_path: Path, options: str) -> None:
    assert_same(["info", f'json:{{"driver": "ssh"{options and ", "}{options}}}'], tmp_path)


@needs_qemu
@pytest.mark.parametrize("uri", URIS)
def test_uris(tmp_path: Path, uri: str) -> None:
    assert_same(["info", uri], tmp_path)


@needs_qemu
@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_the_same_as_qemu_img(folder: Path, port: int, line: list[str]) -> None:
    assert_same([*line[:-2], *(word % port if "%d" in word else word for word in line[-2:])], folder)


@needs_qemu
def test_failures(folder: Path) -> None:
    for rules in (Rules(), Rules(anybody=True, broken=True)):
        with serving(folder, rules) as port:
            name = f"ssh://root@127.0.0.1:{port}/a.qcow2?host_key_check=no"
            assert_same(["info", name], folder)
            assert_same(["convert", "-f", "raw", "-O", "raw", name, "out.raw"], folder)


def test_keys(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is let in by the key in the home folder, and the server is known by its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh").mkdir()
    mine = paramiko.ECDSAKey.generate()
    mine.write_private_key_file(str(tmp_path / ".ssh" / "id_ecdsa"))
    with serving(folder, Rules(key=mine)) as port:
        line = ["convert", "-f", "raw", "-O", "raw", f"ssh://127.0.0.1:{port}/a.qcow2", "out.raw"]
        unknown = safeimg(line, folder)
        assert unknown.code == 1 and unknown.stderr.endswith(b": no host key was found in known_hosts\n")
        known = paramiko.HostKeys()
        known.add(f"[127.0.0.1]:{port}", KEY.get_name(), KEY)
        known.save(str(tmp_path / ".ssh" / "known_hosts"))
        assert safeimg(line, folder) == (0, b"", b"")
        assert (folder / "out.raw").read_bytes() == (folder / "a.qcow2").read_bytes()
        another = paramiko.HostKeys()
        another.add(f"[127.0.0.1]:{port}", mine.get_name(), mine)
        another.save(str(tmp_path / ".ssh" / "known_hosts"))
        changed = safeimg(line, folder)
        assert changed.code == 1 and changed.stderr.endswith(b": host key does not match the one in known_hosts\n")


def test_only_reading(folder: Path, port: int) -> None:
    before = (folder / "a.qcow2").read_bytes()
    done = safeimg(["resize", "-f", "raw", f"ssh://127.0.0.1:{port}/a.qcow2?host_key_check=no", "+1M"], folder)
    assert done.code == 1 and done.stderr.endswith(b": Writing over ssh is not supported yet\n")
    assert (folder / "a.qcow2").read_bytes() == before


def test_without_paramiko(folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    done = safeimg(["info", f"ssh://127.0.0.1:{port}/a.qcow2"], folder)
    assert done.stderr.endswith(b": ssh needs the Python package paramiko, which is not installed\n")


def test_no_ssh_at_all(folder: Path, tmp_path: Path) -> None:
    import socket
    import threading

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            client, _ = listening.accept()
            client.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n" * 100)
            client.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        done = safeimg(["info", f"ssh://127.0.0.1:{listening.getsockname()[1]}/a?host_key_check=no"], folder)
        thread.join(10)
    assert done.code == 1 and b"failed to establish ssh session" in done.stderr
