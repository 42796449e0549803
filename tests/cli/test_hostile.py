"""Images with bytes turned over: an answer or one clear line, never an internal error."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twin import safeimg

CODES = {"info": {0, 1}, "map": {0, 1}, "check": {0, 1, 2, 3, 63}, "compare": {0, 1, 2, 3, 4}}

# Header, refcount table and block, L1 and L2 tables are the first five clusters of 4 KiB of small.qcow2
CHANGES = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 120), st.integers(4096, 4160), st.integers(8192, 8256), st.integers(0, 24575)
        ),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("image", ["small.qcow2", "overlay.qcow2", "packed.qcow2"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_turned_bytes(images: Path, image: str, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray((images / image).read_bytes())
    for offset, value in changes:
        data[offset : offset + len(value)] = value
    (images / "hostile.img").write_bytes(data)
    for command in (["info"], ["map", "--output=json", "--max-length=64M"], ["check"], ["compare", "small.raw"]):
        outcome = safeimg([*command, "hostile.img"], images)
        assert outcome.code in CODES[command[0]], outcome
        assert b"internal error" not in outcome.stderr, outcome
        assert b"Traceback" not in outcome.stderr
        assert outcome.stderr or outcome.stdout
