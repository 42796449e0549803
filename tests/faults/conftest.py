"""A folder for the tests that run real processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.running import Folder


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Callable[..., Folder]]:
    """Makes folders, with what `Folder` takes; their processes end with the test."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    made: list[Folder] = []

    def make(path: Path = tmp_path, *words: str, **options: str) -> Folder:
        made.append(Folder(path, *words, **options))
        return made[-1]

    yield make
    for process in (process for folder in made for process in folder.processes):
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def folder(folders: Callable[..., Folder]) -> Folder:
    return folders()
