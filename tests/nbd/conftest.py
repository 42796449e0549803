"""An image that qemu-nbd exports on unix sockets and on a TCP port of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nbd_servers import free_port, qemu_nbd
from twin import qemu_img, qemu_io


@pytest.fixture(scope="package")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a qcow2 image, exported read-only at the unix socket `s`, and as `ex` at `x`."""
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-utils are not installed")
    folder = tmp_path_factory.mktemp("exported")
    qemu_img(["create", "-q", "-f", "qcow2", "a.qcow2", "4M"], folder)
    qemu_io(folder, "-c", "write -P 3 1M 64k", "-c", "write -z 2M 128k", "a.qcow2")
    with (
        qemu_nbd(folder, "-r", "-f", "raw", "a.qcow2"),
        qemu_nbd(folder, "-r", "-f", "raw", "-x", "ex", "a.qcow2", socket_name="x"),
    ):
        yield folder


@pytest.fixture(scope="package")
def port(exported: Path) -> Iterator[int]:
    """A TCP port of this machine where the same image is exported as `ex`."""
    found = free_port()
    with qemu_nbd(exported, "-r", "-f", "raw", "-x", "ex", "-b", "127.0.0.1", "-p", str(found), "a.qcow2"):
        yield found
