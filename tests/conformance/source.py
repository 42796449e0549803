"""QEMU's source package: fetched from Debian with a private configuration of apt, kept outside the repository, and
unpacked no further than the list of cases goes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ARCHIVE = "qemu_7.2+dfsg.orig.tar.xz"
SHA256 = "91aca71520040edc40b8d437aa3004dae614f58e286cf653ee8996c07af2962f"
SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
IOTESTS = ("tests", "qemu-iotests")

# What runs the cases, and what they include.
HARNESS = frozenset((
    "check", "findtests.py", "testenv.py", "testrunner.py", "iotests.py", "qcow2.py", "qcow2_format.py", "qed.py",
    "common.rc", "common.filter", "common.pattern", "common.nbd", "common.qemu", "common.tls",
))
SAMPLES = "sample_images"
NAMED = "tests"  # the folder of the cases that have a name instead of a number


class Unavailable(Exception):
    """The package is not to be had: no apt, no network, no such version."""


def cache_folder() -> Path:
    """Where the package and what is unpacked of it stay between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "safeimg-conformance"


def wanted(name: str, cases: frozenset[str]) -> bool:
    """Whether a member of the archive is part of the harness, or of a listed case: nothing else is unpacked."""
    top, *path = PurePosixPath(name).parts
    if tuple(path[:2]) != IOTESTS or ".." in path or top == "/":
        return False
    match path[2:]:
        case [file]:
            return file in HARNESS or file.partition(".")[0] in cases
        case [folder, file]:
            return folder == SAMPLES or (folder == NAMED and file.partition(".")[0] in cases)
    return False


def unpack(archive: Path, cases: frozenset[str], target: Path) -> None:
    """Puts the harness and the listed cases into `target`, a new folder; nothing half-done stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name, tarfile.open(archive) as members:
        fresh = Path(name)
        for member in members:
            if member.isfile() and wanted(member.name, cases):
                path = fresh.joinpath(*PurePosixPath(member.name).parts[3:])
                path.parent.mkdir(exist_ok=True)
                content = members.extractfile(member)
                assert content is not None  # it is a file
                path.write_bytes(content.read())
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
        fresh.chmod(0o755)
        if not target.exists():
            fresh.rename(target)
            fresh.mkdir()  # the context manager wants something to remove


def iotests(cases: frozenset[str], cache: Path | None = None, mirror: str = MIRROR) -> Path:
    """The folder with the harness and these cases, from the cache or fetched now.

    Raises `Unavailable`."""
    cache = cache or cache_folder()
    names = " ".join(sorted(cases | HARNESS))
    target = cache / f"iotests-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    if not target.exists():
        unpack(fetch(cache, mirror), cases, target)
    return target


def fetch(cache: Path, mirror: str = MIRROR) -> Path:
    """The package's archive, downloaded unless the cache has it. Raises `Unavailable`."""
    archive = cache / ARCHIVE
    if archive.exists() and _digest(archive) == SHA256:
        return archive
    if shutil.which("apt-get") is None:
        raise Unavailable("fetching QEMU's source package takes apt-get")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="apt-") as name:
        folder = Path(name)
        options = _private_apt(folder, mirror)
        _apt([*options, "update"], folder)
        _apt([*options, "source", "--download-only", "--tar-only", "qemu"], folder)
        downloaded = folder / ARCHIVE
        if not downloaded.exists() or _digest(downloaded) != SHA256:
            raise Unavailable(f"{mirror} has another version of qemu in {SUITE} than {ARCHIVE}")
        downloaded.replace(archive)
    return archive


def _private_apt(folder: Path, mirror: str) -> list[str]:
    """apt's options for lists of packages of its own: the system's are neither read nor changed."""
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    (folder / "sources.list").write_text(f"deb-src {signed}{mirror} {SUITE} main\n")
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State": folder,
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",  # the folder belongs to the caller, whoever that is
        "Acquire::Retries": 2,
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _apt(words: Iterable[str], folder: Path) -> None:
    done = subprocess.run(["apt-get", "-q", *words], cwd=folder, capture_output=True, text=True, errors="replace")
    failed = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W: Failed"))]
    if done.returncode or failed:
        raise Unavailable("apt-get: " + "; ".join(failed or [f"exit code {done.returncode}"]))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
