"""measure: how large the file of a new image will be."""

from __future__ import annotations

from safeimg.cli.common import filesystem, image_name, print_json
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import FORCE_SHARE, HELP, IMAGE_OPTS, OBJECT, OPTIONS, OUTPUT, SHORT_FORMAT
from safeimg.cli.values import output_format, size, snapshot


def _size(text: str) -> int:
    return size("image size", text)


COMMANDS = (
    Command(
        "measure",
        "Tell how large a new image's file will be.",
        (Argument("image", "The image that it will be made from.", False),),
        (
            HELP,
            SHORT_FORMAT,
            Option("snapshot", "l", None, "snapshot", "Take the content of an internal snapshot.", snapshot),
            OPTIONS,
            Option("target-format", "O", None, "fmt", "Format of the new image (raw if not given)."),
            FORCE_SHARE,
            OBJECT,
            IMAGE_OPTS,
            OUTPUT._replace(check=output_format),
            Option("size", None, "size", "size", "Virtual size of an empty image.", _size),
        ),
        (
            ("Space for a copy", "measure -O qcow2 disk.raw"),
            ("For an empty image, for programs", "measure --size 20G -O qcow2 --output=json"),
        ),
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    output = arguments.last("output", "human")
    words, flag, options = arguments.positional, arguments.flag, arguments.all("options")
    if len(words) > 1:
        raise CommandError("At most one filename argument is allowed.")
    if not words and (flag("image-opts") or flag("format") or flag("snapshot")):
        raise CommandError("--image-opts, -f, and -l require a filename argument.")
    if not words and not flag("size"):
        raise CommandError("Either --size N or one filename must be specified.")
    if words and flag("size"):
        raise CommandError("--size N cannot be used together with a filename.")
    from safeimg.ops.measure import measure_image, measure_size

    target: str = arguments.last("target-format", "raw")
    if words:
        name, fmt = image_name(arguments, words[0], arguments.last("format"))
        found = measure_image(
            filesystem(), name, target, options, fmt=fmt, snapshot=arguments.last("snapshot"),
            force_share=flag("force-share"), secrets=arguments.secrets,
        )  # fmt: skip
    else:
        found = measure_size(arguments.last("size"), target, options, secrets=arguments.secrets)
    if output == "json":
        bitmaps = {} if found.bitmaps is None else {"bitmaps": found.bitmaps}
        print_json({**bitmaps, "required": found.required, "fully-allocated": found.fully_allocated})
        return 0
    print(f"required size: {found.required}\nfully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    return 0
