from __future__ import annotations

import os
from pathlib import Path

import pytest
from qcow2_images import FS, needs_qemu, qemu_img, run
from safeimg.drivers.errors import LockError, UsageError
from safeimg.drivers.formats.chain import (
    InfiniteLoop,
    OpenError,
    backing_filename,
    close_chain,
    local_path,
    open_chain,
    protocol,
)
from safeimg.drivers.formats.qcow2.create import create
from safeimg.drivers.formats.registry import lookup, names, probe


def make(path: Path | str, backing: str | None = None, backing_format: str | None = None) -> None:
    options = {"backing_file": backing, "backing_fmt": backing_format}
    create(FS, str(path), 1 << 20, {name: value for name, value in options.items() if value is not None})


def opened(filename: str, **options: bool) -> list[tuple[str, str, bool]]:
    images = open_chain(FS, filename, **options)  # type: ignore[arg-type]
    found = [(image.file.path, image.format, image.file.writable) for image in images]
    close_chain(images)
    return found


def message(filename: str, format: str | None = None) -> str:
    with pytest.raises(OpenError) as caught:
        open_chain(FS, filename, format=format)
    return str(caught.value)


def qemu_message(filename: str, *options: str) -> str:
    result = run("qemu-img", "convert", *options, "-O", "raw", filename, "/dev/null")
    assert result.returncode == 1
    return result.stderr.removeprefix("qemu-img: ").rstrip("\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    return tmp_path


def test_relative_names_start_at_the_overlay(folder: Path) -> None:
    Path("raw").write_bytes(bytes(4096))
    make("sub/base", "../raw", "raw")
    make("overlay", "sub/base", "qcow2")
    assert opened("overlay") == [
        ("overlay", "qcow2", False), ("sub/base", "qcow2", False), ("sub/../raw", "raw", False)
    ]
    assert [layer[0] for layer in opened(f"{folder}/overlay")][1] == f"{folder}/sub/base"
    assert opened("overlay", backing=False) == [("overlay", "qcow2", False)]
    assert [layer[0] for layer in opened("file:overlay")] == ["overlay", "sub/base", "sub/../raw"]


def test_a_name_with_a_protocol_starts_where_we_are(folder: Path) -> None:
    make("base")
    make("sub/overlay", "file:base", "qcow2")
    assert opened("sub/overlay")[1][0] == "base"


@pytest.mark.parametrize(
    ("overlay", "backing", "expected"),
    [
        ("a", "b", "b"), ("d/a", "b", "d/b"), ("d/a", "/b", "/b"), ("/d/a", "../b", "/d/../b"),
        ("d/a", "file:b", "file:b"), ("file:d/a", "b", "d/b"), ("d/a", "./x:y", "d/./x:y"),
    ],
)
def test_backing_filenames(overlay: str, backing: str, expected: str) -> None:
    assert backing_filename(overlay, backing) == expected


def test_protocols() -> None:
    assert [protocol(name) for name in ("nbd:x", "a/b:c", "./a:b", "json:{}", "plain")] == [
        "nbd", None, None, "json", None
    ]
    assert local_path("file:/x") == "/x"


def test_write_opens_the_top_or_what_is_asked_for(folder: Path) -> None:
    make("base")
    make("overlay", "base", "qcow2")
    assert [layer[2] for layer in opened("overlay", write=True)] == [True, False]
    images = open_chain(FS, "overlay", write=lambda depth, name: name == "base")
    assert [image.file.writable for image in images] == [False, True]
    close_chain(images)


def test_probing(folder: Path) -> None:
    make("image")
    Path("raw").write_bytes(b"not an image")
    Path("empty").touch()
    Path("version1").write_bytes(b"QFI\xfb\0\0\0\2"[:8])
    kinds = {}
    for name in ("image", "raw", "empty", "version1"):
        file = FS.open(name)
        kinds[name] = probe(file).name
        file.close()
    assert kinds == {"image": "qcow2", "raw": "raw", "empty": "raw", "version1": "qcow2"}
    assert set(names()) >= {"raw", "qcow2"}


@pytest.mark.parametrize(
    "head", [b"QFI\xfb\0\0\0\1", b"QED\0", b"KDMV", b"# Disk DescriptorFile\n", b"conectix", b"vhdxfile"],
)
def test_formats_that_are_not_handled_are_not_taken_for_raw(folder: Path, head: bytes) -> None:
    Path("foreign").write_bytes(head.ljust(4096, b"\0"))
    assert "images are not supported yet" in message("foreign")
    assert opened_as_raw("foreign") == 4096


def opened_as_raw(name: str) -> int:
    (image,) = open_chain(FS, name, format="raw")
    size = image.size
    image.close()
    return size


def test_a_guessed_raw_image_is_warned_of_when_written(folder: Path) -> None:
    Path("raw").write_bytes(bytes(4096))
    warnings: list[str] = []
    close_chain(open_chain(FS, "raw", warn=warnings.append))
    close_chain(open_chain(FS, "raw", format="raw", write=True, warn=warnings.append))
    assert not warnings
    close_chain(open_chain(FS, "raw", write=True, warn=warnings.append))
    assert warnings[0].startswith("Image format was not specified for 'raw' and probing guessed raw.\n")


def test_the_backing_format_decides(folder: Path) -> None:
    make("base")
    make("overlay", "base", "raw")
    assert [layer[1] for layer in opened("overlay")] == ["qcow2", "raw"]


@needs_qemu
def test_messages_are_those_of_qemu(folder: Path) -> None:
    make("missing", "nope", "qcow2")
    make("sub/deeper", "../missing", "qcow2")
    make("odd", "foo:base", "qcow2")
    Path("zeroes").write_bytes(bytes(65536))
    make("not", "zeroes", "qcow2")
    make("folder", "sub", "raw")
    for name in ("missing", "sub/deeper", "nope", "odd", "not", "folder", "foo:bar", "sub"):
        assert message(name) == qemu_message(name)
    assert message("zeroes", "qcow2") == qemu_message("zeroes", "-f", "qcow2")
    assert message("zeroes", "foo") == qemu_message("zeroes", "-f", "foo")


def test_other_protocols_are_refused_in_one_line(folder: Path) -> None:
    for name in ("iscsi://example.org/disk/0", "https://example.org/image"):
        text = message(name)
        assert text.startswith(f"Could not open '{name}': ") and "\n" not in text
        assert "not supported yet" in text


def test_endless_chains_are_found(folder: Path) -> None:
    make("a")
    make("b", "a", "qcow2")
    make("c", "b", "qcow2")
    os.link("c", "other")
    make("a", "sub/../other", "qcow2")
    with pytest.raises(InfiniteLoop, match=r"Backing file 'sub/../other' creates an infinite loop\."):
        open_chain(FS, "c")
    make("a", "a", "qcow2")
    with pytest.raises(InfiniteLoop):
        open_chain(FS, "a")


def test_long_chains_are_opened(folder: Path) -> None:
    make("0")
    for number in range(1, 200):
        make(str(number), str(number - 1), "qcow2")
    assert len(opened("199")) == 200


def test_everything_is_closed_on_errors(folder: Path) -> None:
    make("missing", "nope", "qcow2")
    make("overlay", "missing", "qcow2")
    before = len(os.listdir("/proc/self/fd"))
    message("overlay")
    assert len(os.listdir("/proc/self/fd")) == before


@needs_qemu
def test_locks_are_taken(folder: Path) -> None:
    make("base")
    make("overlay", "base", "qcow2")
    images = open_chain(FS, "overlay", write=True)
    result = run("qemu-img", "info", "overlay")
    assert result.returncode == 1 and "lock" in result.stderr
    assert run("qemu-img", "info", "base").returncode == 0
    with pytest.raises(OpenError) as caught:
        open_chain(FS, "overlay")
    assert isinstance(caught.value.__cause__, LockError)
    close_chain(open_chain(FS, "overlay", force_share=True))
    close_chain(images)
    assert qemu_img("check", "overlay")


def test_unknown_driver() -> None:
    with pytest.raises(UsageError, match="Unknown driver 'foo'"):
        lookup("foo")
