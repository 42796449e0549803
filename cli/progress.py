"""How far a command is: qemu-img's percentages, a bar on a terminal, JSON lines, and SIGUSR1.

Everything that is shown comes from `Display.report(done, total)`, in bytes. Commands that move data in the
background hand their `Progress` counters to `Display.watching`, which reports them ten times a second.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from safeimg.cli.parser import Arguments

if TYPE_CHECKING:
    from safeimg.drivers.transfer.progress import Progress

_TICK = 0.1  # seconds between two looks at the counters
_SKIP = 2.0  # per cent that qemu-img lets pass between two lines


class Form(Protocol):
    """One way to show progress."""

    def show(self, done: int, total: int) -> None: ...
    def close(self) -> None: ...


class Display:
    """Shows progress in one form. Reports come from one thread at a time."""

    def __init__(self, form: Form | None) -> None:
        self._form = form
        self._asked = False  # SIGUSR1 came
        self._held = self._silent = False

    def ask(self) -> None:
        """Prints the state on stderr at the next report. Safe in a signal handler."""
        self._asked = True

    def report(self, done: int, total: int) -> None:
        """`done` of `total` bytes are behind us."""
        if self._asked:
            self._asked = False
            with _unread(sys.stderr):
                print(f"    ({_percent(done, total):.2f}/100%)", file=sys.stderr, flush=True)
        if self._form is not None and not self._held:
            with _unread(sys.stdout):
                self._form.show(done, total)

    def hold(self, *, wholly: bool = False) -> None:
        """Nothing is shown until `begin`; `wholly`: nor is the line ended if that never comes."""
        self._held, self._silent = True, wholly

    def begin(self) -> None:
        self._held = self._silent = False
        self.report(0, 1)

    def close(self) -> None:
        """Ends the line."""
        if self._form is not None and not self._silent:
            with _unread(sys.stdout):
                self._form.close()

    def finish(self, total: int = 1) -> None:
        """All is done: shown as such even if the last report said less."""
        if self._form is not None and not self._held:
            with _unread(sys.stdout):
                self._form.show(total, total)

    @contextmanager
    def watching(self, progress: Progress) -> Iterator[None]:
        """Reports the counters while the body runs."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(progress, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _watch(self, progress: Progress, stop: threading.Event) -> None:
        while True:
            self.report(progress.done, progress.total)
            if stop.wait(_TICK):
                return


@contextmanager
def display(arguments: Arguments) -> Iterator[Display]:
    """The display that -p, --progress and -q ask for. Answers SIGUSR1 while the body runs.

    Leaves the cursor on a fresh line, as qemu-img does, whether the command succeeds or fails."""
    shown = Display(_form(arguments))
    previous = _on_usr1(lambda *_: shown.ask())
    try:
        yield shown
    finally:
        if previous is not None:
            signal.signal(signal.SIGUSR1, previous)
        shown.close()


@contextmanager
def _unread(stream: TextIO) -> Iterator[None]:
    """What nobody can read any more (a terminal that hung up, the other end of a pipe) stops nothing."""
    from safeimg.cli.main import silence

    try:
        yield
    except OSError:
        silence(stream)


def _on_usr1(handler: Callable[..., None]) -> Any:
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGUSR1, handler)


def _form(arguments: Arguments) -> Form | None:
    if not arguments.flag("progress") or arguments.flag("quiet"):
        return None
    if arguments.last("progress") == "json":
        return JsonLines()
    if sys.stdout.isatty():
        return Bar()
    return Percentages()


def _percent(done: int, total: int) -> float:
    return min(100.0, done * 100 / total) if total else 0.0


class Percentages:
    """`    (12.34/100%)` and a carriage return: what qemu-img prints."""

    def __init__(self) -> None:
        self._last = -100.0

    def show(self, done: int, total: int) -> None:
        percent = _percent(done, total)
        if percent in (0.0, 100.0) or percent > self._last + _SKIP:
            if percent == self._last:
                return
            self._last = percent
            sys.stdout.write(f"    ({percent:.2f}/100%)\r")
            sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class JsonLines:
    """One JSON object a line: bytes done and in all, seconds so far, bytes a second, seconds left (or
    null)."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._next = 0.0
        self._state = (-1, -1)

    def show(self, done: int, total: int) -> None:
        now = time.monotonic() - self._started
        if (done, total) == self._state or (now < self._next and done < total):
            return
        self._state = done, total
        self._next = now + _TICK
        rate = done / now if now else 0.0
        left = f"{(total - done) / rate:.1f}" if rate else "null"
        print(
            f'{{"done": {done}, "total": {total}, "percent": {_percent(done, total):.2f}, '
            f'"seconds": {now:.1f}, "rate": {rate:.0f}, "left": {left}}}',
            flush=True,
        )

    def close(self) -> None:
        """Every line is complete."""


class Bar:
    """A bar with rate and time left, for a terminal."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        self._bar.stop()
