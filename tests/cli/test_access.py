"""Images in folders that the user may not look into: qemu-img's words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Root may look anywhere: it runs without the privilege, and the folder is somebody else's.
_UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
_SAFEIMG = "import sys; sys.argv[0] = 'qemu-img'; from safeimg.cli.main import guarded; sys.exit(guarded(sys.argv))"

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None or (bool(_UNPRIVILEGED) and shutil.which("setpriv") is None),
    reason="qemu-img or setpriv are not installed",
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "here", "1M"], cwd=tmp_path, check=True)
    closed = tmp_path / "closed"
    closed.mkdir()
    shutil.copy(tmp_path / "here", closed / "disk")
    closed.chmod(0)
    if _UNPRIVILEGED:
        os.chown(closed, 1234, 1234)
    yield tmp_path
    closed.chmod(0o700)


@pytest.mark.parametrize(
    "line",
    [
        "info closed/disk", "check -r all closed/disk", "snapshot -c x closed/disk", "resize closed/disk 2M",
        "amend -o compat=0.10 closed/disk", "commit closed/disk", "convert here closed/new",
        "convert -n here closed/disk", "create -f qcow2 closed/new 1M", "create -f raw closed/disk 1M",
    ],
)  # fmt: skip
def test_out_of_reach(folder: Path, line: str) -> None:
    answers = [
        subprocess.run([*_UNPRIVILEGED, *program, *line.split()], cwd=folder, capture_output=True)
        for program in (["qemu-img"], [sys.executable, "-c", _SAFEIMG])
    ]
    told = [(answer.returncode, answer.stdout, answer.stderr) for answer in answers]
    assert told[0] == told[1]
    assert b"Permission denied" in told[0][2]
