"""Sizes, option lists and JSON, against what qemu-img makes of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safeimg.drivers.formats.jsontext import json_lines
from safeimg.ops.create_options import asks_for_help, split_options
from safeimg.ops.sizes import human_size, parse_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "0.977 KiB"), (1023, "0.999 KiB"), (1024, "1 KiB"),
        (10240, "10 KiB"), (1024000, "0.977 MiB"), (1048576, "1 MiB"), (1072693248, "0.999 GiB"),
        (123457024, "118 MiB"), (12345678901, "11.5 GiB"), (1 << 63, "8 EiB"), (999 << 60, "999 EiB"),
    ],
)  # fmt: skip
def test_human_size(size: int, text: str) -> None:
    assert human_size(size) == text


@given(st.integers(0, (1 << 64) - 1), st.sampled_from(["", "b", "B"]))
def test_whole_sizes(size: int, suffix: str) -> None:
    assert parse_size(f"{size}{suffix}") == size
    assert parse_size(hex(size)) == size


@given(st.text("0123456789abcdefxkKMGTPEb.+- _e", max_size=12))
def test_any_text_is_a_size_or_none(text: str) -> None:
    value = parse_size(text)
    assert value is None or value >= 0


def test_absurdly_long_numbers_cost_nothing() -> None:
    value = parse_size("9" * 100_000 + "E")
    assert value is not None and value > 1 << 64


@given(st.lists(st.tuples(st.text("abc", min_size=1), st.text("xy,= ")), max_size=5))
def test_option_lists_survive_escaping(pairs: list[tuple[str, str]]) -> None:
    text = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in pairs)
    assert list(split_options(text)) == pairs


def test_option_lists() -> None:
    assert list(split_options("a,nob,c=1")) == [("a", "on"), ("b", "off"), ("c", "1")]
    assert list(split_options("raw,x=1", implied="driver")) == [("driver", "raw"), ("x", "1")]
    assert asks_for_help("a=1,help") and asks_for_help("?") and asks_for_help("a=b,,,help")
    assert not asks_for_help("a=1,,help") and not asks_for_help("helpful=1")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_printed_json_reads_back(value: object) -> None:
    text = json_lines(value)
    assert text.isascii()
    assert json.loads(text) == value


def test_bytes_that_are_no_text_do_not_break_json() -> None:
    assert json_lines("b\udcffad\x01\x7f") == '"b\\uFFFDad\\u0001\\u007F"'
