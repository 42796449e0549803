"""recover, --on-crash, --if-pending and --wait, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest
from faults.running import HELD, SLOW, Folder


def killed(folder: Folder, *own: str) -> None:
    """A commit killed half-way."""
    process = folder.begun(*SLOW[:1], *own, *SLOW[1:])
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert folder.base.read_bytes() not in (folder.old, folder.new)


def answer(folder: Folder, *words: str) -> tuple[int, str, str]:
    process = folder.start(*words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("policy", ["resume", "rollback"])
def test_recover_does_what_the_command_asked_for(folder: Folder, policy: str) -> None:
    killed(folder, f"--on-crash={policy}")
    assert json.loads(answer(folder, "status", "--all", "--output", "json")[1])[0]["on-crash"] == policy
    code, out, err = answer(folder, "recover", "--all", "--output", "json")
    assert (code, err) == (0, "")
    (found,) = json.loads(out)
    assert (found["command"], found["action"], found["outcome"]) == ("commit", policy, "done")
    assert folder.base.read_bytes() == (folder.new if policy == "resume" else folder.old)
    assert folder.left() == []
    assert answer(folder, "recover", "--all") == (0, "nothing is pending\n", "")


def test_recover_leaves_what_nobody_decided(folder: Folder) -> None:
    killed(folder)
    halfway = folder.base.read_bytes()
    code, out, err = answer(folder, "recover", "--all")
    assert (code, err) == (3, "")
    assert "neither resumed nor rolled back" in out
    assert folder.base.read_bytes() == halfway
    code, out, _ = answer(folder, "recover", "--scan", ".", "--policy", "rollback")
    assert code == 0
    assert folder.base.read_bytes() == folder.old and folder.left() == []


def test_the_environment_decides_where_the_command_line_cannot(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEIMG_ON_CRASH", "rollback")
    killed(folder)
    monkeypatch.delenv("SAFEIMG_ON_CRASH")
    assert answer(folder, "recover", "-q", "base.raw") == (0, "", "")
    assert folder.base.read_bytes() == folder.old
    monkeypatch.setenv("SAFEIMG_ON_CRASH", "perhaps")
    code, _, err = answer(folder, *SLOW)
    assert code == 1 and "SAFEIMG_ON_CRASH is 'perhaps'" in err


def test_recover_leaves_running_operations_and_foreign_owners_alone(folder: Folder) -> None:
    process = folder.begun(*HELD)
    code, out, _ = answer(folder, "recover", "--all", "--policy", "resume")
    assert (code, out) == (0, f"{os.path.realpath(folder.base)}: process {process.pid} is working on it\n")
    folder.stop(process)


def test_one_failure_does_not_keep_others_from_being_settled(folder: Folder) -> None:
    killed(folder, "--on-crash=resume")
    with folder.log.open("r+b") as log:
        log.write(b"junk")  # no log any more
    (folder.path / "next").mkdir()
    other = Folder(folder.path / "next")
    folder.processes += other.processes
    killed(other, "--on-crash=resume")
    code, out, err = answer(folder, "recover", "--scan", ".", "--output", "json")
    found = {entry["image"]: entry["outcome"] for entry in json.loads(out)}
    assert (code, err, sorted(found.values())) == (1, "", ["done", "failed"])
    assert other.base.read_bytes() == other.new


def test_if_pending_settles_that_operation_and_no_other(folder: Folder) -> None:
    killed(folder)
    (entry,) = json.loads(answer(folder, "status", "--output", "json", "base.raw")[1])
    operation = entry["operation"]
    other = ("0" if operation[0] != "0" else "1") + operation[1:]
    for verb in ("resume", "rollback", "abandon"):
        code, out, err = answer(folder, verb, "--if-pending", other, "--output", "json", "base.raw")
        assert (code, err, json.loads(out)["outcome"]) == (0, "", "nothing")
    assert folder.base.read_bytes() not in (folder.old, folder.new)
    assert answer(folder, "resume", "--if-pending", operation[:8].upper(), "base.raw")[0] == 0
    assert folder.base.read_bytes() == folder.new


def test_wait_for_whoever_works_on_the_image(folder: Folder) -> None:
    process = folder.begun(*HELD)
    code, _, err = answer(folder, "resume", "base.raw")
    assert code == 5 and "working on it" in err
    waiting = folder.start("rollback", "--wait", "60", "base.raw")
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (0, b"") and b"rolled back" in out
    assert folder.base.read_bytes() == folder.old


def test_waiting_for_a_command_ends_with_its_time(folder: Folder) -> None:
    process = folder.begun(*HELD)
    code, _, err = answer(folder, "rebase", "-u", "-F", "raw", "-b", "base.raw", "--wait=0.5", "top.qcow2")
    assert code != 0 and err.count("\n") == 1
    folder.stop(process)
    assert subprocess.run(["qemu-img", "check", "top.qcow2"], cwd=folder.path, capture_output=True).returncode == 0


def test_nobody_waits_for_what_was_interrupted(folder: Folder) -> None:
    killed(folder)
    started = time.monotonic()
    code, _, err = answer(folder, "rebase", "-u", "-F", "raw", "-b", "base.raw", "--wait=600", "top.qcow2")
    assert code != 0 and "safeimg resume" in err
    assert time.monotonic() - started < 300
