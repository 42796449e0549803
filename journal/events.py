"""The events of an operation: immutable records; an operation's state is a fold over them (`state.py`).

Images are named by index: 0 is the home image, 1… are the participants in the order of `Declared.images`.
Offsets and lengths are bytes, in the image's file unless called guest offsets. Times are seconds since the epoch.
"""

from __future__ import annotations

from typing import Any

from safeimg.drivers.records import NamedTuple


class Identity(NamedTuple):
    """Which file an image is, and how it looked when it was recorded."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    tag: str | None = None  # the id in the image's extended attribute, where there could be one


class Owner(NamedTuple):
    """The process that runs an operation. A pid means nothing without the boot it belongs to."""

    machine: str
    boot: str
    pid: int
    started: int  # clock ticks after boot: field 22 of /proc/PID/stat
    uid: int
    host: str


class ImageRecord(NamedTuple):
    """An image that an operation touches."""

    role: str  # "base", "overlay", "source", "target", …
    path: str  # relative to the home image's folder where possible; for messages and for `--adopt`
    format: str
    identity: Identity
    writes: bool  # False: the operation only reads it


class PatchRecord(NamedTuple):
    """Metadata bytes changed by a step. `before` is None for space that nobody referenced."""

    image: int
    offset: int
    before: bytes | None
    after: bytes


class MoveRecord(NamedTuple):
    """Guest data written in place. `source` is the guest offset it comes from; None writes zeroes.

    `guest`: the guest offset that it is encrypted for; None where it is not encrypted."""

    image: int
    offset: int
    length: int
    source: int | None
    guest: int | None

    @property
    def digested(self) -> bool:
        """What is on disk afterwards is known by digests; else it is zeroes."""
        return self.source is not None or self.guest is not None


class FreshRecord(NamedTuple):
    """Guest data written before the step, into space that nobody references, or that is `live` already where nobody
    needs what was there. `digests`: BLAKE3-256 of each started 64 KiB, joined."""

    image: int
    offset: int
    length: int
    digests: bytes
    live: bool


class BeforeRecord(NamedTuple):
    """Where a live range's bytes before the step are kept. `undo` None: it read as zeroes; `hole`: it was one."""

    image: int
    offset: int
    length: int
    undo: int | None  # offset in the undo file
    hole: bool
    digest: bytes  # BLAKE3-256 of the bytes in the undo file; empty where `undo` is None


class LengthRecord(NamedTuple):
    """A file length that a step relies on."""

    image: int
    before: int
    after: int


class UnlinkedRecord(NamedTuple):
    """A host range that loses one reference by the step; the operation's final phase frees it."""

    image: int
    offset: int
    length: int


class Declared(NamedTuple):
    """An operation is about to begin. Nothing has been touched."""

    operation: str  # unique id, 32 hexadecimal digits
    command: str  # "commit", "convert", …
    arguments: tuple[str, ...]  # the command line, without secrets
    version: str  # safeimg's
    owner: Owner
    images: tuple[ImageRecord, ...]
    time: float


class Started(NamedTuple):
    """The pointers of all participants are durable; from here on images may change."""

    settings: dict[str, Any]  # what the operation needs to go on, JSON-like
    lengths: tuple[int, ...]  # file length of each image
    undo: bool  # before-images of data are kept
    created: tuple[int, ...]  # images that rollback removes: they did not exist, or were overwritten wholly
    total: int  # guest bytes to process, for progress
    time: float


class ChangedOutside(NamedTuple):
    """Images that are not as the operation before left them: something that is not on record changed them since.

    `images`: index, and when that operation was settled."""

    images: tuple[tuple[int, float], ...]


class Observed(NamedTuple):
    """How the images that are only read look, after their fences are durable. Replaces the identities declared."""

    identities: tuple[tuple[int, Identity], ...]


class StepPrepared(NamedTuple):
    """Everything needed to take the step back is durable once this is."""

    number: int
    name: str  # "fence", "data", "grow", "empty", "free", …
    allocate: tuple[PatchRecord, ...] = ()
    link: tuple[PatchRecord, ...] = ()
    moves: tuple[MoveRecord, ...] = ()
    fresh: tuple[FreshRecord, ...] = ()
    before: tuple[BeforeRecord, ...] = ()
    lengths: tuple[LengthRecord, ...] = ()
    unlinked: tuple[UnlinkedRecord, ...] = ()
    cursor: Any = None  # where the next step starts, JSON-like
    done: int = 0  # guest bytes processed when this step is applied
    time: float = 0.0


class StepApplied(NamedTuple):
    """All of the step is durable. `digests`: for each in-place move that is `digested`, of each started 64 KiB of
    what is on disk, joined."""

    number: int
    digests: tuple[bytes, ...] = ()


class PointOfNoReturn(NamedTuple):
    """The next step cannot be taken back: from here only resume settles."""

    number: int  # of that step
    time: float


class GivenUp(NamedTuple):
    """Content that a step, or the end of the operation, gives up for good, kept for `undo` as before-images are:
    of space that it frees, cuts off or writes over behind the point of no return. Durable before it is lost."""

    number: int  # of the step; of the last one for what is given up at the end
    before: tuple[BeforeRecord, ...]


class Paused(NamedTuple):
    """The owner stopped at a step boundary (a signal, a full disk), with everything so far durable."""

    reason: str
    time: float


class RecoveryStarted(NamedTuple):
    """Somebody settles the operation. Durable before anything is written on its account."""

    action: str  # "resume", "rollback"
    owner: Owner
    time: float


class TakingBack(NamedTuple):
    """The step is being undone: its ranges may hold before or after. Durable before the first write."""

    number: int


class TakenBack(NamedTuple):
    """The step never happened, and that is durable."""

    number: int


class ContentRecord(NamedTuple):
    """What an image shows."""

    image: int
    format: str
    digest: str  # 64 hexadecimal digits: see `drivers/transfer/content.py`


class Digested(NamedTuple):
    """What the images show when all steps are applied. Only where that was asked for; an earlier one is void."""

    images: tuple[ContentRecord, ...]


class FinishRecord(NamedTuple):
    """A patch made after the outcome is decided, such as taking a fence down."""

    image: int
    offset: int
    before: bytes
    after: bytes


class Completed(NamedTuple):
    """The operation is done; what remains is `finish` and tidying up."""

    finish: tuple[FinishRecord, ...]
    time: float


class RolledBack(NamedTuple):
    """Every image is as it was before; what remains is tidying up. `lost`: what could not be restored, a line each."""

    lost: tuple[str, ...]
    time: float


class Abandoned(NamedTuple):
    """The user gave the operation up; the images stay as they are."""

    reason: str
    time: float
    finish: tuple[FinishRecord, ...] = ()


class Settled(NamedTuple):
    """How the images look now that everything is done to them: what tells later whether they were changed since.

    `lost`: why the operation cannot be undone; empty if what that takes is kept."""

    identities: tuple[tuple[int, Identity], ...]
    lost: str
    time: float


Event = (
    Declared | Started | ChangedOutside | Observed | StepPrepared | StepApplied | PointOfNoReturn | GivenUp | Paused
    | Digested | RecoveryStarted | TakingBack | TakenBack | Completed | RolledBack | Abandoned | Settled
)
