"""Running safeimg and qemu-img side by side."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from safeimg.cli.main import guarded

UNTIMED = b"Unable to get accurate CPU usage"  # qemu-img of a key's derivation: every other time on a fast machine
TRIES = 40


class Outcome(NamedTuple):
    code: int
    stdout: bytes
    stderr: bytes


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def safeimg(arguments: list[str], folder: Path, *, name: str = "safeimg") -> Outcome:
    """Runs the command line in this process."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape", write_through=True)
    words = [name, *arguments]
    with (
        inside(folder),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
    ):
        code = guarded(words)
    return Outcome(code, out.buffer.getvalue(), err.buffer.getvalue())  # type: ignore[attr-defined]


def qemu_img(arguments: list[str], folder: Path, *, tries: int = TRIES) -> Outcome:
    for _ in range(tries):
        done = subprocess.run(["qemu-img", *arguments], cwd=folder, capture_output=True, timeout=60)
        if UNTIMED not in done.stderr:
            break
    return Outcome(done.returncode, done.stdout, done.stderr)


def qemu_io(folder: Path, *arguments: str) -> None:
    subprocess.run(["qemu-io", *arguments], cwd=folder, check=True, capture_output=True)


def words(line: str) -> list[str]:
    return shlex.split(line)


def assert_same(arguments: list[str], folder: Path) -> Outcome:
    """The outcome, which is the same for both programs when safeimg is called as qemu-img."""
    expected = qemu_img(arguments, folder)
    assert safeimg(arguments, folder, name="qemu-img") == expected
    return expected
