"""bench: how long reading or writing many blocks takes."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from safeimg.cli.common import filesystem, image_name, warn_image
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import CACHE, FORCE_SHARE, HELP, IMAGE_OPTS, QUIET, SHORT_FORMAT
from safeimg.cli.values import CACHE_MODES, MAX_SIZE, size

if TYPE_CHECKING:
    from safeimg.drivers.formats.api import Image
    from safeimg.ops.launch import Environment

MAX_INT = (1 << 31) - 1
DEPTH = 64
_NUMBER = re.compile(r"\s*\+?(0[xX][0-9a-fA-F]+|[0-9]+)")


def _number(text: str, what: str, most: int = MAX_INT, least: int = 0) -> int:
    match = _NUMBER.fullmatch(text)
    digits = match.group(1)[:20] if match is not None else ""
    is_octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    try:
        value = int(digits, 8) if is_octal else int(digits, 0)
    except ValueError:
        value = -1
    if not least <= value <= most:
        raise CommandError(f"Invalid {what} specified")
    return value


def _aio(text: str) -> str:
    if text not in ("threads", "native", "io_uring"):
        raise CommandError(f"Invalid aio option: {text}")
    return text


def _cache(text: str) -> str:
    if text not in CACHE_MODES:
        raise CommandError("Invalid cache mode")
    return "none" if text == "off" else text


COMMANDS = (
    Command(
        "bench",
        "Measure how fast an image is read or written.",
        (Argument("image", "The image. With -w, what it holds is lost."),),
        (
            HELP,
            Option("count", "c", None, "count", "Number of requests (75000).",
                   lambda text: _number(text, "request count")),
            Option("depth", "d", None, "depth", "Requests under way at once (64).",
                   lambda text: _number(text, "queue depth")),
            SHORT_FORMAT,
            Option("aio", "i", None, "aio", "threads, native or io_uring; all are done by threads here.", _aio),
            Option("aio", "n", None, None, "The same as -i native.", constant="native"),
            Option("offset", "o", None, "offset", "Where the first request begins (0).",
                   lambda text: size("offset", text)),
            QUIET,
            Option("size", "s", None, "size", "Bytes of a request (4k).",
                   lambda text: size("buffer size", text, maximum=MAX_INT)),
            Option("step", "S", None, "size", "From one request to the next (its size).",
                   lambda text: size("step_size", text, maximum=MAX_INT)),
            CACHE._replace(check=_cache),
            Option("write", "w", None, None, "Write."),
            Option("pattern", None, "pattern", "byte", "What is written (0).",
                   lambda text: _number(text, "pattern byte", 0xFF)),
            Option("flush-interval", None, "flush-interval", "count", "Flush after so many writes.",
                   lambda text: _number(text, "flush interval")),
            Option("no-drain", None, "no-drain", None, "Go on writing during a flush; makes no difference here."),
            IMAGE_OPTS,
            FORCE_SHARE,
        ),
        (
            ("Reading in blocks of 4 KiB", "bench disk.qcow2"),
            ("Writing a scratch image", "bench -w -c 10000 -s 64k --flush-interval 64 scratch.qcow2"),
        ),
        "No journal is kept: with -w the image is written over, and nothing takes that back.",
    ),
)  # fmt: skip


def run(command: Command, arguments: Arguments) -> int:
    flag, last = arguments.flag, arguments.last
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    writes, depth, flush = flag("write"), last("depth", DEPTH), last("flush-interval", 0)
    if flush and not writes:
        raise CommandError("--flush-interval is only available in write tests")
    if flush and flush < depth:
        raise CommandError("Flush interval can't be smaller than depth")
    name, fmt = image_name(arguments, arguments.positional[0], last("format"))
    cache = last("cache", "writeback")
    from safeimg.drivers.formats.chain import close_chain, open_chain
    from safeimg.drivers.transfer.core import Settings, sensible_workers
    from safeimg.ops.bench import Requests, bench_read, bench_write
    from safeimg.ops.repair import open_sound

    requests = Requests(
        last("count", 75000), last("size", 4096), min(last("offset", 0), MAX_SIZE), last("step", 0),
        last("pattern", 0), flush,
    )  # fmt: skip
    aio = "native" if "native" in arguments.all("aio") else last("aio")
    opened = partial(
        open_chain, filesystem(), name, format=fmt, write=writes, cache=cache, force_share=flag("force-share"), aio=aio,
        warn=warn_image,
    )  # fmt: skip
    layers: list[Image]
    if writes:
        with display(arguments) as shown:
            layers = run_stoppable(arguments, shown, lambda around: open_sound(around, opened), image=name)
    else:
        layers = opened()
    try:
        print(
            f"Sending {requests.count} {'write' if writes else 'read'} requests, {requests.size} bytes each, {depth} "
            f"in parallel (starting at offset {requests.offset}, step size {requests.step or requests.size})"
        )
        if flush:
            print(f"Sending flush every {flush} requests")

        async def work(environment: Environment) -> float:
            if writes:
                return await bench_write(environment, layers, requests)
            return await bench_read(layers, environment.transfer, requests)

        settings = Settings(workers=sensible_workers(depth), digests=False)
        with display(arguments) as shown:
            seconds = run_stoppable(arguments, shown, work, image=name, settings=settings)
    finally:
        close_chain(layers)
    print(f"Run completed in {seconds:.3f} seconds.")
    return 0
