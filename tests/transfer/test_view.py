"""What is seen from the top of a chain, and reading it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.transfer.view import ConcatenatedView, LayerExtent, View
from transfer_fakes import Layer, MemoryFile

D, Z, C, U = Kind.DATA, Kind.ZERO, Kind.COMPRESSED, Kind.UNALLOCATED


def content_of(layers: list[Layer]) -> bytes:
    below = b""
    for layer in reversed(layers):
        below = layer.content(below)
    return below


def read(view: View | ConcatenatedView, start: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    view.read_into(start, memoryview(buffer))
    return bytes(buffer)


runs = st.lists(st.tuples(st.sampled_from((1, 3, 16, 17, 40)), st.sampled_from((D, Z, U)),
                          st.integers(1, 255)), max_size=6)


@st.composite
def layer(draw: st.DrawFn) -> Layer:
    if draw(st.booleans()):
        return Layer(draw(runs))
    kinds = draw(st.lists(st.tuples(st.sampled_from((D, Z, U, C)), st.integers(1, 255)), max_size=6))
    return Layer([(16, kind, fill) for kind, fill in kinds])


@given(st.lists(layer(), min_size=1, max_size=4), st.integers(0, 120), st.integers(0, 120))
def test_any_range_of_any_chain(layers: list[Layer], start: int, length: int) -> None:
    expected = content_of(layers)
    view = View(layers)
    assert view.size == len(expected)
    wanted = expected[start : start + length]
    assert read(view, start, length) == wanted + bytes(length - len(wanted))
    pieces = list(view.extents(start, length))
    assert sum(piece.extent.length for piece in pieces) == len(wanted)
    at = start
    for _, extent in pieces:
        assert extent.start == at and extent.length > 0 and extent.kind is not U
        at += extent.length
    assert all(a.layer != b.layer or a.extent.kind != b.extent.kind or a.extent.kind is C
               or (a.extent.kind is D and a.extent.offset + a.extent.length != b.extent.offset)
               for a, b in pairwise(pieces))


@given(st.lists(layer(), min_size=1, max_size=3), st.lists(layer(), min_size=1, max_size=3),
       st.integers(0, 120), st.integers(0, 120))
def test_sources_joined(first: list[Layer], second: list[Layer], start: int, length: int) -> None:
    view = ConcatenatedView([View(first), View(second)])
    expected = content_of(first) + content_of(second)
    assert view.size == len(expected)
    wanted = expected[start : start + length]
    assert read(view, start, length) == wanted + bytes(length - len(wanted))
    pieces = list(view.extents(start, length))
    buffer = bytearray(b"\xee" * len(wanted))
    view.read_pieces(pieces, start, memoryview(buffer))
    assert bytes(buffer) == wanted


def test_a_shorter_layer_supplies_zeroes_beyond_its_end() -> None:
    top, middle, bottom = Layer([(64, U, 0)]), Layer([(16, U, 0), (16, D, 2)]), Layer([(64, D, 3)])
    assert list(View([top, middle, bottom]).extents(0, 99)) == [
        LayerExtent(2, Extent(0, 16, D, 0)),
        LayerExtent(1, Extent(16, 16, D, 0)),
        LayerExtent(1, Extent(32, 32, Z)),
    ]


def test_what_no_layer_has_is_told_apart() -> None:
    assert list(View([Layer([(16, Z, 0), (16, U, 0)])]).extents(0, 32)) == [
        LayerExtent(0, Extent(0, 16, Z)), LayerExtent(1, Extent(16, 16, Z))]


def test_beyond_a_shorter_top_the_base_stays_as_it_is() -> None:
    top, middle, base = Layer([(16, D, 1)]), Layer([(64, D, 2)]), Layer([(48, D, 3)])
    view = View([top, middle, base], size=64, floor=2)
    assert read(view, 0, 64) == bytes([1]) * 16 + bytes([3]) * 32 + bytes(16)
    assert [piece.layer for piece in view.extents(0, 64)] == [0, 2, 2]


def test_a_compressed_cluster_read_in_parts_is_inflated_once() -> None:
    layer = Layer([(16, C, 7), (16, C, 8)])
    view = View([layer])
    assert b"".join(read(view, at, 4) for at in range(0, 32, 4)) == bytes([7]) * 16 + bytes([8]) * 16
    assert layer.inflated == 2


def test_a_file_that_ends_early_reads_as_zeroes() -> None:
    layer = Layer([(32, D, 5)])
    del layer.file.content[20:]
    assert read(View([layer]), 0, 32) == bytes([5]) * 20 + bytes(12)


def test_only_what_is_asked_for_is_read() -> None:
    layer = Layer([(64, D, 5)])
    read(View([layer]), 10, 20)
    assert layer.file.reads == [(10, 20)]


def test_a_map_with_a_gap_is_refused() -> None:
    class Gap(Layer):
        def extents(self, start: int, length: int):  # type: ignore[no-untyped-def]
            return (extent for extent in super().extents(start, length) if extent.start != 16)

    with pytest.raises(FormatError, match="disk: its map has a gap at guest offset 0x10"):
        list(View([Gap([(16, D, 1), (16, Z, 0), (16, D, 1)], file=MemoryFile(path="disk"))]).extents(0, 48))


def test_a_cluster_that_inflates_short_is_refused() -> None:
    class Short(Layer):
        def decompress(self, extent: Extent, stored: object) -> bytes:
            return b"x"

    with pytest.raises(FormatError, match="a compressed cluster holds 1 bytes, expected 16 at offset 0x0"):
        read(View([Short([(16, C, 1)])]), 0, 16)
