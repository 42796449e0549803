"""How exports are named, and what they are called: the same as with qemu-img, on real servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from twin import assert_same

NAMES = (
    "nbd:unix:s", "nbd:unix:s:exportname=", "nbd:unix:s:exportname=foo", "nbd+unix:///?socket=s",
    "nbd+unix:///foo?socket=s", "nbd+unix://?socket=s", "nbd+unix:///", "nbd+unix:///foo", "nbd+unix:///foo?sockt=s",
    "nbd+unix:///foo?socket=s&x=y", "nbd+unix://host/foo?socket=s", "nbd+unix://host:12/foo?socket=s",
    "nbd+unix:///foo?socket=", "nbd+unix:///ex?socket=x", "nbd+unix:///ex?socket=%78", "nbd+unix:///ex/?socket=x",
    "nbd+unix:///ex?socket=x;a=b", "nbd+unix:///ex?socket=x&socket=x", f"nbd+unix:///ex?socket={'a' * 120}",
    "nbd://", "nbd:///foo", "nbd://[::1]:1/foo", "nbd://u@127.0.0.1:1/foo", "nbd://127.0.0.1:1/foo?socket=s",
    "nbd://127.0.0.1:x/foo", "nbd://127.0.0.1:99999/foo", "nbd+tcp://127.0.0.1:1/foo", "nbd+vsock://1:2/foo",
    "nbd+foo://1:2/foo", "nbd://localhost:/ex", "nbd://::1/ex", "NBD://localhost:1/ex", "nbd://localhost:1/é",
    'nbd://localhost:1/e"x', "nbd://localhost:1/%zz", "nbd:localhost:1", "nbd:localhost", "nbd:localhost:", "nbd:",
    "nbd", "nbd:localhost:1:exportname=foo", "nbd:localhost:1:exportnam=foo", "nbd:localhost:x", "nbd:unix:",
    "nbd:unix", "nbd:unix:nothing", "nbd:unix:s:foo", "nbd:[::1]:1", "nbd:exportname=foo", "nbd:/x",
    "nbd:unix:/x?socket=://x", "nbd:localhost:1:exportname=a://b", "nbd:localhost:1,to=x", "nbd:[::1:10999",
    "nbd:[::1]", "nbd::x", "nbd::", "nbd:::", "nbd:a:b:c", "blkdebug::nbd:unix:s",
)  # fmt: skip
OPTIONS = (
    "", '"path": "s"', '"path": "x", "export": "ex"', '"path": "s", "host": "x"', '"path": "s", "port": "1"',
    '"path": "s", "server.type": "unix"', '"port": "1"', '"host": "localhost", "port": 1', '"host": -1',
    '"server": {"type": "unix", "path": "s"}', '"server": {"type": "unix"}', '"server": {"path": "s"}',
    '"server": {"type": "odd", "path": "s"}', '"server": {"type": "inet", "path": "s"}',
    '"server": {"type": "inet", "host": "localhost"}', '"server": {"type": "inet", "host": "localhost", "port": 1}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "odd": "x"}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "ipv4": "x"}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "ipv4": false, "ipv6": false}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "to": 3, "keep-alive": true, "numeric": false}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "to": "x"}',
    '"server": {"type": "inet", "host": "localhost", "port": "1", "to": 70000}',
    '"server": {"type": "fd", "str": "x"}', '"server": {"type": "fd", "str": "0"}',
    '"server": {"type": "unix", "path": "s", "odd": "x"}', '"server": {"type": "unix", "path": "s", "tight": true}',
    '"server": {"type": "unix", "path": "s", "abstract": true}', '"server": "s"', '"path": "s", "odd": "x"',
    '"path": "s", "tls-creds": "x"', '"path": "s", "tls-hostname": "x"', '"path": "s", "reconnect-delay": "x"',
    '"path": "s", "reconnect-delay": 1, "open-timeout": 1', '"path": "s", "open-timeout": "x"',
    '"path": "s", "x-dirty-bitmap": "qemu:dirty-bitmap:b0"', '"path": "s", "x-dirty-bitmap": ""',
    '"path": "s", "x-dirty-bitmap": "base:allocation"', '"path": "nothing"', '"path": "nothing", "odd": "x"',
    '"path": 42', '"path": true', '"path": null', '"path": ""', '"host": "", "export": "x"',
    '"host": "localhost", "port": 1.5', '"host": "localhost", "port": true', '"path": "s", "export": 7',
    '"filename": "nbd:unix:s"', '"filename": "nbd:unix:s", "path": "s"', '"path": "s", "read-only": true',
)  # fmt: skip
NAMED = (
    ["--output=json", "nbd:unix:s"], ["-f", "qcow2", "nbd:unix:s"], ["-f", "raw", "nbd:unix:s"],
    ["-f", "nbd", "nbd:unix:s"], ["-f", "nbd", "s"], ["-f", "nbd", "null-co://"], ["-f", "null-co", "null-co://"],
    ["-f", "null-co", "nbd:unix:s"], ["-f", "file", "nbd:unix:s"], ["-f", "file", "file:a.qcow2"], ["-U", "nbd:unix:s"],
    ["--output=json", 'json:{"driver": "nbd", "path": "s"}'],
    ["--output=json", 'json:{"driver": "raw", "file": {"driver": "nbd", "path": "s"}}'],
    ['json:{"driver": "qcow2", "file": {"driver": "nbd", "path": "s"}}'],
    ['json:{"driver": "raw", "offset": 512, "file": {"driver": "nbd", "path": "x", "export": "ex", '
     '"tls-hostname": "q"}}'],
    ['json:{"driver": "raw", "offset": 512, "file": {"driver": "nbd", "server": {"type": "unix", "path": "x", '
     '"tight": true, "abstract": false}, "export": "ex", "tls-hostname": "q"}}'],
    ['json:{"driver": "blkdebug", "image": {"driver": "nbd", "path": "s"}}'],
    ['json:{"driver": "quorum", "vote-threshold": 1, "children": [{"driver": "nbd", "path": "s"}]}'],
    ["--image-opts", "driver=nbd,server.type=unix,server.path=s"], ["--image-opts", "file.driver=nbd,file.path=s"],
    ["--image-opts", "file.filename=nbd:unix:s"], ["--image-opts", "driver=raw,file.driver=nbd,file.path=s,file.x=y"],
)  # fmt: skip
WITH_PORT = (
    "nbd://localhost:{}/ex", "nbd://127.0.0.1:{}/ex/a", "nbd://localhost:{}//ex", "nbd://localhost:{}/%65x",
    "nbd://localhost:{}", "nbd://localhost:{}/e%20x", "nbd://localhost:{}/ex?", "nbd://localhost:{}/ex#x",
    "nbd://lo%63alhost:{}/ex", "nbd:localhost:{}:exportname=ex", "nbd:[127.0.0.1]:{}:exportname=ex",
    "nbd:127.0.0.1:{},ipv6:exportname=ex", "nbd:localhost:{}:exportname=ex,a=b",
    'json:{{"driver": "nbd", "host": "localhost", "port": {}, "export": "ex"}}',
    'json:{{"driver": "nbd", "export": "ex", "server": {{"type": "inet", "host": "127.0.0.1", "port": "{}", '
    '"ipv4": false}}}}',
    'json:{{"driver": "raw", "offset": 512, "file": {{"driver": "nbd", "server": {{"type": "inet", '
    '"host": "localhost", "port": "{}", '
    '"ipv6": true, "ipv4": true, "to": 12000, "numeric": false, "keep-alive": true, "mptcp": false}}, '
    '"export": "ex", "tls-hostname": "abc", "reconnect-delay": 3}}}}',
    'json:{{"driver": "raw", "offset": 512, "file": {{"driver": "nbd", "host": "localhost", "port": {}, '
    '"export": "ex"}}}}',
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names(exported: Path, name: str) -> None:
    assert_same(["info", name], exported)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(exported: Path, options: str) -> None:
    assert_same(["info", f'json:{{"driver": "nbd"{options and ", "}{options}}}'], exported)


@pytest.mark.parametrize("words", NAMED, ids=" ".join)
def test_other_forms(exported: Path, words: list[str]) -> None:
    assert_same(["info", *words], exported)


@pytest.mark.parametrize("name", WITH_PORT)
def test_names_with_a_port(exported: Path, port: int, name: str) -> None:
    assert_same(["info", name.format(port)], exported)


@pytest.mark.parametrize("what, length", [("export", 5000), ("x-dirty-bitmap", 5000)])
def test_names_too_long(exported: Path, what: str, length: int) -> None:
    assert_same(["info", f'json:{{"driver": "nbd", "path": "s", "{what}": "{"x" * length}"}}'], exported)
