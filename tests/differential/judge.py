"""One case in two folders, by qemu-img in one and by safeimg called as qemu-img in the other, and what differs."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path
from typing import Any

import twin
from differential import exceptions, images
from differential.exceptions import Exchange, Outcome
from differential.lines import Line
from twin import UNTIMED, qemu_img, safeimg

# What depends on the moment, what a file occupies, and how often progress is shown.
_ALWAYS = (
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE"),
    (r'"date-n?sec": \d+', '"date": 0'),
    # A new key takes chance, and as long as the processor needs to hash it so often.
    (r'("?uuid"?: )"?[0-9a-f-]{36}', r"\1UUID"),
    (r'((?:master[- ]key[- ])?iters"?: )\d+', r"\1N"),
    (r"Run completed in \d+\.\d+ seconds", "Run completed in N seconds"),
    (r"#block(\d+)\d\d", r"#block\1NN"),  # a number that counts, and two digits by chance
    (r"(?m)^( *disk size: ).*", r"\1SIZE"),
    (r'"actual-size": \d+', '"actual-size": 0'),
    (r"( +\(\d+\.\d\d/100%\)\r)+", "PROGRESS\r"),
    (r"(Warning: Image size mismatch!\n)PROGRESS\r", r"\1"),
)
# Where things lie: it differs once an image has been changed, as another order of allocation explains.
_PLACES = (
    (r'"offset": \d+', '"offset": 0'),
    (r"(?m)^(0x\S+ +|0 +)(0x\S+ +)0x\S+ +", r"\1\2PLACE "),
    (r"Image end offset: \d+", "Image end offset: 0"),
    (r'"image-end-offset": \d+', '"image-end-offset": 0'),
    (r"\d+\.\d\d% fragmented", "N% fragmented"),
    (r',\s*"fragmented-clusters": \d+', ""),  # the first member is another
)
CLUSTER = 65536  # bytes, or less, of the images with data files


class Bench:
    """The kept set and two folders beside it; cases follow one another in it."""

    def __init__(self, folder: Path) -> None:
        self.kept = folder / "kept"
        self.sides = (folder / "one", folder / "two")
        self.unjudged = 0  # cases whose outcome with qemu-img is none to compare with
        self.excuse = ""  # the rule that excused what differed in the last case (see `exceptions`)
        self.kept.mkdir()
        images.build(self.kept)

    def difference(self, case: Sequence[Line]) -> str:
        """What differs after a case, first of all; empty if nothing does, a rule excuses it, or qemu-img does not come
        to an end: of a chain that leads to itself, say."""
        try:
            return self._difference(case)
        except subprocess.TimeoutExpired:
            self.unjudged += 1
            return ""

    def _difference(self, case: Sequence[Line]) -> str:
        self.excuse = ""
        mentioned = images.mentioned(word for line in case for word in line.words)
        for side in self.sides:
            shutil.rmtree(side, ignore_errors=True)
            side.mkdir()
            images.copy(self.kept, side, mentioned)
        changed = False
        for line in case:
            before = [_contents(side) for side in self.sides]
            expected = qemu_img(line.words, self.sides[0], tries=1)
            if UNTIMED in expected.stderr:
                self.unjudged += 1  # what it left behind is no start for another try
                return ""
            answer = safeimg(line.words, self.sides[1], name="qemu-img")
            masked = self._masked(expected, changed), self._masked(answer, changed)
            kept, unchanged = (_contents(side) == old for side, old in zip(self.sides, before, strict=True))
            wrong = _outcomes(*masked)
            if wrong or (expected.code and not kept):
                rule = exceptions.excuse(Exchange(line.words, *masked, unchanged=unchanged, rewritten=changed))
                if rule is not None:
                    self.excuse = rule.name
                    if not rule.goes_on:
                        return ""
                elif wrong:
                    return f"{line}\n{wrong}"
            changed = changed or bool(self._changed())
        wrong = self.files()
        name, _, mismatch = wrong.partition(": Content mismatch")
        rules = [rule for line in case if (rule := exceptions.other_content(line.words, name))]
        if mismatch and rules:
            self.excuse = rules[0]
            return ""
        return wrong

    def shrunk(self, case: Sequence[Line]) -> list[Line]:
        """The case without what it differs without, each line and each part tried once."""
        best = list(case)
        for index in reversed(range(len(case))):
            without = best[:index] + best[index + 1 :]
            if without and self.difference(without):
                best = without
        for index, line in enumerate(best):
            for part in reversed(range(len(line.parts))):
                smaller = replace(best[index], parts=best[index].parts[:part] + best[index].parts[part + 1 :])
                shorter = [*best[:index], smaller, *best[index + 1 :]]
                if self.difference(shorter):
                    best = shorter
        return best

    def _masked(self, outcome: twin.Outcome, changed: bool) -> Outcome:
        stdout, stderr = (
            self._mask(text.decode(errors="surrogateescape"), changed)
            for text in (outcome.stdout, outcome.stderr)
        )
        return Outcome(outcome.code, stdout, stderr)

    def _mask(self, text: str, changed: bool) -> str:
        for side in self.sides:
            text = text.replace(str(side), "FOLDER")
        for pattern, shown in (*_ALWAYS, *(_PLACES if changed else ())):
            text = re.sub(pattern, shown, text)
        return text

    def _changed(self) -> list[str]:
        """The files that are not, in both folders, as they are in the kept set."""
        names = sorted({path.name for side in self.sides for path in side.iterdir()})
        return [
            name for name in names if not all(_same(side / name, self.kept / name) for side in self.sides)
        ]

    def files(self) -> str:
        """What differs in the files of the two folders, first of all."""
        listed = [sorted(path.name for path in side.iterdir()) for side in self.sides]
        if listed[0] != listed[1]:
            return f"files: qemu-img has {listed[0]}, safeimg has {listed[1]}"
        changed = self._changed()
        ciphertext = {outside for name in changed if (outside := _encrypted_outside(self.sides[1] / name))}
        for name in changed:
            one, two = (side / name for side in self.sides)
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (one, two)]
            if modes[0] != modes[1]:
                return f"{name}: mode {modes[0]:o}, not {modes[1]:o}"
            if name in ciphertext:  # of another key
                continue
            if not _same(one, two) and (wrong := self._image(name)):
                return f"{name}: {wrong}"
        return ""

    def _image(self, name: str) -> str:
        """What qemu-img finds different in the two files of a name."""
        both = [side / name for side in self.sides]
        found = [_info(path) for path in both]
        if name.endswith(".data"):  # qemu-img fills the last cluster up (docs/design.md)
            for info in found:
                if isinstance(info, dict):
                    info["virtual-size"] = -(-info["virtual-size"] // CLUSTER)
        texts = [self._mask(json.dumps(info, indent=1, sort_keys=True), True) for info in found]
        if texts[0] != texts[1]:
            return f"info of qemu-img's:\n{texts[0]}\ninfo of safeimg's:\n{texts[1]}"
        checks = [_check(path) for path in both]
        # qemu-img leaks clusters here and there (shrinking an image that has a machine's state, say).
        if any(checks[1][1].get(key, 0) > checks[0][1].get(key, 0) for key in checks[1][1]) or (
            checks[1][0] not in (0, checks[0][0])
        ):
            return f"check of qemu-img's: {checks[0]}\ncheck of safeimg's: {checks[1]}"
        encrypted = '"encrypted": true' in texts[0]
        outside = re.search(r'"data-file": "([^"]*)"', texts[0])
        words = [images.opening(str(path)) if encrypted else str(path) for path in both]
        if outside is not None:
            words = [
                f"driver=qcow2,file.filename={path},data-file.filename={path.parent / outside[1]}" for path in both
            ]
        opened = ("--image-opts", *images.SECRET) if encrypted or outside is not None else ()
        compared = _run("compare", "-U", *opened, *words)
        if compared.returncode == 1:
            return compared.stdout.decode(errors="replace").strip()
        if not opened and compared.returncode == 0:
            return _snapshots(both, [entry["id"] for entry in json.loads(texts[0]).get("snapshots", ())])
        return ""


def _snapshots(both: Sequence[Path], ids: Sequence[str]) -> str:
    """Which snapshot shows something else in the second of the images."""
    for number in ids:
        shown = []
        for path in both:
            raw = path.with_name("snapshot.raw")
            done = _run("convert", "-U", "-l", f"snapshot.id={number}", "-O", "raw", str(path), str(raw))
            shown.append((done.returncode, raw.read_bytes() if raw.exists() else b""))
            raw.unlink(missing_ok=True)
        if shown[0] != shown[1]:
            return f"snapshot {number} differs"
    return ""


def _contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:  # which may be large, with holes
                found[path.name] = file_digest(file, "blake2b").digest()
    return found


def _same(one: Path, two: Path) -> bool:
    if not (one.is_file() and two.is_file()):
        return False
    return filecmp.cmp(one, two, shallow=False)


def _outcomes(expected: Outcome, answer: Outcome) -> str:
    if expected == answer:
        return ""
    return "\n".join(
        f"  {name}: qemu-img {wanted!r}\n  {' ' * len(name)}  safeimg  {got!r}"
        for name, wanted, got in zip(("exit", "stdout", "stderr"), expected, answer, strict=True)
        if wanted != got
    )


def _info(path: Path) -> Any:
    done = _run("info", "-U", "--output=json", path.name, folder=path.parent)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.decode(errors="replace")


def _encrypted_outside(path: Path) -> str:
    """The data file of an encrypted image."""
    info = _info(path)
    found = info if isinstance(info, dict) and info.get("encrypted") else {}
    return str(found.get("format-specific", {}).get("data", {}).get("data-file", ""))


def _check(path: Path) -> tuple[int, dict[str, int]]:
    """The exit code and the counts of what is wrong."""
    done = _run("check", "-U", "--output=json", path.name, folder=path.parent)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    return done.returncode, {
        key: found[key] for key in ("leaks", "corruptions", "check-errors") if key in found
    }


def _run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["qemu-img", *arguments], capture_output=True, timeout=30, cwd=folder)
