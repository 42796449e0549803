"""The errors of images and their storage: each message is one line that names the file and what was expected."""

from __future__ import annotations

from errno import EIO


class DriverError(Exception):
    """Base of everything that `safeimg.drivers` raises on purpose. `str()` is the whole message."""


class StorageError(DriverError):
    """A system call on a file failed. `errno` holds the operating system's number, `guest` the guest offset where
    reading failed, as far as that is known."""

    guest: int | None = None

    def __init__(self, path: str, action: str, error: OSError) -> None:
        self.path = path
        self.action = action
        self.errno = error.errno or 0
        self.strerror = error.strerror or str(error)
        super().__init__(f"{path}: {action}: {self.strerror}")

    def shift(self, by: int) -> None:
        """`guest` as it is seen from a disk in which this one begins at `by`."""
        if self.guest is not None:
            self.guest += by


class SyncFailed(StorageError):
    """A sync did not succeed: what was written since the last one may be lost although it reads back well."""


class LockError(DriverError):
    """Somebody else uses the image (QEMU's image locks). The message is QEMU's own."""


class NoLocks(DriverError):
    """The file system has no byte-range locks: `file.locking=off` does without. The message is QEMU's own."""


class FormatError(DriverError):
    """The bytes of an image are not what its format's specification allows. `errno`: what QEMU's message names."""

    def __init__(self, path: str, problem: str, *, offset: int | None = None, errno: int = EIO) -> None:
        self.path = path
        self.problem = problem
        self.offset = offset
        self.errno = errno
        where = "" if offset is None else f" at offset {offset:#x}"
        super().__init__(f"{path}: {problem}{where}")


class SnapshotDamaged(FormatError):
    """An internal snapshot cannot be used; the `problem` is in QEMU's words."""


class UnsupportedError(DriverError):
    """The image is valid but uses something that safeimg does not handle."""


class RemoteError(DriverError):
    """A server that holds an image cannot be reached, or does not give it. The message is QEMU's where it has one."""


class NotClosed(UnsupportedError):
    """The image is marked as dirty: it has to be repaired before it can be written to."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(
            "qcow2: Image was not closed properly (dirty bit): its refcounts have to be repaired first, with qemu-img "
            "check -r all"
        )


class SecretMissing(DriverError):
    """Guest data is encrypted, and nobody gave what it takes to read or write it. The message is QEMU's.

    `option`: the one that names the secret."""

    def __init__(self, option: str) -> None:
        self.option = option
        super().__init__(f"Parameter '{option}' is required for cipher")


class RefusedError(UnsupportedError):
    """An image does not allow a change. QEMU's message names `errno` if there is one, and tells the `problem` in a
    line of its own if `explain` is set; else it names the problem."""

    def __init__(self, path: str, problem: str, *, errno: int | None = None, explain: bool = False) -> None:
        self.problem = problem
        self.errno = errno
        self.explain = explain
        super().__init__(f"{path}: {problem}")


class UsageError(DriverError):
    """An option or argument that makes no sense, in qemu-img's words: of `messages`, each is a line of its own."""

    def __init__(self, *messages: str) -> None:
        self.messages = messages
        super().__init__("; ".join(messages))


class FormatNotSaid(UsageError):
    """A backing image without its format; qemu-img leaves the line open behind what it found."""


class CheckFailed(DriverError):
    """A check has no result, for `reason`, in the system's words. `messages`: lines of the report until then;
    `problem`: what is wrong with the image, in QEMU's words, if it said so."""

    def __init__(self, reason: str, *, messages: tuple[str, ...] = (), problem: str | None = None) -> None:
        self.reason = reason
        self.messages = messages
        self.problem = problem
        super().__init__(f"{problem}: Check failed: {reason}" if problem else f"Check failed: {reason}")
