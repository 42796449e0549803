"""Options that several commands have."""

from __future__ import annotations

from safeimg.cli import values
from safeimg.cli.objects import user_object
from safeimg.cli.options import Argument, Option

HELP = Option("help", "h", "help", None, "Show this help and exit.", ends=True)
OBJECT = Option(
    "object", None, "object", "objectdef", "A QEMU user-creatable object (repeatable).", user_object
)
IMAGE_OPTS = Option(
    "image-opts", None, "image-opts", None, "Take the file name as driver=…,file.filename=… options."
)
FORMAT = Option(
    "format", "f", "format", "fmt", "Format of the image (found out from its content if not given)."
)
SHORT_FORMAT = FORMAT._replace(long=None)
FORCE_SHARE = Option(
    "force-share", "U", "force-share", None, "Open the image although another process may write to it."
)
OUTPUT = Option("output", None, "output", "human|json", "Form of the output.")
QUIET = Option("quiet", "q", None, None, "Print nothing but errors.")
PROGRESS = Option("progress", "p", None, None, "Show progress.", constant="auto")
LONG_PROGRESS = Option(
    "progress",
    None,
    "progress",
    "auto|json",
    "How progress is shown: json prints one object a line.",
    values.progress_form,
    own=True,
)
CACHE = Option(
    "cache",
    "t",
    None,
    "cache",
    "Cache mode of the image written: none, writeback (default), writethrough, "
    "directsync, or unsafe (safe against process death, not against power loss).",
)
SOURCE_CACHE = Option("source-cache", "T", None, "cache", "Cache mode of the images read.")
RATE = Option(
    "rate", "r", None, "rate", "At most that many bytes a second (suffixes k, M, G …).", values.rate_limit
)
OPTIONS = Option(
    "options",
    "o",
    None,
    "options",
    "Options of the format (`-o help` lists them; repeatable).",
    values.option_list,
)
BACKING_FORMAT = Option("backing-format", "F", None, "fmt", "Format of the backing image.")
IMAGE = Argument("image", "The image.")
WAIT = Option(
    "wait", None, "wait", "SECONDS", "Wait for whoever uses the image, for so long at most.", values.seconds, own=True
)
# What every command that changes an image has.
JOURNALING = (
    Option("journal", None, "journal", "PATH", "Where the log goes (beside the image if not given).", own=True),
    Option("no-journal", None, "no-journal", None, "Keep no log: nothing can be resumed or rolled back.", own=True),
    Option(
        "on-crash",
        None,
        "on-crash",
        "resume|rollback|report",
        "What `safeimg recover` does if this is interrupted (report).",
        values.policy,
        own=True,
    ),
    Option(
        "keep-undo",
        None,
        "keep-undo",
        "SIZE",
        "Keep up to so much for `safeimg undo` (64M; 0 keeps nothing).",
        values.kept_size,
        own=True,
    ),
    Option(
        "digest",
        None,
        "digest",
        None,
        "Record a digest of what the images show in the end: safeimg audit verify compares it.",
        own=True,
    ),
    WAIT,
)
