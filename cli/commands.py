"""The commands and their options: the table that the parser, the help and shell completion are made from."""

from __future__ import annotations

from safeimg.cli import values
from safeimg.cli.options import Argument, Command, Option

HELP = Option("help", "h", "help", None, "Show this help and exit.")
OBJECT = Option(
    "object", None, "object", "objectdef", "A QEMU user-creatable object (repeatable).", values.user_object
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
    "k=v[,k=v…]",
    "Options of the format (`-o help` lists them; repeatable).",
    values.option_list,
)
BACKING_FORMAT = Option("backing-format", "F", None, "fmt", "Format of the backing image.")

IMAGE = Argument("image", "The image.")
PENDING_IMAGE = Argument("image", "The image with something pending, or any image that takes part in it.")
FENCED = Option(
    "fenced", None, "fenced", None, "Assert that the owner is dead (it runs on another machine, say)."
)
ADOPT = Option(
    "adopt", None, "adopt", None, "The image and its log were copied or restored together: bind them anew."
)
JOURNAL = Option("journal", None, "journal", "PATH", "Where the log goes (beside the image if not given).")
NO_JOURNAL = Option(
    "no-journal", None, "no-journal", None, "Keep no log: nothing can be resumed or rolled back."
)
ANCHOR = Option(
    "anchor", None, "anchor", "HASH", "A head that `audit verify` printed before: was the history cut since?"
)
ALL = Option("all", None, "all", None, "Every pending operation that this host knows of.")
SCAN = Option("scan", None, "scan", "DIR", "Look for logs in a folder and those below it (repeatable).")
REASON = Option("reason", None, "reason", "TEXT", "Why; kept in the history.")

COMMANDS = (
    Command(
        "create",
        "create",
        "Create a disk image.",
        (
            Argument("filename", "The image to create."),
            Argument(
                "size",
                "Virtual size: bytes, or with k, M, G, T, P, E. Taken from the backing image if left out.",
                False,
            ),
        ),
        (
            HELP,
            OBJECT,
            Option("backing", "b", None, "file", "Backing image."),
            BACKING_FORMAT,
            SHORT_FORMAT._replace(help="Format of the image (raw if not given)."),
            OPTIONS,
            QUIET,
            Option("unsafe", "u", None, None, "Do not look at the backing image; it need not exist."),
        ),
        (
            ("A growing image of 20 GiB", "create -f qcow2 disk.qcow2 20G"),
            (
                "An overlay, of its backing image's size",
                "create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
            ),
            (
                "Small clusters, wide refcounts",
                "create -f qcow2 -o cluster_size=16k,refcount_bits=64 disk.qcow2 1T",
            ),
        ),
    ),
    Command(
        "info",
        "info",
        "Show what an image is.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            OUTPUT,
            Option("backing-chain", None, "backing-chain", None, "Show its backing images too."),
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
        ),
        (
            ("One image", "info disk.qcow2"),
            ("A whole chain, for programs", "info --backing-chain --output=json top.qcow2"),
            ("An image that a guest is using", "info -U disk.qcow2"),
        ),
    ),
    Command(
        "check",
        "check",
        "Check an image's metadata.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            Option("repair", "r", "repair", "leaks|all", "Not supported yet.", values.repair),
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            QUIET,
            SOURCE_CACHE,
            FORCE_SHARE,
        ),
        (("Is the image in order?", "check disk.qcow2"), ("For programs", "check --output=json disk.qcow2")),
        "Exit code 0: no errors; 1: not checked; 2: corruptions; 3: leaked clusters only; 63: the format "
        "has no checks.",
    ),
    Command(
        "compare",
        "compare",
        "Compare the content of two images.",
        (Argument("first", "An image."), Argument("second", "Another one.")),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT._replace(help="Format of the first image."),
            Option("second-format", "F", None, "fmt", "Format of the second image."),
            SOURCE_CACHE,
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            Option("strict", "s", None, None, "Sizes and allocation must be the same too."),
            FORCE_SHARE,
        ),
        (
            ("The same content?", "compare disk.raw disk.qcow2"),
            ("With progress", "compare -p a.qcow2 b.qcow2"),
        ),
        "Exit code 0: identical; 1: different; 2: an image cannot be opened; 3, 4: its metadata or data "
        "cannot be read.",
    ),
    Command(
        "map",
        "map",
        "Show where an image's data lies.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            Option("start-offset", "s", "start-offset", "offset", "Where to start.", values.start_offset),
            Option(
                "max-length", "l", "max-length", "len", "How much of the image to show.", values.max_length
            ),
        ),
        (
            ("Which file holds what", "map top.qcow2"),
            ("All ranges, for programs", "map --output=json top.qcow2"),
        ),
    ),
    Command(
        "convert",
        "convert",
        "Copy images into a new one of any format.",
        (
            Argument("source", "The images to copy, joined in this order.", several=True),
            Argument("target", "The image to write."),
        ),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            Option(
                "target-image-opts",
                None,
                "target-image-opts",
                None,
                "Take the target's name as driver=…,file.filename=… options (with -n).",
            ),
            FORCE_SHARE,
            Option("salvage", None, "salvage", None, "Go on after read errors; what cannot be read is zero."),
            Option("target-is-zero", None, "target-is-zero", None, "The target (-n) reads as zeroes."),
            Option("bitmaps", None, "bitmaps", None, "Copy the top image's persistent bitmaps."),
            Option(
                "skip-broken-bitmaps",
                None,
                "skip-broken-bitmaps",
                None,
                "With --bitmaps: leave inconsistent ones out.",
            ),
            SHORT_FORMAT._replace(help="Format of the sources."),
            Option("target-format", "O", None, "fmt", "Format of the target (raw if not given)."),
            Option(
                "backing",
                "B",
                None,
                "file",
                "Backing image of the target: what is equal there is not copied.",
            ),
            BACKING_FORMAT,
            Option("copy-offloading", "C", None, None, "Let the file system copy where it can."),
            Option("compress", "c", None, None, "Compress the target."),
            OPTIONS,
            Option("snapshot", "l", None, "snapshot", "Convert an internal snapshot.", values.snapshot),
            Option(
                "sparse",
                "S",
                None,
                "size",
                "Runs of zeroes of that size (4k) become holes; 0: none do.",
                values.sparse_size,
            ),
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            Option("no-create", "n", None, None, "The target exists; write into it."),
            Option("undo", None, "undo", None, "With -n: keep what is overwritten until it is settled."),
            Option(
                "coroutines",
                "m",
                None,
                "count",
                "Copies that run in parallel (1 to 16, 8).",
                values.coroutines,
            ),
            Option("out-of-order", "W", None, None, "Write in any order."),
            RATE,
            CACHE,
            SOURCE_CACHE,
            JOURNAL,
            NO_JOURNAL,
        ),
        (
            ("raw to qcow2", "convert -p -O qcow2 disk.raw disk.qcow2"),
            (
                "Compressed, for shipping",
                "convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2",
            ),
            ("A chain flattened into a raw image", "convert -O raw top.qcow2 disk.raw"),
        ),
        "Killed, it goes on where it was when the same command is run anew, or with `safeimg resume TARGET`: "
        "`safeimg rollback TARGET` removes what was begun.",
    ),
    Command(
        "commit",
        "commit",
        "Write an image's changes into its backing image.",
        (IMAGE,),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT,
            CACHE,
            Option("base", "b", None, "base", "The image of the chain to commit to (the one below)."),
            Option("drop", "d", None, None, "Do not empty the image afterwards."),
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            RATE,
            Option(
                "no-undo",
                None,
                "no-undo",
                None,
                "Keep no before-images: faster, but it cannot be rolled back.",
            ),
            JOURNAL,
            NO_JOURNAL,
        ),
        (
            ("Into the backing image, and empty the overlay", "commit overlay.qcow2"),
            ("Several layers at once", "commit -b base.qcow2 top.qcow2"),
            ("At 50 MiB a second, with progress", "commit -p -r 50M overlay.qcow2"),
        ),
        "Killed, it leaves a readable image: `safeimg resume BASE` (or the same command again) finishes it, "
        "`safeimg rollback BASE` takes it back.",
    ),
    Command(
        "status",
        "status",
        "Show pending and running operations.",
        (Argument("path", "Images, or folders to look into.", False, True),),
        (HELP, OUTPUT, ALL, SCAN),
        (
            ("Is something pending on this image?", "status disk.qcow2"),
            ("On this host, after a reboot", "status --all"),
            ("In a folder whose images came from elsewhere", "status --scan /srv/images"),
        ),
        "Exit code 0: nothing pending; 3: something is.",
        True,
    ),
    Command(
        "resume",
        "settle",
        "Finish a pending operation.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, PROGRESS, LONG_PROGRESS, QUIET, FENCED, ADOPT),
        (("Go on where it stopped", "resume base.qcow2"), ("With progress", "resume -p base.qcow2")),
        "Everything is checked before anything is written. Exit code 0: done, or nothing to do; 4: an "
        "image was changed meanwhile, nothing was written; 5: its owner is alive, or on another machine "
        "(--fenced); 6: impossible.",
        True,
    ),
    Command(
        "rollback",
        "settle",
        "Take a pending operation back.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, PROGRESS, LONG_PROGRESS, QUIET, FENCED, ADOPT),
        (("Restore every image it touched", "rollback base.qcow2"),),
        "Everything is checked before anything is written. Exit codes as of resume; 6 behind the point of no "
        "return.",
        True,
    ),
    Command(
        "abandon",
        "settle",
        "Give a pending operation up: images stay as they are.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, QUIET, FENCED, REASON),
        (("After restoring the images from a backup", "abandon base.qcow2 --reason 'restored from backup'"),),
        "For when neither resume nor rollback is possible or wanted. What was done so far stays, and nothing "
        "can take it back.",
        True,
    ),
    Command(
        "log",
        "history",
        "Show what safeimg did to an image.",
        (IMAGE,),
        (HELP, OUTPUT),
        (("The operations, newest last", "log disk.qcow2"),),
        "",
        True,
    ),
    Command(
        "show",
        "history",
        "Show the events of one operation.",
        (IMAGE, Argument("operation", "Its id, or the beginning of it.")),
        (HELP, OUTPUT),
        (("All events of an operation", "show disk.qcow2 4f1c"),),
        "",
        True,
    ),
    Command(
        "audit",
        "history",
        "Verify an image's history.",
        (Argument("verify", "The word verify."), IMAGE),
        (HELP, OUTPUT, ANCHOR),
        (("Is the history complete, and the image as it left it?", "audit verify disk.qcow2"),),
        "Exit code 0: it verifies; 4: an event was edited, removed or swapped, or the image changed.",
        True,
    ),
)

PROGRAM = Command(
    "safeimg",
    "",
    "qemu-img, made crash-safe.",
    (),
    (
        HELP,
        Option("version", "V", "version", None, "Show the version and exit."),
        Option("trace", "T", "trace", "pattern", "Accepted for qemu-img's sake; does nothing."),
    ),
    (),
)


def find(name: str) -> Command | None:
    for command in COMMANDS:
        if command.name == name:
            return command
    return None
