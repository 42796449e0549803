"""Virtual machines: QEMU with a boot sector that writes to its second disk through the BIOS, and ends or stays."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

PROGRAM = "qemu-system-x86_64"
PATTERN = ord("G")
LENGTH = 4096  # bytes that a guest writes
_PACKET = 0x7D00  # where the sector has the disk address packet for the BIOS
_BUFFER = 0x7E00  # behind the sector


def boot_sector(offset: int, *, stays: bool) -> bytes:
    """Fills a buffer with the pattern, writes it to `offset` of the second disk (INT 13h, AH = 43h), prints W or F on
    QEMU's debug port, and resets the machine, or halts."""
    done = b"\xf4\xeb\xfd" if stays else b"\xb0\xfe\xe6\x64\xf4"  # hlt, again; or out 64h, 0feh (reset); hlt
    code = (
        b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0\xbc\x00\x7c\xfb\xfc"  # cli; segments and stack; sti; cld
        + b"\xbf" + struct.pack("<H", _BUFFER)  # mov di, buffer
        + b"\xb9" + struct.pack("<H", LENGTH)  # mov cx, length
        + b"\xb0" + bytes([PATTERN]) + b"\xf3\xaa"  # mov al, pattern; rep stosb
        + b"\xbe" + struct.pack("<H", _PACKET)  # mov si, packet
        + b"\xb8\x00\x43\xb2\x81\xcd\x13"  # mov ax, 4300h; mov dl, 81h; int 13h
        + b"\xb0W\x73\x02\xb0F\xe6\xe9"  # mov al, 'W'; jnc +2; mov al, 'F'; out 0xe9, al
        + done
    )  # fmt: skip
    packet = struct.pack("<BBHHHQ", 16, 0, LENGTH // 512, _BUFFER, 0, offset // 512)
    return code.ljust(_PACKET - 0x7C00, b"\0") + packet.ljust(510 - 0x100, b"\0") + b"\x55\xaa"


def start(image: Path, offset: int = 0, *, stays: bool = False) -> subprocess.Popen[bytes]:
    """A machine that has the image as its second disk and writes there. Skips the test where there is no QEMU."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"{PROGRAM} is not installed")
    boot = image.parent / "boot"
    boot.write_bytes(boot_sector(offset, stays=stays).ljust(1 << 20, b"\0"))
    drives = [
        f"file={boot},format=raw,if=ide,index=0,file.locking=off",
        f"file={image},format={image.suffix[1:]},if=ide,index=1",
    ]
    return subprocess.Popen(
        [
            PROGRAM, "-machine", "pc,accel=tcg", "-m", "16", "-display", "none", "-nodefaults", "-no-reboot",
            "-debugcon", "stdio",
            *(word for drive in drives for word in ("-drive", drive)),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(image: Path, offset: int = 0) -> None:
    """A guest that writes its pattern and ends."""
    process = start(image, offset)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, b"W", b""), err


def refused(image: Path) -> str:
    """What QEMU says of an image that it does not start a machine with."""
    process = start(image)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, b""), err
    return err.decode()
