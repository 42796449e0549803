"""Command lines from a seed: the options of each command, most of them valid, on images of the kept set."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from differential.images import BROKEN, ENCRYPTED, GOOD, SECRET, UNCOUNTED, format_of, opening

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


SIZES = (
    "0", "1", "512", "1000", "64k", "100K", "700k", "1M", "1048576", "1.5M", "2M", "5M", "33M", "0.5k", "1.25M",
    "513", "2.0", "1e", "700000", "1b", "512B", "+1M", "0x800k", "1m",
)  # fmt: skip
BAD_SIZES = (
    "", "0.0001k", "1.k", "x", "1Q", "-1", "1.5.5", "9E", "16E", "0x100", "1e6", " 1M", "1 M",
    "99999999999999999999", "1Ki", "inf", "nan", "0x1p3", "18446744073709551615", "9223372036854775807",
    "9223372036854775808", "7E", "1,5M",
)  # fmt: skip
FORMATS = ("raw", "qcow2", "qcow2", "vdi", "luks")
BAD_FORMATS = ("foo", "", "vmdk2", "QCOW2")
CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe", "foo")
CREATE_OPTIONS = (
    "compat=0.10", "compat=1.1", "compat=v3", "compat=2", "cluster_size=512", "cluster_size=4k",
    "cluster_size=2M", "cluster_size=4M", "cluster_size=1000", "cluster_size=0", "cluster_size=x",
    "refcount_bits=1", "refcount_bits=64", "refcount_bits=7", "refcount_bits=128", "preallocation=off",
    "preallocation=metadata", "preallocation=falloc", "preallocation=full", "preallocation=foo",
    "lazy_refcounts=on", "lazy_refcounts=off", "lazy_refcounts=maybe", "compression_type=zlib",
    "compression_type=zstd", "compression_type=lz4", "extended_l2=on", "extended_l2=off", "data_file=new.data",
    "data_file_raw=on", "nocow=on", "nocow=off", "encryption=off", "encryption=on", "encrypt.format=luks",
    "encrypt.format=aes", "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=sec0",
    "encrypt.key-secret=sec0", "key-secret=sec0,iter-time=10", "cipher-alg=aes-128", "refcount_bits=2",
    "refcount_bits=8", "refcount_bits=0x10", "cluster_size=64k,extended_l2=on", "compat=v2",
    "cluster_size=1.5k", "size=1.5M", "nocow", "nolazy_refcounts", "lazy_refcounts", "static=on", "static=off",
    "size=2M", "size=x", "foo=bar", "foo", "help", "?", "", "backing_fmt=qcow2", "backing_fmt=raw",
    "backing_file=plain.qcow2", "backing_file=nowhere", "backing_file=disk.raw,backing_fmt=raw",
    "data_file=new.data,data_file_raw=on", "data_file=new.data,preallocation=metadata", "data_file=plain.qcow2",
    "extent_size_hint=1M", "extent_size_hint=0", "extent_size_hint=x", "encrypt.cipher-alg=aes-128",
    "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=sec0,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64",
    "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=sec0,encrypt.cipher-alg=twofish-128",
    "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=sec0,encrypt.hash-alg=sha512,encrypt.cipher-alg=x",
    "encrypt.format=aes,encrypt.key-secret=sec0,encrypt.iter-time=10", "encrypt.format=foo",
    "key-secret=sec0,iter-time=10,cipher-alg=serpent-256,hash-alg=sha1", "key-secret=sec0,iter-time=0",
    "preallocation=full,cluster_size=4k", "preallocation=metadata,extended_l2=on", "cluster_size=2M,extended_l2=on",
    "cluster_size=8k,extended_l2=on", "compat=0.10,refcount_bits=8", "compat=0.10,compression_type=zstd",
    "size=1M,size=2M", "cluster_size=4096,,", "foo,,bar=1", "preallocation=falloc,static=on", "block_size=1M",
)  # fmt: skip
AMEND_OPTIONS = (
    "compat=0.10", "compat=1.1", "compat=foo", "lazy_refcounts=on", "lazy_refcounts=off", "lazy_refcounts=x",
    "refcount_bits=1", "refcount_bits=8", "refcount_bits=16", "refcount_bits=64", "refcount_bits=3", "size=2M",
    "size=512k", "size=1M", "size=x", "data_file_raw=on", "data_file_raw=off", "data_file=x", "backing_file=x",
    "backing_file=plain.qcow2", "backing_fmt=raw", "cluster_size=4k", "preallocation=full", "help", "foo=bar",
    "compression_type=zstd", "compression_type=zlib", "extended_l2=on", "encryption=on", "", "compat=v3",
    "compat=v2", "refcount_bits=2", "refcount_bits=0", "refcount_bits=32", "size=0", "size=33M", "size=700k",
    "nocow=on", "?", "backing_fmt=qcow2", "backing_file=",
    "encrypt.state=active,encrypt.new-secret=sec0,encrypt.iter-time=10",
    "encrypt.state=inactive,encrypt.old-secret=sec0", "encrypt.state=inactive,encrypt.keyslot=0",
    "encrypt.state=inactive,encrypt.keyslot=3", "encrypt.state=x", "encrypt.keyslot=9,encrypt.state=active",
    "state=active,new-secret=sec0,iter-time=10", "state=inactive,keyslot=0", "data_file=x,size=2M",
    "data_file=", "backing_file=plain.qcow2,backing_fmt=qcow2", "compat=1.1,refcount_bits=32,size=2M",
    "lazy_refcounts=on,size=2M", "compat=0.10,size=2M", "data_file_raw=off,lazy_refcounts=on", "state=x",
    "encrypt.state=active,encrypt.new-secret=sec0,encrypt.keyslot=2,encrypt.iter-time=10",
    "encrypt.state=active,encrypt.new-secret=nope", "encrypt.state=inactive", "encrypt.iter-time=10",
    "state=inactive,old-secret=sec0", "state=active,new-secret=sec0,keyslot=9", "encryption=off", "encrypt.format=luks",
)  # fmt: skip
NEW = ("new.qcow2", "new.raw", "new.vdi", "nowhere/new.img")
# No -h: safeimg's help is its own.
ODD = (
    ("--foo",), ("-Z",), ("--object", "foo"), ("--object", "secret,id=s"), ("surplus",), ("--",), ("",), ("-",),
    ("--object", "secret,id=s,data=a,file=b"), ("--object", "secret,id=s,file=missing"), ("--output",), ("-o",),
    ("--object", "secret,id=s,data=YQ==,format=base64"), ("--object", "secret,id=s,data=?,format=base64"),
    ("--object", '{"qom-type":"secret","id":"s","data":"a"}'), ("--object", "secret,id=1,data=a"), ("--quiet",),
    ("--object", "secret,data=a"), ("--object", "secret,id=s,data=a,foo=b"), ("--image-opts=x",), ("-f",),
)  # fmt: skip
# Pairs that show much the same.
ALIKE = (
    ("plain.qcow2", "packed.qcow2"), ("zstd.qcow2", "plain.qcow2"), ("plain.qcow2", "snaps.qcow2"),
    ("plain.qcow2", "bitmaps.qcow2"), ("disk.raw", "disk.vdi"), ("disk.raw", "odd.raw"),
    ("outside.qcow2", "outraw.qcow2"), ("narrow.qcow2", "wide.qcow2"), ("two-bits.qcow2", "narrow.qcow2"),
    ("plain.qcow2", "short.qcow2"),
    ("plain.qcow2", "mid.qcow2"), ("state.qcow2", "old-state.qcow2"), ("plain.qcow2", "sized.qcow2"),
    ("empty.qcow2", "nothing.raw"), ("empty.qcow2", "zero.qcow2"), ("long.qcow2", "plain.qcow2"),
)  # fmt: skip


class Generator:
    """Lines from a random source: the same source, the same lines."""

    def __init__(self, rng: Random, commands: tuple[str, ...] | None = None) -> None:
        self.rng = rng
        self.command = ""  # of the line that is being made
        self.focus = ""  # the image that a case is about, once there is one
        self.commands = [name for name in COMMANDS if commands is None or name in commands]

    def case(self) -> list[Line]:
        """One to three lines that follow one another on the same images."""
        lines = []
        self.focus = ""
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3))):
            lines.append(self.line())
            touched = [part[-1].removeprefix("of=") for part in lines[-1].parts]
            self.focus = next((name for name in reversed(touched) if name in (*NEW[:3], *GOOD, *ENCRYPTED)), "")
        return lines

    def line(self) -> Line:
        command = self.command = self.rng.choice(self.commands)
        parts = [part for part in COMMANDS[command](self) if part]
        if self.maybe(0.04):
            parts.insert(self.rng.randrange(len(parts) + 1), self.rng.choice(ODD))
        if parts and self.maybe(0.03):
            parts.pop(self.rng.randrange(len(parts)))
        if parts and self.maybe(0.02):
            parts.append(self.rng.choice(parts))
        if self.maybe(0.01):
            command = self.rng.choice(("foo", "", "inf", "Info", "list"))
        if command != "dd" and self.maybe(0.07):
            parts = [self.renamed(part) for part in parts]
        if self.maybe(0.06) or (self.maybe(0.6) and any(name in word for part in parts for word in part
                                                        for name in (*ENCRYPTED, "sec0"))):  # fmt: skip
            parts = self.opened(command, parts)
        if self.maybe(0.1):
            parts = [self.abbreviated(part) for part in parts]
        if self.maybe(0.1):
            self.rng.shuffle(parts)
        return Line(command, tuple(parts))

    def renamed(self, part: Part) -> Part:
        """The same image by another name."""
        name = part[-1]
        if len(part) > 1 or name not in (*GOOD, *BROKEN, *ENCRYPTED):
            return part
        if self.maybe(0.05) and self.command in ("info", "map", "compare", "measure"):
            nothing = 'json:{"driver":"null-co","size":1048576,"read-zeroes":true}'
            return (self.rng.choice(("null-co://", nothing)),)
        fmt = format_of(name)
        file = f'"file":{{"driver":"file","filename":"{name}"}}'
        return (self.rng.choice((
            f"file:{name}", f"./{name}", f'json:{{"driver":"{fmt}",{file}}}', f"json:{{{file}}}",
            f'json:{{"driver":"{fmt}","file.filename":"{name}"}}', f'json:{{"driver":"file","filename":"{name}"}}',
            f'json:{{"driver":"{fmt}",{file},"foo":1}}', f'json:{{"driver":"{fmt}",{file}', f"foo:{name}",
            f'json:{{"driver":"raw","offset":512,"size":65536,{file}}}',
            f'json:{{"driver":"{fmt}",{file},"backing":null}}', f'json:{{"driver":"{fmt}",{file},"read-only":true}}',
            f'json:{{"driver":"{fmt}","file":{{"driver":"file","filename":"{name}","locking":"off"}}}}',
            f'json:{{"driver":"{fmt}",{file},"cache":{{"direct":false}},"discard":"unmap"}}',
            f'json:{{"driver":"{fmt}",{file},"node-name":"1"}}', f'json:{{"driver":"{fmt}","file":"{name}"}}',
            f'json:{{"driver":"{fmt}",{file}}} x', f'json:{{"driver":"{fmt}",,{file}}}', f"host_device:{name}",
            f"file:{name}/",
            f'json:{{"driver":"{fmt}",{file},"force-share":true}}', f"nbd:unix:{name}",
        )),)  # fmt: skip

    def backing(self, name: str) -> str:
        """A backing image's name, mostly as it is."""
        if not self.maybe(0.15):
            return name
        file = f'"file":{{"driver":"file","filename":"{name}"}}'
        return self.rng.choice((
            f"./{name}", f"file:{name}", f'json:{{"driver":"{format_of(name)}",{file}}}', f"foo:{name}",
            f"json:{{{file}}}", f"nowhere/{name}", f'json:{{"driver":"{format_of(name)}",{file}', "x" * 1030,
        ))  # fmt: skip

    def opened(self, command: str, parts: list[Part]) -> list[Part]:
        """With --image-opts, mostly all that belongs to them."""
        found = []
        for part in parts:
            name = part[-1].removeprefix("if=")
            if len(part) > 1 or name not in (*GOOD, *BROKEN, *ENCRYPTED) or self.maybe(0.1):
                found.append(part)
                continue
            driver, file = f"driver={format_of(name)}", f"file.filename={name}"
            if name in ENCRYPTED and self.maybe(0.9):
                text = opening(name)
            else:
                text = self.rng.choice((
                    f"{driver},{file}", file, f"file.driver=file,{file}", f"driver=file,filename={name}", name,
                    f"{driver},{file},foo=bar", f"driver=raw,offset=1k,{file}",
                    f"driver=qcow2,lazy-refcounts=on,{file}",
                    f"driver=qcow2,backing.driver=raw,{file}", f"{driver},file={name}",
                    f"driver=qcow2,{file},backing=", f"{driver},{file},file.locking=off", f"driver={format_of(name)}",
                    f"{driver},{file},read-only=on", f"driver=qcow2,{file},backing.file.filename=small.qcow2",
                    f"{driver},{file},cache.direct=off,discard=on", f"driver=foo,{file}", f"{driver},{file},,x",
                    f"driver=qcow2,{file},overlap-check=all,l2-cache-size=1M",
                    f"driver=qcow2,{file},lazy-refcounts=x", f"{driver},{file},encrypt.key-secret=nope",
                ))  # fmt: skip
            found.append((part[-1].replace(name, text),))
        if self.maybe(0.95):  # with it, no format is to be given
            found = [part for part in found if part[0] != "-f" and (part[0] != "-F" or command != "compare")]
            found.insert(0, ("--image-opts",))
        return [SECRET, *found] if self.maybe(0.9) else found

    def abbreviated(self, part: Part) -> Part:
        """A long option, shorter; a short one with its value in one word."""
        word = part[0]
        if word.startswith("--") and len(word) > 4 and self.maybe(0.8):
            short = word[: self.rng.randint(3, len(word))]
            return (f"{short}={part[1]}",) if len(part) == 2 and self.maybe(0.5) else (short, *part[1:])
        if len(part) == 2 and len(word) == 2 and word[0] == "-":
            return (word + part[1],)
        return part

    def maybe(self, chance: float = 0.3) -> bool:
        return self.rng.random() < chance

    def image(self) -> str:
        if self.maybe(0.15):
            only_read = self.command in ("info", "check")
            name = self.rng.choice((*BROKEN, "missing.qcow2", *NEW))
            return name if only_read or name not in UNCOUNTED else "corrupt-bit.qcow2"
        if self.focus and self.maybe(0.6):
            return self.focus
        return self.rng.choice(ENCRYPTED) if self.maybe(0.06) else self.rng.choice(GOOD)

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

    def of_words(self, words: tuple[str, ...], chance: float) -> Part:
        return (self.rng.choice(words),) if self.maybe(chance) else ()

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
            parts += [("-b", self.backing(backing)), self.said("-F", backing, 0.85), self.flag("-u", chance=0.2)]
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
        # qemu-img 7.2 loses the snapshots of an image that has bitmaps, too; safeimg does not.
        repair = () if image == "all.qcow2" else self.of("-r", ("leaks", "all", "foo"), 0.5)
        return [self.said("-f", image), self.of("--output", ("json", "human", "xml")), self.flag("-q"),
                repair, self.of("-T", CACHES, 0.1), self.flag("-U", chance=0.1), (image,)]  # fmt: skip

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
            self.flag("-U", chance=0.1),
            (image,),
        ]

    def compare(self) -> list[Part]:
        one, other = self.rng.choice(ALIKE) if self.maybe(0.4) else (self.image(), self.image())
        return [self.said("-f", one), self.said("-F", other), self.flag("-s"), self.flag("-q"), self.flag("-p"),
                self.flag("-U", chance=0.1), self.of("-T", CACHES, 0.1), (one,), (other,)]  # fmt: skip

    def convert(self) -> list[Part]:
        sources = [self.image() for _ in range(self.rng.choice((1, 1, 1, 1, 1, 1, 2, 3)))]
        target = self.rng.choice((*NEW, *NEW, self.image()))
        parts = [
            self.said("-f", sources[0]), ("-O", self.format()) if self.maybe(0.9) else (), self.flag("-c", chance=0.15),
            self.flag("-q", chance=0.1), self.flag("-W", chance=0.1), self.flag("-U", chance=0.05),
            self.of("-S", ("0", "4k", "64k", "1", "x", "-1"), 0.15), self.of("-m", ("1", "16", "17", "0"), 0.1),
            self.of("-t", CACHES, 0.1), self.of("-T", CACHES, 0.1), self.flag("-p", chance=0.05),
            self.of("-l", ("first", "2", "snapshot.name=first", "snapshot.id=2", "nope", "snapshot.foo=1"), 0.1),
            self.flag("--bitmaps", chance=0.1), self.flag("--skip-broken-bitmaps", chance=0.05),
            self.flag("--salvage", chance=0.05), self.flag("-C", chance=0.05), self.of("-r", ("1G", "x"), 0.05),
        ]  # fmt: skip
        if self.maybe(0.1):
            parts.append(("-n",))
            target = self.image()
            if self.maybe():  # which has to be true: what lies there otherwise is anybody's guess
                target = self.rng.choice(("empty.qcow2", "zero.qcow2", "new.raw"))
                parts.append(("--target-is-zero",))
        elif self.maybe(0.02):
            parts.append(("--target-is-zero",))
        if self.maybe(0.3):
            parts += self.options(CREATE_OPTIONS, 2)
        if self.maybe(0.15):
            backing = self.image()
            parts += [(self.rng.choice(("-B", "-b")), self.backing(backing)), self.said("-F", backing, 0.8)]
        return [*parts, *((source,) for source in sources), (target,)]

    def commit(self) -> list[Part]:
        image = self.rng.choice(("mid.qcow2", "top.qcow2", "on-raw.qcow2", "on-vdi.qcow2", "short.qcow2",
                                 "long.qcow2", "on-short.qcow2", "on-narrow.qcow2", self.image()))
        return [self.said("-f", image), self.flag("-d"), self.flag("-q", chance=0.1), self.flag("-p", chance=0.1),
                self.of("-b", ("plain.qcow2", "mid.qcow2", "nope"), 0.25), self.of("-t", CACHES, 0.1),
                self.of("-r", ("1G", "x"), 0.05), (image,)]  # fmt: skip

    def rebase(self) -> list[Part]:
        image = self.rng.choice(("mid.qcow2", "top.qcow2", "on-raw.qcow2", "on-vdi.qcow2", "short.qcow2",
                                 "long.qcow2", "on-short.qcow2", "on-narrow.qcow2", "named.qcow2", self.image()))
        backing = self.rng.choice(("", "plain.qcow2", self.image()))
        # Not with a wrong format: qemu-img takes a file of the old chain for what it is there, and changes the content.
        said = ("-F", self.rng.choice((format_of(backing), format_of(backing), "foo", "")))
        if self.maybe(0.15):
            said = ()
        # qemu-img 7.2 does not keep what an image of version 2 without a backing image shows; safeimg does.
        unsafe = ("-u",) if image in ("old.qcow2", "old-state.qcow2") else self.flag("-u")
        return [self.said("-f", image), unsafe, self.flag("-p", chance=0.1), self.flag("-q", chance=0.1),
                self.of("-t", CACHES, 0.1), self.of("-T", CACHES, 0.1), self.flag("-U", chance=0.05),
                ("-b", self.backing(backing)), said, (image,)]  # fmt: skip

    def resize(self) -> list[Part]:
        image = self.image()
        size = self.rng.choice(("", "", "", "+", "-", "++")) + self.size()
        return [self.said("-f", image, 0.8), self.flag("--shrink", chance=0.4), self.flag("-q", chance=0.1),
                self.of("--preallocation", ("off", "metadata", "falloc", "full", "foo"), 0.2),
                (image,), (size,)]  # fmt: skip

    def snapshot(self) -> list[Part]:
        known = ("snaps.qcow2", "sized.qcow2", "state.qcow2", "old-state.qcow2", "all.qcow2")
        image = self.rng.choice((*known, self.image()))
        names = ("first", "first", "second one", "1", "2", "3", "new", "with state", "larger", "", "x" * 300)
        actions = (("-l",), *((verb, name) for verb in ("-a", "-c", "-d") for name in names))
        parts = [self.rng.choice(actions) for _ in range(1 + self.maybe(0.05))]
        return [*parts, self.flag("-q", chance=0.1), self.flag("-U", chance=0.1), (image,)]

    def bitmap(self) -> list[Part]:
        image = self.rng.choice(("bitmaps.qcow2", "all.qcow2", "broken-bitmaps.qcow2", self.image()))
        actions: list[Part] = [("--add",), ("--remove",), ("--clear",), ("--enable",), ("--disable",),
                               ("--merge", "b0"), ("--merge", "b1"), ("--merge", "nope")]  # fmt: skip
        parts = [self.rng.choice(actions) for _ in range(self.rng.choice((1, 1, 1, 2, 3, 0)))]
        if self.maybe(0.1):
            other = self.rng.choice(("bitmaps.qcow2", "bitmaps.qcow2", "broken-bitmaps.qcow2", "all.qcow2", "disk.raw"))
            parts += [("-b", other), self.said("-F", other, 0.7)]
        name = self.rng.choice(("b0", "b1", "new", "", "y" * 1100))
        granularity = self.of("-g", ("512", "64k", "1k", "100", "x", "4G"), 0.2)
        return [*parts, granularity, self.said("-f", image), (image,), (name,)]

    def amend(self) -> list[Part]:
        image = self.image()
        return [self.said("-f", image), *(self.options(AMEND_OPTIONS, 2) if self.maybe(0.97) else []),
                self.flag("-p", chance=0.1), self.flag("-q", chance=0.1), self.of("-t", CACHES, 0.1),
                self.flag("--force", chance=0.1), (image,)]  # fmt: skip

    def dd(self) -> list[Part]:
        image, size = self.image(), self.size()
        if size in ("1", "1b"):  # takes qemu-img longer than we wait
            size = "512"
        numbers = ("0", "1", "3", "16", "1k", "x", "-1")
        return [self.said("-f", image), ("-O", self.format()) if self.maybe(0.6) else (), self.flag("-U", chance=0.1),
                (f"if={image}",), (f"of={self.rng.choice((*NEW, *NEW, self.image()))}",),
                (f"bs={size}",) if self.maybe(0.5) else (),
                (f"count={self.rng.choice(numbers)}",) if self.maybe() else (),
                (f"skip={self.rng.choice(numbers)}",) if self.maybe() else (),
                self.of_words(("seek=1", "foo", "conv=notrunc", "=", "if=", "iflag=direct"), 0.03)]  # fmt: skip

    def bench(self) -> list[Part]:
        image = self.image()
        return [self.said("-f", image, 0.7), ("-c", self.rng.choice(("0", "1", "20", "x", "-1"))), self.flag("-w"),
                self.of("-s", ("512", "4k", "64k", "x", "0"), 0.4), self.of("-S", ("0", "4k", "100", "x"), 0.2),
                self.of("-o", ("0", "64k", "100", "x"), 0.2), self.of("-d", ("1", "8", "x"), 0.2),
                self.of("-t", CACHES, 0.1), self.flag("-n", chance=0.1), self.flag("-q", chance=0.1),
                self.of("-i", ("threads", "native", "x"), 0.1), self.of("--pattern", ("7", "255", "256", "x"), 0.2),
                self.of("--flush-interval", ("1", "5", "x"), 0.1), self.flag("--no-drain", chance=0.1),
                self.flag("-U", chance=0.1), (image,)]  # fmt: skip


COMMANDS: dict[str, Callable[[Generator], list[Part]]] = {
    "create": Generator.create, "info": Generator.info, "check": Generator.check, "map": Generator.map,
    "measure": Generator.measure, "compare": Generator.compare, "convert": Generator.convert,
    "commit": Generator.commit, "rebase": Generator.rebase, "resize": Generator.resize,
    "snapshot": Generator.snapshot, "bitmap": Generator.bitmap, "amend": Generator.amend, "dd": Generator.dd,
    "bench": Generator.bench,
}  # fmt: skip
