"""A folder for the tests that run real processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.running import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    made = Folder(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
            process.communicate()
