"""The kept set and the two folders, made once for each module."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from differential.judge import Bench


@pytest.fixture(scope="session", autouse=True)
def qemu() -> None:
    """What both programs' outcomes are compared with has to be there."""
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img and qemu-io are not installed")


@pytest.fixture(scope="module")
def bench(qemu: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEIMG_STATE_DIR", str(folder / "state"))
        yield Bench(folder)
