"""Every write, sync, rename and removal of a real commit fails, or kills it: `python -m faults.calls_soak`.

What the tests beside this do with a few system calls, with all of them, on every file that a commit touches, the
journal's and the history's too. Needs strace. Prints what failed; ends with 1 if anything did.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faults.injecting import SYNCS, WRITES, Injected
from faults.running import COMMIT, Folder

NAMES = "openat,rename,unlink"
FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
HISTORY = ("state/history.db", "state/history.db-journal")


def cases(base: str) -> Iterator[tuple[str, str, str]]:
    """File, calls and fault."""
    files = [base, "top.qcow2", f"{base}.safeimg", f"{base}.safeimg-undo", "top.qcow2.safeimg", "top.qcow2.safeimg-new"]
    for fault in FAULTS:
        for file in (*files, *HISTORY):
            for calls in (WRITES, SYNCS, NAMES):
                yield file, calls, fault


def judge(folder: Folder, fault: Injected) -> bool:
    """Runs the commit; whether the fault came to pass. Raises `AssertionError` for what must not be."""
    code, out, err = folder.ends(*COMMIT, under=fault.under)
    if not fault.hits and code >= 0:
        return False
    assert code in (0, 1, -9), (code, err)
    assert "internal error" not in err and "Traceback" not in err, err
    assert (code == 1) == bool(err) and err.count("\n") <= 1, err
    assert (code == 0) == (out == "Image committed.\n"), out
    if folder.ends("status", "top.qcow2", folder.base.name)[0] == 0:
        assert folder.shown(folder.top) == folder.new
        assert folder.shown(folder.base) in (folder.old, folder.new)
        assert code != 0 or folder.shown(folder.base) == folder.new
        return True
    assert folder.shown(folder.top) == folder.new
    kept = folder.kept()
    for verb in ("rollback", "resume"):
        folder.put_back(kept)
        ended, said, why = folder.ends(verb, folder.base.name)
        over = any(words in said + why for words in ("had been completed", "past its point of no return", "not begun"))
        assert ended == 0 or over, (verb, why)
        over = over or "nothing is pending" in said
        expected = {folder.new if verb == "resume" else folder.old, *((folder.old, folder.new) if over else ())}
        assert folder.shown(folder.base) in expected and folder.shown(folder.top) == folder.new, (verb, said, why)
        if ended:
            folder.done("resume", folder.base.name)
        assert folder.left() == [], (verb, folder.left())
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="base.qcow2", help="base.raw or base.qcow2")
    parser.add_argument("--stride", type=int, default=1, help="every how manieth call")
    parser.add_argument("--only", default="", help="cases that contain this")
    options = parser.parse_args()
    started, number, failed = time.monotonic(), 0, 0
    for file, calls, what in cases(options.base):
        if options.only not in f"{file} {calls} {what}":
            continue
        for when in range(1, 100, options.stride):
            path = Path(tempfile.mkdtemp())
            try:
                if not judge(Folder(path, options.base), Injected(path, calls, what, on=[path / file], when=str(when))):
                    break
                number += 1
            except AssertionError as error:
                failed += 1
                print(f"{file}: {calls} {when}: {what}: {error}", flush=True)
            finally:
                shutil.rmtree(path)
    print(f"{number} calls in {time.monotonic() - started:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
