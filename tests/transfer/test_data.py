"""Zero detection, digests, and copying into fresh space."""

from __future__ import annotations

import itertools

import pytest
import trio
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st
from safeimg.drivers.formats.api import Kind, Placement
from safeimg.drivers.transfer.copy import copy_fresh, join, write_moves
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.digest import BLOCK, Written, digests, zero_digests
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import View
from safeimg.drivers.transfer.zero import Run, data_runs, fill_zero, is_zero
from transfer_fakes import Layer, MemoryFile


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from((0, 0, 1, 255))), max_size=12),
       st.sampled_from((1, 4, 8)), st.sampled_from((0, 4, 8, 24)))
@example([(8, 0)], 8, 8)
def test_data_runs_leave_out_zeroes_only(parts: list[tuple[int, int]], unit: int, minimum: int) -> None:
    content = b"".join(bytes([fill]) * length for length, fill in parts)
    found = data_runs(memoryview(content), unit, minimum)
    kept = bytearray(len(content))
    at = 0
    for start, end in found:
        assert at <= start < end <= len(content) and (start > at or at == 0)
        assert start % unit == 0 and (end % unit == 0 or end == len(content))
        kept[start:end] = content[start:end]
        at = end
    assert kept == content
    # Every aligned run of zeroes that is long enough was left out.
    padded = content + bytes(-len(content) % unit)
    units = [padded[i : i + unit].strip(b"\0") == b"" for i in range(0, len(padded), unit)]
    data = set()
    for start, end in found:
        data.update(range(start // unit, -(-end // unit)))
    i = 0
    while i < len(units):
        j = i
        while j < len(units) and units[j]:
            j += 1
        if j > i and minimum and (j - i) * unit >= minimum:
            assert not data & set(range(i, j))
        i = max(j, i + 1)


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from((0, 0, 1, 255))), max_size=12), st.integers(1, 7),
       st.sampled_from((0, 8, 24)))
def test_units_of_a_buffer_that_starts_within_one(parts: list[tuple[int, int]], phase: int, minimum: int) -> None:
    content = b"".join(bytes([fill]) * length for length, fill in parts)
    found = data_runs(memoryview(content), 8, minimum, phase)
    # As if whole units came before it, up to one that is cut: those have no say.
    assert all((start + phase) % 8 == 0 or start == 0 for start, _ in found)
    assert all((end + phase) % 8 == 0 or end == len(content) for _, end in found)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(found))
    kept = bytearray(len(content))
    for start, end in found:
        kept[start:end] = content[start:end]
    assert kept == content
    if minimum == 8:  # every unit of zeroes is left out
        padded = bytes(phase) + content
        units = [at for at in range(0, len(padded), 8) if padded[at : at + 8].strip(b"\0")]
        assert sum(end - start for start, end in found) == sum(
            min(at + 8 - phase, len(content)) - max(at - phase, 0) for at in units
        )


def test_data_runs_of_nothing_and_of_all() -> None:
    assert data_runs(memoryview(b""), 4, 4) == []
    assert data_runs(memoryview(bytes(100)), 4, 4) == []
    assert data_runs(memoryview(bytes(100)), 4, 0) == [Run(0, 100)]
    assert data_runs(memoryview(bytes(100)), 4, 104) == [Run(0, 100)]


@pytest.mark.parametrize("length", [1, 4096, 1 << 20, (1 << 20) + 1, (2 << 20) + 5])
def test_is_zero_sees_the_last_byte(length: int) -> None:
    content = bytearray(length)
    assert is_zero(memoryview(content))
    content[-1] = 1
    assert not is_zero(memoryview(content))
    fill_zero(memoryview(content))
    assert content == bytes(length)


@pytest.mark.parametrize("length", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_digests(length: int) -> None:
    content = bytes(i % 251 for i in range(length))
    expected = b"".join(blake3(content[at : at + BLOCK]).digest() for at in range(0, length, BLOCK))
    assert digests(content) == expected
    assert zero_digests(length) == digests(bytes(length))


@pytest.mark.parametrize("workers", [1, 3])
def test_copy_fresh_writes_what_the_view_shows(workers: int) -> None:
    unit = 1 << 16
    big = (3 << 20) + unit
    layer = Layer([(unit, Kind.DATA, 1), (unit, Kind.ZERO, 0), (big, Kind.DATA, 2), (100, Kind.DATA, 3)])
    view = View([layer])
    file = MemoryFile(b"\xee" * (view.size + 5 * unit))
    places = [Placement(0, unit, 2 * unit, True), Placement(unit, unit, 0, True),
              Placement(2 * unit, big, 3 * unit, True), Placement(2 * unit + big, 100, unit, True)]
    transfer = Transfer(Settings(workers=workers))
    made = trio.run(lambda: copy_fresh(transfer, view, 4, Target(file), places, granularity=unit))
    one, two = bytes([1]) * unit, bytes([2]) * big
    expected = bytes(unit) + bytes([3]) * 100 + bytes(unit - 100) + one + two
    assert bytes(file.content[: 3 * unit + big]) == expected
    assert made == [Written(4, 0, unit + 100, digests(bytes(unit) + bytes([3]) * 100)),
                    Written(4, 2 * unit, unit + big, digests(one + two))]


def test_written_ranges_join_only_where_their_digests_do() -> None:
    a = Written(0, 0, BLOCK, b"a" * 32)
    b = Written(0, BLOCK, 10, b"b" * 32)
    c = Written(0, BLOCK + 10, 10, b"c" * 32)
    d = Written(1, BLOCK + 20, 10, b"d" * 32)
    assert join([d, c, b, a]) == [Written(0, 0, BLOCK + 10, b"a" * 32 + b"b" * 32), c, d]
    assert join([]) == []


def test_moves_are_written_in_place() -> None:
    class Move:
        def __init__(self, offset: int, length: int, source: int | None) -> None:
            self.offset, self.length, self.source, self.guest = offset, length, source, 0

    big = (2 << 20) + 77
    view = View([Layer([(big, Kind.DATA, 1), (big, Kind.DATA, 2)])])
    one, two = MemoryFile(b"\xee" * 3 * big), MemoryFile(b"\xee" * 100)
    moves = [
        (Target(one), Move(5, big, big)), (Target(two), Move(10, 50, None)), (Target(one), Move(2 * big, 9, 3))
    ]
    transfer = Transfer(Settings(workers=3))
    made = trio.run(lambda: write_moves(transfer, view, moves))
    assert bytes(one.content) == (b"\xee" * 5 + bytes([2]) * big + b"\xee" * (big - 5) + bytes([1]) * 9
                                  + b"\xee" * (big - 9))
    assert bytes(two.content) == b"\xee" * 10 + bytes(50) + b"\xee" * 40
    assert made == [digests(bytes([2]) * big), b"", digests(bytes([1]) * 9)]
    assert transfer.progress.moved == big + 9
