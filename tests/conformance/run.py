"""QEMU's own image tests, with safeimg as qemu-img: `python -m conformance.run --jobs 2`.

Runs the cases of iotests.txt for the formats that safeimg has, and prints how many passed, failed and were not run.
The output of a case that fails stays in the output folder, with its difference. Exit code: 0 if none failed, 1 if one
did, 69 if QEMU's source package or its programs are not to be had.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from conformance import harness, listing, source
from conformance.harness import Outcome, Status
from safeimg.drivers.formats import registry

UNAVAILABLE = 69  # EX_UNAVAILABLE


def main() -> int:
    options = _options()
    listed = listing.read()
    try:
        chosen = choose(listed, options.format.split(), options.cases.split())
    except ValueError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    try:
        iotests = source.iotests(listing.every_case(listed), mirror=options.mirror)
        with tempfile.TemporaryDirectory(prefix="conformance-") as name:
            tools = harness.prepare(Path(name), options.program)
            outcomes = run_all(iotests, tools, chosen, options)
    except (source.Unavailable, FileNotFoundError) as error:
        print(f"conformance: {'skipped: ' if options.if_available else ''}{error}", file=sys.stderr)
        return 0 if options.if_available else UNAVAILABLE
    print(table(outcomes))
    failed = any(outcome.status is Status.FAILED for outcome in outcomes)
    if failed:
        print(f"What the failed cases printed, and how it differs, is in {options.output}")
    return 1 if failed else 0


def choose(
    listed: dict[str, tuple[str, ...]], formats: Sequence[str], cases: Sequence[str]
) -> list[tuple[str, str]]:
    """Format and case of each run: those listed, of these formats and cases only where any are named.

    Raises `ValueError` for a name that is not listed: nothing outside of the list is ever run."""
    for name in formats:
        if name not in listed:
            raise ValueError(f"no cases are listed for the format {name}")
    known = listing.every_case(listed)
    for case in cases:
        if case not in known:
            raise ValueError(f"case {case} is not listed")
    supported = [name for name in listed if name in registry.names()]
    chosen = [
        (name, case) for name in formats or supported for case in listed[name] if not cases or case in cases
    ]
    if not chosen:
        raise ValueError("none of these cases is listed for these formats")
    return chosen


def run_all(
    iotests: Path, tools: harness.Tools, chosen: Sequence[tuple[str, str]], options: argparse.Namespace
) -> list[Outcome]:
    """Runs the cases, several at a time, and says how each ended as it ends."""
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [
            pool.submit(harness.run, iotests, tools, name, case, options.timeout) for name, case in chosen
        ]
        for future in as_completed(running):
            outcome = future.result()
            reason = f"  {outcome.reason}" if outcome.reason else ""
            print(
                f"{outcome.format:<10} {outcome.case:<18} {outcome.status.value:<8} {outcome.seconds:6.1f} s{reason}",
                flush=True,
            )
            keep(outcome, options.output)
            outcomes.append(outcome)
    return outcomes


def keep(outcome: Outcome, folder: Path) -> None:
    """Writes what a failed case printed; removes what an earlier run left of a case that did not fail now."""
    base = folder / outcome.format / outcome.case
    bad, diff = base.with_name(f"{base.name}.out.bad"), base.with_name(f"{base.name}.diff")
    if outcome.status is Status.FAILED:
        base.parent.mkdir(parents=True, exist_ok=True)
        bad.write_bytes(outcome.output or b"")
        diff.write_text(outcome.diff)
    else:
        bad.unlink(missing_ok=True)
        diff.unlink(missing_ok=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each format, and the names of what failed and what was not run."""
    lines = ["", f"{'format':<10} {'passed':>7} {'failed':>7} {'not run':>8} {'cases':>6}"]
    names: list[str] = []
    for format in dict.fromkeys(outcome.format for outcome in outcomes):
        mine = sorted((each for each in outcomes if each.format == format), key=lambda each: each.case)
        of = {status: [each.case for each in mine if each.status is status] for status in Status}
        lines.append(
            f"{format:<10} {len(of[Status.PASSED]):>7} {len(of[Status.FAILED]):>7} "
            f"{len(of[Status.NOT_RUN]):>8} {len(mine):>6}"
        )
        names += [f"{format} {status.value}: {' '.join(of[status])}"
                  for status in (Status.FAILED, Status.NOT_RUN) if of[status]]
    return "\n".join([*lines, *([""] if names else []), *names])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="", help="formats, in place of those that safeimg has")
    parser.add_argument("--cases", default="", help="cases, in place of all that are listed")
    parser.add_argument("--jobs", type=int, default=2, help="cases run at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one case")
    parser.add_argument("--program", type=_program, help="judge this one, in place of safeimg")
    parser.add_argument("--output", type=Path, default=Path("../build/conformance"), help="folder for what failed")
    parser.add_argument("--mirror", default=source.MIRROR, help="where Debian's packages are")
    parser.add_argument("--if-available", action="store_true", help="no error if QEMU's package is not to be had")
    return parser.parse_args()


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise argparse.ArgumentTypeError(f"there is no program {name}")
    return Path(found)


if __name__ == "__main__":
    raise SystemExit(main())
