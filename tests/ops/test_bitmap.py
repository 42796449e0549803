"""bitmap: rows of actions, the same as qemu-img's; the bits of both are read by the driver's own reader."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from qcow2_images import needs_qemu, qemu_io, run
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.storage.file import LocalFileSystem
from twin import Outcome, qemu_img, safeimg, words

pytestmark = needs_qemu

NODE = re.compile(rb"#block\d+")


def bitmaps(path: Path) -> list[tuple[object, bytes]]:
    """States and bits of all bitmaps; of inconsistent ones without bits."""
    chain = open_chain(LocalFileSystem(), str(path), backing=False)
    try:
        feature = lookup(chain[0].format).bitmaps
        assert feature is not None
        return [
            (state, b"" if state.inconsistent else feature.bits(chain[0], state.name).read(0, chain[0].size >> 12))
            for state in feature.listed(chain[0])
        ]
    finally:
        close_chain(chain)


def masked(outcome: Outcome) -> Outcome:
    return Outcome(outcome.code, NODE.sub(b"#block", outcome.stdout), NODE.sub(b"#block", outcome.stderr))


def create(path: Path, size: str, **options: str) -> None:
    given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    assert run("qemu-img", "create", "-q", "-f", "qcow2", *given, path, size).returncode == 0


def abandoned(path: Path) -> None:
    """The image as QEMU leaves it when it is killed: its enabled bitmaps are inconsistent."""
    run("qemu-io", "-f", "qcow2", "-c", "abort", path)


class Twins:
    """The same images twice: one folder for each program."""

    def __init__(self, folder: Path) -> None:
        self.own, self.qemu = folder / "own", folder / "qemu"
        self.own.mkdir()

    def begin(self) -> None:
        shutil.copytree(self.own, self.qemu)

    def both(self, line: str, image: str = "a") -> int:
        """Runs it with both. Where it fails nothing is changed here; qemu-img keeps what came before the failure."""
        before, kept = (self.own / image).read_bytes(), (self.qemu / image).read_bytes()
        expected = masked(qemu_img(words(line), self.qemu))
        assert masked(safeimg(words(line), self.own, name="qemu-img")) == expected, line
        if expected.code:
            assert (self.own / image).read_bytes() == before
            (self.qemu / image).write_bytes(kept)
        else:
            assert bitmaps(self.own / image) == bitmaps(self.qemu / image), line
            found = run("qemu-img", "check", "-U", self.own / image)
            assert found.returncode == 0 or "nowhere" in found.stderr, (line, found.stdout)
        return expected.code


@pytest.fixture
def twins(tmp_path: Path) -> Twins:
    return Twins(tmp_path)


LINES = [
    "bitmap a b", "bitmap --add a", "bitmap --add a b c", "bitmap --add -g 0 a n", "bitmap --add -g 3 a n",
    "bitmap --add -g 256 a n", "bitmap --add -g 4G a n", "bitmap --add -g 2G a n", "bitmap --add -g 8E a n",
    "bitmap --add -g x a n", "bitmap --clear -g 64k a b", "bitmap --add -b o a n", "bitmap --add -F raw a n",
    "bitmap --add a b", "bitmap --add --add a n", "bitmap --add a ''", f"bitmap --add a {'n' * 1023}",
    f"bitmap --add a {'n' * 1024}", "bitmap --add missing n", "bitmap --add -f foo a n", "bitmap --add -f raw r n",
    "bitmap --clear -f raw r n", "bitmap --add --image-opts -f qcow2 a n", "bitmap --add -q a n", "bitmap --merge",
    "bitmap --add --image-opts driver=qcow2,file.filename=a n", "bitmap --ad a n", "bitmap --add old n",
    "bitmap --clear old n", "bitmap --add zero n", "bitmap --add -g 512 huge n", "bitmap --add -g 2k huge n",
    "bitmap --remove a n", "bitmap --clear a n", "bitmap --enable a n", "bitmap --disable a n",
    "bitmap --merge b a n", "bitmap --merge n a b", "bitmap --merge b a b", "bitmap --merge n -b missing a b",
    "bitmap --add --merge n -b missing a n", "bitmap --merge b -b old a b", "bitmap --merge b -b r a b",
    "bitmap --merge b -b r -F foo a b", "bitmap --merge b -b a a b", "bitmap --merge b -b o a b",
    "bitmap --merge b -b larger a b", "bitmap --clear lost x", "bitmap --enable lost x", "bitmap --disable lost x",
    "bitmap --add lost x", "bitmap --merge y lost x", "bitmap --add lost n", "bitmap --remove --add lost x",
    "bitmap --merge x -b lost a b", "bitmap --add --merge b --remove a n", "bitmap --remove --disable a b",
    "bitmap --remove --add --disable --merge off a b", "bitmap --disable --enable --enable a b",
    "bitmap --add lost-base n", "bitmap --add --merge n -b lost-base a m", "bitmap --format qcow2 --add a n",
    "bitmap --add --source-file o --merge b a n", "bitmap --add --sou o --merge b a n",
    "bitmap --add --granularity 1M a n", "bitmap --add --object foo a n", "bitmap --enable a b",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    create(folder / "a", "1M")
    for name, options in (("b", ()), ("off", ("--disable", "-g", "512"))):
        run("qemu-img", "bitmap", "--add", *options, folder / "a", name)
    qemu_io(folder / "a", "write 0 100k", "write 500k 1k")
    shutil.copy(folder / "a", folder / "o")
    qemu_io(folder / "o", "write 700k 100k")
    shutil.copy(folder / "a", folder / "lost")
    run("qemu-img", "bitmap", "--add", folder / "lost", "x")
    abandoned(folder / "lost")
    run("qemu-img", "bitmap", "--add", folder / "lost", "y")
    create(folder / "larger", "2M")
    run("qemu-img", "bitmap", "--add", folder / "larger", "b")
    create(folder / "old", "1M", compat="0.10")
    create(folder / "zero", "0")
    create(folder / "huge", "8T")
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "nowhere", "-F", "qcow2", folder / "lost-base", "1M")
    (folder / "r").write_bytes(bytes(1 << 20))
    return folder


@pytest.mark.parametrize("line", LINES)
def test_one_line(line: str, images: Path, twins: Twins) -> None:
    image = next((word for word in words(line) if (images / word).exists() and word not in ("o", "b")), "a")
    if "--image-opts" in line or " -b " in line:
        image = "a"
    names = {word.rpartition("=")[2] for word in words(line)} & {path.name for path in images.iterdir()} | {"a", image}
    for name in names:
        shutil.copy(images / name, twins.own / name)
    twins.begin()
    if image in ("r", "old", "zero"):  # nothing of it is a bitmap, and nothing becomes one
        before = (twins.own / image).read_bytes()
        expected = masked(qemu_img(words(line), twins.qemu))
        assert masked(safeimg(words(line), twins.own, name="qemu-img")) == expected
        assert (twins.own / image).read_bytes() == before
    else:
        twins.both(line, image)
    assert {path.name for path in twins.own.iterdir()} == names


@pytest.mark.parametrize(("seed", "cluster"), [(1, "512"), (2, "4k"), (3, "64k"), (4, "2M")])
def test_rows_of_actions(seed: int, cluster: str, twins: Twins) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1 << 11, 1 << 13) * 512
    create(twins.own / "a", str(size), cluster_size=cluster)
    create(twins.own / "o", str(size), cluster_size=rng.choice(["512", "64k"]))
    for name in ("b", "c"):
        run("qemu-img", "bitmap", "--add", "-g", rng.choice(["512", "4k", "1M"]), twins.own / "o", name)
    twins.begin()
    succeeded = 0
    for _ in range(8):
        there = [state.name for state, _ in bitmaps(twins.own / "a")]  # type: ignore[attr-defined]
        name, other = rng.choice("abcd"), rng.random() < 0.5
        merge = f"--merge {rng.choice(['b', 'c'] if other else there or ['a'])}"
        if name in there:
            actions = rng.sample([merge, merge, "--clear", "--enable", "--disable", "--remove"], 2)
        else:
            actions = ["--add", f"-g {512 << rng.randrange(14)}" if rng.random() < 0.7 else "", merge]
        line = f"bitmap {' '.join(actions)} {'-b o' if other and merge in actions else ''} a {name}"
        succeeded += twins.both(line) == 0
        start = rng.randrange(size // 512) * 512
        length = min(rng.choice([512, 4096, 1 << 20]), size - start)
        for folder in (twins.own, twins.qemu):
            qemu_io(folder / "a", f"write {start} {length}")
            qemu_io(folder / "o", f"write {size - start - length} {length}")
    assert succeeded >= 3


@pytest.mark.parametrize("cluster", ["4k", "64k", "2M"])
def test_the_file_gets_as_long_as_qemu_makes_it(cluster: str, twins: Twins) -> None:
    """But for what a page of the directory leaves. `measure` goes by that length for whoever takes the file as raw."""
    create(twins.own / "a", "1G", cluster_size=cluster)
    twins.begin()
    for name in "bcd":
        twins.both(f"bitmap --add a {name}")
        lengths = [(folder / "a").stat().st_size for folder in (twins.own, twins.qemu)]
        assert lengths[0] == -(-lengths[1] // 4096) * 4096


def test_the_extension_moves_and_names_stay(tmp_path: Path) -> None:
    """A header without room in its first sector; a backing file's name behind it; names that are no UTF-8."""
    path = tmp_path / "a"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "x" * 900, "-F", "qcow2", path, "1M")
    for name in ("é\udcff", "plain"):
        assert safeimg(["bitmap", "--add", "a", name], tmp_path).code == 0
        found = json.loads(run("qemu-img", "info", "-U", "--output=json", path).stdout)
        assert found["backing-filename"] == "x" * 900
    assert [state.name for state, _ in bitmaps(path)] == ["é\udcff", "plain"]  # type: ignore[attr-defined]
    assert safeimg(["bitmap", "--remove", "a", "é\udcff"], tmp_path).code == 0
    assert safeimg(["bitmap", "--remove", "a", "plain"], tmp_path).code == 0
    found = json.loads(run("qemu-img", "info", "-U", "--output=json", path).stdout)
    assert found["backing-filename"] == "x" * 900
    assert "bitmaps" not in found["format-specific"]["data"]


def test_a_damaged_table_stops_it_before_anything_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "a"
    create(path, "1M")
    run("qemu-img", "bitmap", "--add", path, "b")
    chain = open_chain(LocalFileSystem(), str(path), write=True)
    table = chain[0].bitmaps[0].bitmap_table_offset  # type: ignore[attr-defined]
    chain[0].file.pwrite(table, b"\xff" * 8)
    close_chain(chain)
    before = path.read_bytes()
    for line in ("--remove a b", "--clear a b", "--add --merge b a c"):
        outcome = safeimg(["bitmap", *line.split()], tmp_path)
        assert outcome.code == 1 and b"invalid" in outcome.stderr
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


CONVERSIONS = [
    "-O qcow2 a t", "-O qcow2 -o compat=0.10 a t", "-O raw a t", "-O vdi a t", "-O foo a t", "-O qcow2 r t",
    "-O qcow2 a a t", "-O qcow2 r r t", "-O raw missing t", "-O qcow2 lost t", "-O raw lost t", "-O qcow2 old t",
    "--skip-broken-bitmaps -O qcow2 lost t", "-O qcow2 -o foo=bar lost t", "-O qcow2 -B nowhere lost t",
    "-O qcow2 -n a larger", "-O qcow2 -n a o", "-O qcow2 -n lost o", "-O qcow2 -n a old", "-O qcow2 -n a missing",
    "-O qcow2 -n a bare", "-O qcow2 -c -o cluster_size=4k a t", "-O qcow2 -o cluster_size=2M a t", "-n -O qcow2 a r",
    "-n --target-image-opts a driver=raw,file.filename=r", "-O qcow2 -l none a t", "-O qcow2 a nowhere/t",
]  # fmt: skip


@pytest.mark.parametrize("line", CONVERSIONS)
def test_convert(line: str, images: Path, tmp_path: Path) -> None:
    own, qemu = tmp_path / "own", tmp_path / "qemu"
    shutil.copytree(images, own)
    create(own / "bare", "1M")
    shutil.copytree(own, qemu)
    command = ["convert", "--bitmaps", *line.split()]
    expected = masked(qemu_img(command, qemu))
    assert masked(safeimg(command, own, name="qemu-img")) == expected
    target = line.split()[-1]
    if expected.code == 0:
        assert bitmaps(own / target) == bitmaps(qemu / target)
        assert run("qemu-img", "check", own / target).returncode == 0
        assert run("qemu-img", "compare", own / target, qemu / target).returncode == 0
    else:  # nothing is changed here, and nothing left behind
        for path in images.iterdir():
            assert (own / path.name).read_bytes() == path.read_bytes()
        assert {path.name for path in own.iterdir()} == {path.name for path in images.iterdir()} | {"bare"}


WRITERS = [
    "convert -n -O qcow2 src a", "convert -n --target-is-zero -O qcow2 src a", "convert -n -O qcow2 half a",
    "convert -n -B base -F qcow2 -O qcow2 on-base a-on-base", "convert -n -O qcow2 on-base a-on-base",
    "commit -q on-a", "rebase -b other -F qcow2 a-on-base", "rebase -b '' a-on-base",
]  # fmt: skip


@pytest.mark.parametrize("line", WRITERS)
def test_what_other_commands_write_is_recorded(line: str, twins: Twins) -> None:
    """Each bit that QEMU sets is set; where a bit stands for a cluster, no other is, but for what only a look into the
    data tells (zeroes)."""
    for name, size, writes in (
        ("src", "1M", ["write 0 100k", "write -z 500k 100k", "write 900k 1k"]), ("half", "512k", ["write 70k 1k"]),
        ("base", "1M", ["write 700k 10k"]), ("other", "1M", ["write 0 10k"]), ("a", "1M", ["write 10k 10k"]),
    ):  # fmt: skip
        create(twins.own / name, size)
        qemu_io(twins.own / name, *writes)
    for name, backing, writes in (
        ("on-base", "base", ["write 0 100k", "write -z 500k 100k"]), ("a-on-base", "base", ["write 300k 1k"]),
        ("on-a", "a", ["write 10k 100k", "write -z 500k 100k", "write 900k 1k", "discard 640k 64k"]),
    ):  # fmt: skip
        create(twins.own / name, "1M", backing_file=backing, backing_fmt="qcow2")
        qemu_io(twins.own / name, *writes)
    target = "a" if line.startswith("commit") else line.split()[-1]
    for name, granularity in (("clusters", "64k"), ("pages", "4k")):
        run("qemu-img", "bitmap", "--add", "-g", granularity, twins.own / target, name)
    twins.begin()
    assert safeimg(words(line), twins.own, name="qemu-img") == qemu_img(words(line), twins.qemu)
    (_, coarse), (_, fine) = bitmaps(twins.own / target)
    (_, coarse_expected), (_, fine_expected) = bitmaps(twins.qemu / target)
    assert coarse == coarse_expected and any(coarse)
    assert all(theirs & ~ours == 0 for ours, theirs in zip(fine, fine_expected, strict=True))
