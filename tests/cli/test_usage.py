"""The words around a command: mistakes, abbreviations, version, help and trace options, as qemu-img takes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from twin import assert_same, qemu_img, safeimg

LINES = [
    [], ["foo"], ["--foo"], ["-q"], ["-T"], ["-T", "foo", "info", "small.qcow2"], ["--version=1"], ["info"],
    ["--tra", "enable=foo", "info", "small.qcow2"], ["-T", "nosuch*", "info", "small.qcow2"],
    ["info", "--", "small.qcow2"], ["info", "--outp", "json", "small.qcow2"], ["info", "--o", "json", "small.qcow2"],
    ["info", "-V"], ["create", "-V"], ["info", "--backing"], ["info", "small.qcow2", "x"],
    ["convert", "--im", "x", "y"], ["convert", "--target-i", "x", "y"], ["info", "--backing-chain=1", "small.qcow2"],
    ["check", "-r"],
    ["check", "-r", "foo", "small.qcow2"], ["info", "-U", "-U", "--force", "small.qcow2"],
    ["map", "-s", "x", "small.qcow2"],
    ["map", "--start-offset=1k", "--max", "4k", "small.qcow2"], ["compare", "small.qcow2"], ["commit"],
    ["create", "-f", "raw", "x", "1Q"], ["create", "-f", "raw", "x", "-1"], ["create", "-f", "raw", "x", "1", "2"],
    ["create", "-f", "qcow2", "-o", "help"], ["create", "-f", "raw", "-o", "?"], ["create", "-o", "help,size=1", "x"],
    ["convert", "-O", "raw", "-o", "?", "x"], ["create", "-f", "raw", "-o", "size=1k", "-o", "preallocation=off", "x"],
    ["create", "-f", "raw", "-o", "size=1k,", "-o", "nocow=off", "x"], ["create", "-f", "raw", "-o", "", "x", "1k"],
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_as_qemu_img(images: Path, line: list[str]) -> None:
    assert_same(line, images)


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["--ver"], ["-V", "--foo"], ["-Vh"], ["-T", "x*", "-V"]])
def test_version(images: Path, words: list[str]) -> None:
    """One line that says, as qemu-img's first does, which of its options there are."""
    done = safeimg(words, images, name="qemu-img")
    assert (done.code, done.stderr) == (0, b"")
    expression = rb"qemu-img version (\d+\.\d+)\.\d+[ ,]"
    match, other = re.match(expression, done.stdout), re.match(expression, qemu_img(words, images).stdout)
    assert match is not None and other is not None and match.group(1) == other.group(1)


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["-hV"], ["info", "-h"], ["convert", "x", "--help", "--foo"]])
def test_help(images: Path, words: list[str]) -> None:
    """What programs look for in it: that it succeeds, the commands with their options, the formats."""
    done, other = safeimg(words, images, name="qemu-img"), qemu_img(words, images)
    assert (done.code, done.stderr) == (other.code, other.stderr) == (0, b"")
    syntax = dict(re.findall(rb"^  ([a-z]+) (\[.*)$", done.stdout, re.MULTILINE))
    for name, line in re.findall(rb"^  ([a-z]+) (\[.*)$", other.stdout, re.MULTILINE):
        if name in syntax:
            longs = set(re.findall(rb"--[a-z-]+", line)) - {b"--output"}
            assert longs <= set(re.findall(rb"--[a-z-]+", syntax[name])), name
    formats = re.search(rb"^Supported formats: (.*)$", done.stdout, re.MULTILINE)
    known = re.search(rb"^Supported formats: (.*)$", other.stdout, re.MULTILINE)
    assert formats is not None and known is not None
    assert {b"raw", b"qcow2"} <= set(formats.group(1).split()) <= set(known.group(1).split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "32k"], b"--window requires -c"),
        (["-c", "--window", "8k"], b"Invalid window specified. Valid windows are 4k and 32k."),
        (["-c", "-o", "compression_type=zstd", "--window", "32k"], b"--window is for compression_type=zlib: zstd"),
    ],
)
def test_windows_of_deflate(images: Path, words: list[str], message: bytes) -> None:
    done = safeimg(["convert", "-O", "qcow2", *words, "small.qcow2", "new.qcow2"], images)
    assert done.code == 1 and done.stderr.startswith(b"safeimg: " + message)
    assert not (images / "new.qcow2").exists()


def test_trace_help(images: Path) -> None:
    assert safeimg(["--trace", "help"], images, name="qemu-img") == (0, b"", b"")
