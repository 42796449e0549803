"""Seeded damage to qcow2 images: plausible mistakes in every table, for check, and arbitrary ones, for
fuzzing."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from qcow2_images import u64
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, OFFSET_MASK
from safeimg.drivers.formats.qcow2.extensions import EXT_BITMAPS
from safeimg.drivers.formats.qcow2.header import EXTENDED_L2


class Spot(NamedTuple):
    """Bytes of metadata that are worth damaging."""

    kind: str
    offset: int
    length: int


def u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset:offset + 4], "big")


def spots(data: bytes) -> list[Spot]:
    """Entries of all tables of a valid image as `qcow2_images.build` makes it."""
    cluster_size = 1 << u32(data, 20)
    width = 2 if u64(data, 72) & EXTENDED_L2 and u32(data, 4) > 2 else 1  # words of an L2 entry
    l1_tables = [(u64(data, 40), u32(data, 36))]
    found: list[Spot] = []
    position = u64(data, 64)
    for _ in range(u32(data, 60)):
        l1_tables.append((u64(data, position), u32(data, position + 8)))
        found += [Spot("snapshot", position, 8), Spot("snapshot", position + 8, 4)]
        id_size, name_size = struct.unpack_from(">HH", data, position + 12)
        position += -(-(40 + u32(data, position + 36) + id_size + name_size) // 8) * 8
    for offset, entries in l1_tables:
        for index in range(entries):
            found.append(Spot("l1", offset + 8 * index, 8))
            l2_table = u64(data, offset + 8 * index) & OFFSET_MASK
            if l2_table:
                interesting = (*range(12), 20, 21, 22, 30, 31, 60, 90, 91, 99)
                words = [i * width + word for i in interesting for word in range(width)]
                found += [Spot("l2", l2_table + 8 * word, 8) for word in words if 8 * word < cluster_size]
    table = u64(data, 48)
    found += [Spot("refcount table", table + 8 * index, 8) for index in range(min(3, cluster_size // 8))]
    for index in range(cluster_size // 8):
        block = u64(data, table + 8 * index)
        if block:
            found += [Spot("refcounts", block + index, 1) for index in range(64)]
    extension = data.find(EXT_BITMAPS.to_bytes(4, "big"), 104, cluster_size)
    if extension > 0:
        directory = u64(data, extension + 24)
        found += [Spot("bitmap", directory, 8), Spot("bitmap table", u64(data, directory), 8)]
    return found


def damage(generator: random.Random, data: bytes, places: list[Spot]) -> bytes:
    """`data` with one to three entries changed to something that could be meant, and sometimes cut short."""
    out = bytearray(data)
    cluster_bits = u32(data, 20)
    tables = [spot for spot in places if spot.kind in ("l1", "l2", "refcount table")]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        spot = generator.choice(tables if generator.random() < 0.6 else places)
        if spot.length == 8:
            value = _changed(generator, u64(bytes(out), spot.offset), len(data), cluster_bits)
            if generator.random() < 0.1:
                value = u64(data, generator.choice(tables).offset)
            struct.pack_into(">Q", out, spot.offset, value)
        elif spot.length == 4:
            struct.pack_into(">I", out, spot.offset, generator.choice((0, 1, 5, 1 << 12, 1 << 22, 0xFFFFFFFF)))
        else:
            old = out[spot.offset]
            out[spot.offset] = generator.choice((0, 1, 2, 3, 255, old ^ 1, old ^ 0x80))
    if generator.random() < 0.1:
        del out[generator.randrange(len(out) // 2, len(out)):]
    return bytes(out)


def _changed(generator: random.Random, value: int, length: int, cluster_bits: int) -> int:
    flags = value & ~OFFSET_MASK
    edge = (length + generator.randrange(-2, 3) * (1 << cluster_bits) // 2) // 512 * 512
    return generator.choice((
        0,
        value ^ 1 << generator.randrange(64),
        flags | generator.randrange((length >> cluster_bits) + 3) << cluster_bits,
        flags | generator.randrange(length) // 512 * 512,
        value ^ 1 << 63,
        value ^ 1,
        generator.getrandbits(64),
        COMPRESSED | generator.randrange(length) | generator.randrange(4) << (70 - cluster_bits),
        value | 1 << generator.randrange(9),
        value | 1 << generator.randrange(56, 62),
        flags | edge,
    ))


def fuzz(generator: random.Random, data: bytes, places: list[Spot]) -> bytes:
    """`data` with anything at all done to it: header fields, random bytes, copied, moved and missing
    pieces."""
    out = bytearray(damage(generator, data, places) if generator.random() < 0.5 else data)
    for _ in range(generator.choice((0, 1, 1, 2, 4, 16))):
        kind = generator.randrange(5)
        position = generator.randrange(112) if generator.random() < 0.6 else generator.randrange(len(out))
        if kind == 0:
            out[position] = generator.randrange(256)
        elif kind == 1:
            out[position] ^= 1 << generator.randrange(8)
        elif kind == 2:
            value = generator.choice((0, 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 40))
            width = generator.choice((4, 8))
            out[position:position + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "big")
        elif kind == 3:
            source = generator.randrange(len(out))
            size = generator.choice((8, 64, 512))
            out[position:position + size] = out[source:source + size]
        else:
            size = generator.randrange(1, 64)
            out[position:position + size] = generator.randbytes(size)
    if generator.random() < 0.1:
        del out[generator.randrange(len(out)):]
    return bytes(out)
