"""Command lines from a seed: the options of each command, most of them valid, on images of the kept set."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from differential.images import BROKEN, GOOD, format_of

Part = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A command and its parts; a part can be left out, and the line is one still."""

    command: str
    parts: tuple[Part, ...] = ()

    @property
    def words(self) -> list[str]:
        return [self.command, *(word for part in self.parts for word in part)]

    def __str__(self) -> str:
        return shlex.join(self.words)

    @classmethod
    def parse(cls, text: str) -> Line:
        command, *words = shlex.split(text)
        return cls(command, tuple((word,) for word in words))


SIZES = ("0", "1", "512", "1000", "64k", "100K", "700k", "1M", "1048576", "1.5M", "2M", "5M", "33M")
BAD_SIZES = ("", "x", "1Q", "-1", "1.5.5", "9E", "16E", "0x100", "1e6", " 1M", "1 M", "99999999999999999999")
FORMATS = ("raw", "qcow2", "vdi")
BAD_FORMATS = ("foo", "", "vmdk2", "QCOW2")
CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe", "foo")
CREATE_OPTIONS = (
    "compat=0.10", "compat=1.1", "compat=v3", "compat=2", "cluster_size=512", "cluster_size=4k", "cluster_size=2M",
    "cluster_size=4M", "cluster_size=1000", "cluster_size=0", "cluster_size=x", "refcount_bits=1",
    "refcount_bits=64", "refcount_bits=7", "refcount_bits=128", "preallocation=off", "preallocation=metadata",
    "preallocation=falloc", "preallocation=full", "preallocation=foo", "lazy_refcounts=on", "lazy_refcounts=off",
    "lazy_refcounts=maybe", "compression_type=zlib", "compression_type=zstd", "compression_type=lz4",
    "extended_l2=on", "extended_l2=off", "data_file=new.data", "data_file_raw=on", "nocow=on", "nocow=off",
    "encryption=off", "static=on", "static=off", "size=2M", "size=x", "foo=bar", "foo", "help", "?", "",
    "backing_fmt=qcow2", "backing_fmt=raw", "backing_file=plain.qcow2", "backing_file=nowhere",
)  # fmt: skip
AMEND_OPTIONS = (
    "compat=0.10", "compat=1.1", "compat=foo", "lazy_refcounts=on", "lazy_refcounts=off", "lazy_refcounts=x",
    "refcount_bits=1", "refcount_bits=8", "refcount_bits=16", "refcount_bits=64", "refcount_bits=3", "size=2M",
    "size=512k", "size=1M", "size=x", "data_file_raw=on", "data_file_raw=off", "data_file=x", "backing_file=x",
    "backing_file=plain.qcow2", "backing_fmt=raw", "cluster_size=4k", "preallocation=full", "help", "foo=bar",
    "compression_type=zstd", "compression_type=zlib", "extended_l2=on", "encryption=on", "",
)  # fmt: skip
NEW = ("new.qcow2", "new.raw", "new.vdi", "nowhere/new.img")
# No -h: safeimg's help is its own.
ODD = (("--foo",), ("-Z",), ("--object", "foo"), ("--object", "secret,id=s"), ("surplus",), ("--",))


class Generator:
    """Lines from a random source: the same source, the same lines."""

    def __init__(self, rng: Random, commands: tuple[str, ...] | None = None) -> None:
        self.rng = rng
        self.commands = [name for name in COMMANDS if commands is None or name in commands]

    def case(self) -> list[Line]:
        """One to three lines that follow one another on the same images."""
        return [self.line() for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3)))]

    def line(self) -> Line:
        command = self.rng.choice(self.commands)
        parts = COMMANDS[command](self)
        if self.maybe(0.04):
            parts.insert(self.rng.randrange(len(parts) + 1), self.rng.choice(ODD))
        if parts and self.maybe(0.03):
            parts.pop(self.rng.randrange(len(parts)))
        return Line(command, tuple(part for part in parts if part))

    def maybe(self, chance: float = 0.3) -> bool:
        return self.rng.random() < chance

    def image(self) -> str:
        if self.maybe(0.15):
            return self.rng.choice((*BROKEN, "missing.qcow2", *NEW))
        return self.rng.choice(GOOD)

    def size(self) -> str:
        return self.rng.choice(BAD_SIZES if self.maybe(0.12) else SIZES)

    def format(self) -> str:
        return self.rng.choice(BAD_FORMATS if self.maybe(0.08) else FORMATS)

    def said(self, letter: str, image: str, chance: float = 0.3) -> Part:
        """-f, -F: mostly the image's own format."""
        if not self.maybe(chance):
            return ()
        return (letter, self.format() if self.maybe(0.25) else format_of(image))

    def flag(self, *words: str, chance: float = 0.3) -> Part:
        return words if self.maybe(chance) else ()

    def of(self, letter: str, values: tuple[str, ...], chance: float = 0.3) -> Part:
        return (letter, self.rng.choice(values)) if self.maybe(chance) else ()

    def options(self, values: tuple[str, ...], most: int = 3) -> list[Part]:
        """-o, with one to three settings, in one word or in several."""
        chosen = [self.rng.choice(values) for _ in range(self.rng.randint(1, most))]
        if self.maybe(0.7):
            return [("-o", ",".join(chosen))]
        return [("-o", one) for one in chosen]

    def create(self) -> list[Part]:
        parts = [("-f", self.format()) if self.maybe(0.9) else (), self.flag("-q", chance=0.1)]
        if self.maybe(0.6):
            parts += self.options(CREATE_OPTIONS)
        if self.maybe(0.3):
            backing = self.image()
            parts += [("-b", backing), self.said("-F", backing, 0.85), self.flag("-u", chance=0.2)]
        return [
            *parts,
            (self.rng.choice((*NEW, *NEW, self.image())),),
            (self.size(),) if self.maybe(0.8) else (),
        ]

    def info(self) -> list[Part]:
        image = self.image()
        return [self.said("-f", image), self.of("--output", ("json", "human", "xml")),
                self.flag("--backing-chain"), self.flag("-U"), (image,)]  # fmt: skip

    def check(self) -> list[Part]:
        image = self.rng.choice(BROKEN) if self.maybe() else self.image()
        return [self.said("-f", image), self.of("--output", ("json", "human", "xml")), self.flag("-q"),
                self.of("-r", ("leaks", "all", "foo"), 0.5), self.of("-T", CACHES, 0.1), (image,)]  # fmt: skip

    def map(self) -> list[Part]:
        image = self.image()
        return [self.said("-f", image), self.of("--output", ("json", "human", "xml")), self.flag("-U"),
                ("--start-offset", self.size()) if self.maybe() else (),
                ("--max-length", self.size()) if self.maybe() else (), (image,)]  # fmt: skip

    def measure(self) -> list[Part]:
        parts = [
            ("-O", self.format()) if self.maybe(0.8) else (),
            self.of("--output", ("json", "human", "xml")),
        ]
        if self.maybe(0.5):
            parts += self.options(CREATE_OPTIONS)
        if self.maybe():
            return [*parts, ("--size", self.size())]
        image = self.image()
        return [
            *parts,
            self.said("-f", image),
            self.of("-l", ("first", "1", "snapshot.name=first"), 0.1),
            (image,),
        ]

    def compare(self) -> list[Part]:
        one, other = self.image(), self.image()
        return [self.said("-f", one), self.said("-F", other), self.flag("-s"), self.flag("-q"), self.flag("-p"),
                self.flag("-U", chance=0.1), self.of("-T", CACHES, 0.1), (one,), (other,)]  # fmt: skip

    def convert(self) -> list[Part]:
        sources = [self.image() for _ in range(self.rng.choice((1, 1, 1, 1, 2)))]
        target = self.rng.choice((*NEW, *NEW, self.image()))
        parts = [
            self.said("-f", sources[0]), ("-O", self.format()) if self.maybe(0.9) else (), self.flag("-c", chance=0.15),
            self.flag("-n", chance=0.1), self.flag("-q", chance=0.1), self.flag("-W", chance=0.1),
            self.of("-S", ("0", "4k", "64k", "1", "x", "-1"), 0.15), self.of("-m", ("1", "16", "17", "0"), 0.1),
            self.of("-t", CACHES, 0.1), self.of("-T", CACHES, 0.1), self.flag("--target-is-zero", chance=0.05),
            self.of("-l", ("first", "2", "snapshot.name=first", "snapshot.id=2", "nope"), 0.1),
            self.flag("--bitmaps", chance=0.1), self.flag("--skip-broken-bitmaps", chance=0.05),
            self.flag("--salvage", chance=0.05), self.flag("-C", chance=0.05), self.of("-r", ("1G", "x"), 0.05),
        ]  # fmt: skip
        if self.maybe(0.3):
            parts += self.options(CREATE_OPTIONS, 2)
        if self.maybe(0.15):
            backing = self.image()
            parts += [(self.rng.choice(("-B", "-b")), backing), self.said("-F", backing, 0.8)]
        return [*parts, *((source,) for source in sources), (target,)]

    def commit(self) -> list[Part]:
        image = self.rng.choice(("mid.qcow2", "top.qcow2", "on-raw.qcow2", "on-vdi.qcow2", self.image()))
        return [self.said("-f", image), self.flag("-d"), self.flag("-q", chance=0.1), self.flag("-p", chance=0.1),
                self.of("-b", ("plain.qcow2", "mid.qcow2", "nope"), 0.25), self.of("-t", CACHES, 0.1),
                self.of("-r", ("1G", "x"), 0.05), (image,)]  # fmt: skip

    def rebase(self) -> list[Part]:
        image = self.rng.choice(("mid.qcow2", "top.qcow2", "on-raw.qcow2", "on-vdi.qcow2", self.image()))
        backing = self.rng.choice(("", "plain.qcow2", self.image()))
        # Not with a wrong format: qemu-img takes a file of the old chain for what it is there, and changes the content.
        said = ("-F", self.rng.choice((format_of(backing), format_of(backing), "foo", "")))
        if self.maybe(0.15):
            said = ()
        return [self.said("-f", image), self.flag("-u"), self.flag("-p", chance=0.1), self.flag("-q", chance=0.1),
                self.of("-t", CACHES, 0.1), self.of("-T", CACHES, 0.1), ("-b", backing), said, (image,)]  # fmt: skip

    def resize(self) -> list[Part]:
        image = self.image()
        size = self.rng.choice(("", "", "", "+", "-", "++")) + self.size()
        return [self.said("-f", image, 0.8), self.flag("--shrink", chance=0.4), self.flag("-q", chance=0.1),
                self.of("--preallocation", ("off", "metadata", "falloc", "full", "foo"), 0.2),
                (image,), (size,)]  # fmt: skip

    def snapshot(self) -> list[Part]:
        image = self.rng.choice(("snaps.qcow2", self.image()))
        actions = (("-l",), *((verb, name) for verb in ("-a", "-c", "-d") for name in
                   ("first", "second one", "1", "2", "new", "", "x" * 300)))  # fmt: skip
        parts = [self.rng.choice(actions) for _ in range(1 + self.maybe(0.05))]
        return [*parts, self.flag("-q", chance=0.1), self.flag("-U", chance=0.1), (image,)]

    def bitmap(self) -> list[Part]:
        image = self.rng.choice(("bitmaps.qcow2", "bitmaps.qcow2", self.image()))
        actions: list[Part] = [("--add",), ("--remove",), ("--clear",), ("--enable",), ("--disable",),
                               ("--merge", "b0"), ("--merge", "nope")]  # fmt: skip
        parts = [self.rng.choice(actions) for _ in range(self.rng.choice((1, 1, 1, 2, 3, 0)))]
        if self.maybe(0.1):
            parts += [("-b", "bitmaps.qcow2"), self.said("-F", "bitmaps.qcow2", 0.7)]
        name = self.rng.choice(("b0", "b1", "new", "", "y" * 1100))
        granularity = self.of("-g", ("512", "64k", "1k", "100", "x", "4G"), 0.2)
        return [*parts, granularity, self.said("-f", image), (image,), (name,)]

    def amend(self) -> list[Part]:
        image = self.image()
        return [self.said("-f", image), *(self.options(AMEND_OPTIONS, 2) if self.maybe(0.97) else []),
                self.flag("-p", chance=0.1), self.flag("-q", chance=0.1), self.of("-t", CACHES, 0.1),
                self.flag("--force", chance=0.1), (image,)]  # fmt: skip

    def dd(self) -> list[Part]:
        image = self.image()
        numbers = ("0", "1", "3", "16", "1k", "x", "-1")
        return [self.said("-f", image), ("-O", self.format()) if self.maybe(0.6) else (), self.flag("-U", chance=0.1),
                (f"if={image}",), (f"of={self.rng.choice((*NEW, *NEW, self.image()))}",),
                (f"bs={self.size()}",) if self.maybe(0.5) else (),
                (f"count={self.rng.choice(numbers)}",) if self.maybe() else (),
                (f"skip={self.rng.choice(numbers)}",) if self.maybe() else ()]  # fmt: skip


COMMANDS: dict[str, Callable[[Generator], list[Part]]] = {
    "create": Generator.create, "info": Generator.info, "check": Generator.check, "map": Generator.map,
    "measure": Generator.measure, "compare": Generator.compare, "convert": Generator.convert,
    "commit": Generator.commit, "rebase": Generator.rebase, "resize": Generator.resize,
    "snapshot": Generator.snapshot, "bitmap": Generator.bitmap, "amend": Generator.amend, "dd": Generator.dd,
}  # fmt: skip
