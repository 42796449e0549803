"""The differential test at length: generated command lines, given to qemu-img and to safeimg.

    python -m differential.soak --lines 5000 --seed 1             (with tests/ and tests/cli/ on the path)
    python -m differential.soak --line 'create -f qcow2 new.qcow2 1M' --line 'info new.qcow2'

Each case has a seed of its own, SEED/NUMBER. A difference is shown with the case, made as short as is cheap, and the
command line that replays it; the soak goes on, and fails at the end.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from differential.judge import Bench
from differential.lines import COMMANDS, Generator, Line
from safeimg.cli import commands


def cases(seed: int, lines: int, chosen: tuple[str, ...]) -> Iterator[tuple[str, list[Line]]]:
    """Cases by their seeds, until they have so many lines together."""
    number = total = 0
    while total < lines:
        name = f"{seed}/{number}"
        case = Generator(Random(name), chosen).case()
        yield name, case
        total += len(case)
        number += 1


def run(bench: Bench, *, lines: int, seed: int, chosen: tuple[str, ...], shrink: bool = True) -> list[str]:
    """The differences, told."""
    found: list[str] = []
    excused: Counter[str] = Counter()
    done = 0
    for name, case in cases(seed, lines, chosen):
        if done % 500 > (done + len(case)) % 500:
            print(f"… {done} lines", flush=True)
        done += len(case)
        if bench.difference(case):
            found.append(told(bench, name, case, shrink))
        elif bench.excuse:
            excused[bench.excuse] += 1
    for rule, count in excused.items():
        print(f"{count} cases excused: {rule}")
    if bench.unjudged:
        print(f"{bench.unjudged} cases not judged: qemu-img did not come to an end, or not for the lines' sake")
    return found


def told(bench: Bench, name: str, case: Sequence[Line], shrink: bool) -> str:
    shorter = bench.shrunk(case) if shrink else case
    replay = " ".join(f"--line {shlex.quote(str(line))}" for line in shorter)
    text = f"== {name}: {' ; '.join(map(str, case))}\n{bench.difference(shorter)}\nreplay: {replay}\n"
    print(text, flush=True)
    return text


def known() -> tuple[str, ...]:
    """The commands that are both generated here and there in safeimg."""
    return tuple(name for name in COMMANDS if name in commands.names())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="generated command lines, given to qemu-img and to safeimg")
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--commands", default="", help="only these, separated by spaces")
    parser.add_argument("--line", action="append", default=[], help="replay: these lines, one after another")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="differential-") as name:
        os.environ["SAFEIMG_STATE_DIR"] = str(Path(name) / "state")
        bench = Bench(Path(name))
        if chosen.line:
            found = bench.difference([Line.parse(line) for line in chosen.line])
            print(found or "no difference")
            return bool(found)
        only = tuple(chosen.commands.split()) or known()
        wrong = run(bench, lines=chosen.lines, seed=chosen.seed, chosen=only)
    print(f"{chosen.lines} lines, seed {chosen.seed}: {len(wrong)} cases differ")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
