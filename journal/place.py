"""Where an image's log goes: beside the image, else in the state directory, or where the user says."""

from __future__ import annotations

import errno
import os
import stat

from safeimg.journal.errors import JournalUnavailable, LogBusy
from safeimg.journal.files import FileStat, FileSystem, system_error
from safeimg.journal.log import Log

SUFFIX = ".safeimg"

# Where a file cannot be created for these reasons, another place may do.
ELSEWHERE = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENAMETOOLONG,
        errno.EOPNOTSUPP,
        errno.ENOTDIR,
        errno.ENOENT,
        errno.EINVAL,
    }
)


def state_directory() -> str | None:
    """Where safeimg keeps what does not lie beside an image; None if there is no such place (no HOME, no
    account).

    `SAFEIMG_STATE_DIR`, else `/var/lib/safeimg` for root, else `$XDG_STATE_HOME/safeimg` or
    `~/.local/state/safeimg`. It may not exist yet: see `make_state_directory`.
    """
    chosen = os.environ.get("SAFEIMG_STATE_DIR")
    if chosen:
        return absolute(chosen)
    if os.geteuid() == 0:
        return "/var/lib/safeimg"
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification has relative ones ignored
        home = os.environ.get("HOME") or _account_home()
        if not home:
            return None
        base = os.path.join(home, ".local", "state")
    return os.path.join(base, "safeimg")


def absolute(path: str) -> str:
    """The path from the root; the current folder is asked for only where it counts, since it may be gone."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def make_state_directory() -> str:
    """The state directory, made if needed with mode 0700. Raises `JournalUnavailable`, with advice."""
    path = state_directory()
    advice = "set SAFEIMG_STATE_DIR to a folder that only you can write to"
    if path is None:
        raise JournalUnavailable(f"no state directory: there is no HOME; {advice}")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise JournalUnavailable(f"{path}: {error.strerror}; {advice}") from None
    if found.st_uid not in (os.geteuid(), 0) or stat.S_IMODE(found.st_mode) & 0o022:
        raise JournalUnavailable(f"{path}: others can write to the state directory; {advice}")
    return path


def state_files(files: FileSystem) -> list[str]:
    """The paths of the files in the state directory; none if it is not there."""
    directory = state_directory()
    if directory is None or files.stat(directory) is None:
        return []
    return [os.path.join(directory, name) for name in files.list_directory(directory)]


def beside(files: FileSystem, image: str) -> str:
    """The path of the log beside `image`, links resolved: every name of a file leads to one log."""
    return files.resolve(image) + SUFFIX


def in_state_directory(files: FileSystem, image: str, found: FileStat) -> str | None:
    """The path of the log of `image` in the state directory, or None if there is none.

    A block device is keyed by its resolved path (the inode of its node changes with each boot)."""
    directory = state_directory()
    if directory is None:
        return None
    if found.is_device:
        name = "device-" + files.resolve(image).strip("/").replace("/", "-")
    else:
        name = f"{found.device:x}-{found.inode:x}"
    return os.path.join(directory, name + SUFFIX)


def candidates(files: FileSystem, image: str, *, explicit: str | None = None) -> list[str]:
    """Every path at which the log or pointer of `image` may be, the preferred one first.

    `explicit` (`--journal PATH`) comes first; the others are still looked at for something pending. A device
    node's folder is lost with the next boot: no log goes there."""
    found = files.stat(image)
    places = [] if explicit is None else [explicit]
    if found is None or not found.is_device:
        places.append(beside(files, image))
    if found is not None:
        kept = in_state_directory(files, image, found)
        if kept is not None:
            places.append(kept)
    return places


def ensure_folder(path: str) -> None:
    """Makes the state directory if `path` is to lie there. Raises `JournalUnavailable`."""
    directory = state_directory()
    if directory is not None and os.path.dirname(path) == os.path.dirname(os.path.join(directory, SUFFIX)):
        make_state_directory()  # whose name may end with a slash


def create_log(files: FileSystem, image: str, operation: str, *, explicit: str | None = None) -> Log:
    """A new log for `image` at the first place where one can be created; with `explicit`, there or nowhere.

    Raises `JournalUnavailable` with advice, or `LogBusy` if a log or pointer stands at that place.
    """
    like = files.stat(image)
    if like is None:
        raise JournalUnavailable(f"{image}: no such image")
    places = candidates(files, image, explicit=explicit)
    refused = []
    for path in places[:1] if explicit is not None else places:
        try:
            ensure_folder(path)
            return Log.create(files, path, operation, like)
        except JournalUnavailable as error:
            refused.append(str(error))
        except Exception as error:
            number = system_error(error)
            if number == errno.EEXIST and path == explicit:
                raise JournalUnavailable(
                    f"{path}: there is a journal already; settle what it is of, or name another file"
                ) from None
            if number == errno.EEXIST:
                raise LogBusy(path) from None
            if number not in ELSEWHERE:
                raise
            refused.append(f"{path}: {os.strerror(number)}")
    raise JournalUnavailable(
        f"{image}: no place for a journal ({'; '.join(refused) or 'no state directory'}); "
        "name one with --journal PATH, or go on without any with --no-journal"
    )


def _account_home() -> str | None:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir or None
    except KeyError:
        return None
