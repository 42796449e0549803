"""LUKS images, made by qemu-img or by safeimg, and small changes of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from safeimg.drivers.formats.api import Opening
from safeimg.drivers.formats.luks.driver import driver
from safeimg.drivers.formats.luks.image import LuksImage
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.file import LocalFileSystem
from twin import qemu_img

FS = LocalFileSystem()
KIB = 1024
SECRETS = Secrets()
SECRETS.add("s", b"hunter2")
SECRETS.add("n", b"another")
SECRETS.add("w", b"wrong")
WORDS = [word for name, data in (("s", "hunter2"), ("n", "another"), ("w", "wrong"))
         for word in ("--object", f"secret,id={name},data={data}")]  # fmt: skip
QUICK = {"key-secret": "s", "iter-time": "10"}


def opts(path: Path | str, secret: str = "s") -> str:
    return f"driver=luks,key-secret={secret},file.filename={path}"


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def listed(options: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def made_by_qemu(path: Path, size: int, **options: str) -> Path:
    given = QUICK | {name.replace("_", "-"): value for name, value in options.items()}
    done = qemu_img(["create", "-q", *WORDS, "-f", "luks", "-o", listed(given), str(path), str(size)], path.parent)
    assert done.code == 0, done.stderr
    return path


def made(path: Path, size: int, *, unfinished: str | None = None, **options: str) -> Path:
    given = QUICK | {name.replace("_", "-"): value for name, value in options.items()}
    driver.create(FS, str(path), size, given, secrets=SECRETS, unfinished=unfinished)
    return path


def opened(path: Path, *, write: bool = False, repair: bool = False, secret: str = "s") -> LuksImage:
    file = FS.open(str(path), write=write)
    given = Opening({"key-secret": secret}, SECRETS, open_file=lambda _: file)
    return driver.open(file, write=write, repair=repair, given=given)  # type: ignore[return-value]
