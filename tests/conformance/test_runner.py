"""The conformance runner itself, on an archive made here: no network, and none of QEMU's cases."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conformance import harness, listing, run, source
from conformance.harness import Outcome, Status

CHECK = """\
import os, pathlib, subprocess, sys
case = sys.argv[-1]
bad = pathlib.Path(os.environ["TEST_DIR"], case + ".out.bad")
bad.parent.mkdir()
done = subprocess.run(["./" + case], capture_output=True, text=True)
bad.write_text(done.stdout)
expected = pathlib.Path(case + ".out").read_text()
if done.returncode == 77:
    bad.with_name(case + ".notrun").write_text("no such thing\\n")
    print("ok raw", case, "# SKIP")
elif done.stdout == expected:
    print("ok raw", case)
else:
    print("not ok raw", case)
    print("-" + expected + "+" + done.stdout, file=sys.stderr)
"""

CASES = {
    "001": "true",  # not listed
    "002": "$QEMU_IMG_PROG --version; touch here",
    "004": "echo other",
    "008": "exit 77",
    "010": "sleep 60",
    "012": "$QEMU_PROG -nodefaults -drive format=help | sed -n 's/Supported formats://p'",
}
EXPECTED = {"001": "", "002": "fake 1\n", "004": "this\n", "008": "", "010": "", "012": " raw fake\n"}


@pytest.fixture
def iotests(tmp_path: Path) -> Path:
    archive = tmp_path / "package.tar.xz"
    with tarfile.open(archive, "w:xz") as members:
        def add(name: str, text: str, mode: int = 0o644) -> None:
            member = tarfile.TarInfo(f"qemu-7.2.0/{name}")
            member.size, member.mode = len(text), mode
            members.addfile(member, io.BytesIO(text.encode()))

        add("qemu-img.c", "source")
        add("tests/qemu-iotests/check", CHECK, 0o755)
        add("tests/qemu-iotests/sample_images/a.bz2", "sample")
        add("tests/qemu-iotests/tests/named", "#!/bin/sh\n", 0o755)
        add("tests/qemu-iotests/tests/other", "#!/bin/sh\n", 0o755)
        add("tests/qemu-iotests/../../002", "outside")
        for case, text in CASES.items():
            add(f"tests/qemu-iotests/{case}", f"#!/bin/sh\n{text}\n", 0o755)
            add(f"tests/qemu-iotests/{case}.out", EXPECTED[case])
    folder = tmp_path / "iotests"
    source.unpack(archive, frozenset(CASES) - {"001"} | {"named"}, folder)
    return folder


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> harness.Tools:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("qemu-io", "qemu-nbd"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    fake = tmp_path / "fake"
    fake.write_text('#!/bin/sh\n[ $1 = --help ] && echo "Supported formats: raw fake" || echo fake 1\n')
    fake.chmod(0o755)
    folder = tmp_path / "tools"
    folder.mkdir()
    return harness.prepare(folder, fake)


def test_the_list_names_the_formats_of_safeimg() -> None:
    listed = listing.read()
    assert {"raw", "qcow2"} <= listed.keys()
    chosen = run.choose(listed, [], [])
    assert {name for name, _ in chosen} == {name for name in listed if name in run.registry.names()}
    assert run.choose(listed, ["raw"], ["162", "002", "014"]) == [("raw", "002"), ("raw", "162")]


@pytest.mark.parametrize(
    ("formats", "cases"), [(["raw"], ["001"]), (["zip"], []), ([], ["../002"]), (["raw"], ["014"])]
)
def test_nothing_outside_of_the_list_is_chosen(formats: list[str], cases: list[str]) -> None:
    with pytest.raises(ValueError, match="listed"):
        run.choose(listing.read(), formats, cases)


@pytest.mark.parametrize("line", ["raw", "raw ../002", "raw 002\nraw 004", "raw 2"])
def test_a_damaged_list_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(ValueError, match="not a format"):
        listing.read(path)


def test_only_listed_cases_are_unpacked(iotests: Path) -> None:
    unpacked = {str(path.relative_to(iotests)) for path in iotests.rglob("*") if path.is_file()}
    cases = {name for case in CASES if case != "001" for name in (case, f"{case}.out")}
    assert unpacked == cases | {"check", "sample_images/a.bz2", "tests/named"}


def test_what_becomes_of_a_case(iotests: Path, tools: harness.Tools) -> None:
    def outcome(case: str, timeout: float = 60) -> Outcome:
        return harness.run(iotests, tools, "raw", case, timeout)

    assert outcome("002").status is Status.PASSED
    assert not (iotests / "here").exists()  # a case runs in a copy
    failed = outcome("004")
    assert (failed.status, failed.output) == (Status.FAILED, b"other\n")
    assert failed.diff == "-this\n+other\n\n"
    skipped = outcome("008")
    assert (skipped.status, skipped.reason) == (Status.NOT_RUN, "no such thing")
    late = outcome("010", timeout=1)
    assert (late.status, late.reason) == (Status.FAILED, "killed after 1 s")
    assert outcome("012").status is Status.PASSED


def test_safeimg_is_run_as_qemu_img(tmp_path: Path, tools: harness.Tools) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    own = harness.prepare(folder, None)
    done = subprocess.run([own.image, "frobnicate"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "qemu-img: Command not found: frobnicate")
    assert own.image.read_text().startswith(f"#!{sys.executable}\n")


def test_a_check_that_says_nothing_has_failed() -> None:
    assert harness.judge("# nothing\n1..1\n") == (Status.FAILED, "check gave no result")


def test_what_failed_is_kept_until_it_passes(tmp_path: Path) -> None:
    run.keep(Outcome("raw", "002", Status.FAILED, 1.0, "differs", "-a\n+b\n", b"b\n"), tmp_path)
    assert (tmp_path / "raw/002.out.bad").read_bytes() == b"b\n"
    assert (tmp_path / "raw/002.diff").read_text() == "-a\n+b\n"
    run.keep(Outcome("raw", "002", Status.PASSED, 1.0), tmp_path)
    assert list((tmp_path / "raw").iterdir()) == []


def test_the_table() -> None:
    outcomes = [
        Outcome("raw", "004", Status.FAILED, 1.0),
        Outcome("raw", "002", Status.FAILED, 1.0),
        Outcome("raw", "162", Status.NOT_RUN, 1.0),
        Outcome("vdi", "002", Status.PASSED, 1.0),
    ]
    assert run.table(outcomes).splitlines()[1:] == [
        "format      passed  failed  not run  cases",
        "raw              0       2        1      3",
        "vdi              1       0        0      1",
        "",
        "raw failed: 002 004",
        "raw not run: 162",
    ]


def test_no_package_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(source.Unavailable, match="apt-get"):
        source.iotests(frozenset({"002"}), cache=tmp_path / "cache")
