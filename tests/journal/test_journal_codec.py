"""Events to msgpack and back, and what is refused."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_fakes import DECLARED, EVERY_EVENT, OWNER, STARTED, STEP
from safeimg.journal import events as ev
from safeimg.journal.codec import MAX_PAYLOAD, BadEvent, decode_event, encode_event

OFFSET = st.integers(0, 2**62)
IMAGE = st.integers(0, 1)
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
TIME = st.floats(0, 2**40, allow_nan=False)
NUMBER = st.integers(0, 2**63 - 1)
TAG = st.text("0123456789abcdef", min_size=32, max_size=32)
RAW = st.lists(
    st.one_of(st.binary(min_size=1, max_size=20), st.integers(1, 300).map(bytes)), min_size=1, max_size=6
).map(b"".join)
IDENTITY = st.builds(
    ev.Identity,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    OFFSET,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.none() | TAG,
)
OWNERS = st.builds(ev.Owner, TEXT, TEXT, NUMBER, NUMBER, NUMBER, TEXT)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=3).map(tuple)


@st.composite
def patches(draw: st.DrawFn) -> ev.PatchRecord:
    after = draw(RAW)
    before = draw(st.none() | st.just(bytes(len(after))) | st.just(after[::-1]))
    return ev.PatchRecord(draw(IMAGE), draw(OFFSET), before, after)


@st.composite
def fresh(draw: st.DrawFn) -> ev.FreshRecord:
    length = draw(st.integers(1, 200_000))
    return ev.FreshRecord(draw(IMAGE), draw(OFFSET), length, b"d" * (32 * -(-length // 65536)), draw(st.booleans()))


FINISH = patches().filter(lambda patch: patch.before is not None).map(lambda patch: ev.FinishRecord(*patch))
LENGTH = st.integers(1, 2**62 - 1)
BEFORE = st.builds(
    ev.BeforeRecord, IMAGE, OFFSET, LENGTH, OFFSET, st.just(False), st.just(b"h" * 32)
) | st.builds(ev.BeforeRecord, IMAGE, OFFSET, LENGTH, st.none(), st.booleans(), st.just(b""))
EVENTS = st.one_of(
    st.builds(
        ev.Declared,
        TAG,
        TEXT,
        tuples(TEXT),
        TEXT,
        OWNERS,
        st.lists(
            st.builds(ev.ImageRecord, TEXT, TEXT, TEXT, IDENTITY, st.booleans()), min_size=1, max_size=3
        ).map(tuple),
        TIME,
    ),
    st.builds(
        ev.Started,
        st.dictionaries(TEXT, JSON, max_size=3),
        st.tuples(OFFSET, OFFSET),
        st.booleans(),
        tuples(IMAGE),
        OFFSET,
        TIME,
    ),
    st.builds(ev.ChangedOutside, tuples(st.tuples(IMAGE, TIME))),
    st.builds(ev.GivenUp, NUMBER, tuples(BEFORE)),
    st.builds(ev.Settled, tuples(st.tuples(IMAGE, IDENTITY)), TEXT, TIME),
    st.builds(
        ev.Digested,
        tuples(st.builds(ev.ContentRecord, IMAGE, TEXT, st.binary(min_size=32, max_size=32).map(bytes.hex))),
    ),
    st.builds(ev.Observed, tuples(st.tuples(IMAGE, IDENTITY))),
    st.builds(
        ev.StepPrepared,
        NUMBER,
        TEXT,
        tuples(patches()),
        tuples(patches()),
        tuples(st.builds(ev.MoveRecord, IMAGE, OFFSET, LENGTH, st.none() | OFFSET, st.none() | OFFSET)),
        tuples(fresh()),
        tuples(BEFORE),
        tuples(st.builds(ev.LengthRecord, IMAGE, OFFSET, OFFSET)),
        tuples(st.builds(ev.UnlinkedRecord, IMAGE, OFFSET, LENGTH)),
        JSON,
        OFFSET,
        TIME,
    ),
    st.builds(ev.StepApplied, NUMBER, tuples(st.integers(0, 3).map(lambda count: bytes(32 * count)))),
    st.builds(ev.PointOfNoReturn, NUMBER, TIME),
    st.builds(ev.Paused, TEXT, TIME),
    st.builds(ev.RecoveryStarted, st.sampled_from(["resume", "rollback"]), OWNERS, TIME),
    st.builds(ev.TakingBack, NUMBER),
    st.builds(ev.TakenBack, NUMBER),
    st.builds(ev.Completed, tuples(FINISH), TIME),
    st.builds(ev.RolledBack, tuples(TEXT), TIME),
    st.builds(ev.Abandoned, TEXT, TIME, tuples(FINISH)),
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_round_trip(event: ev.Event) -> None:
    assert decode_event(encode_event(event, images=2), images=2) == event


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
def test_examples_round_trip(event: ev.Event) -> None:
    assert decode_event(encode_event(event)) == event


def test_every_kind_of_event_is_covered() -> None:
    assert {type(event) for event in EVERY_EVENT} == set(ev.Event.__args__)  # type: ignore[attr-defined]


def test_zeroes_take_no_room() -> None:
    patch = ev.PatchRecord(0, 0, bytes(1 << 20), b"a" + bytes(1 << 19) + b"b" + bytes((1 << 19) - 2))
    assert len(encode_event(ev.StepPrepared(1, "x", link=(patch,)))) < 300


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(EVERY_EVENT), st.data())
def test_mutated_bytes_never_do_more_than_be_refused(event: ev.Event, data: st.DataObject) -> None:
    payload = bytearray(encode_event(event))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_event(bytes(payload), images=2)
    except BadEvent as error:
        assert "\n" not in str(error)
    else:
        assert (
            decode_event(encode_event(found, images=2), images=2) == found
        )  # what is accepted is well-formed


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(BadEvent):
        decode_event(data)


def wire(event: ev.Event) -> list[Any]:
    return msgpack.unpackb(encode_event(event), unicode_errors="surrogateescape")  # type: ignore[no-any-return]


def refused(value: object, images: int = 2) -> str:
    payload = msgpack.packb(value, unicode_errors="surrogateescape")
    with pytest.raises(BadEvent) as caught:
        decode_event(payload, images=images)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


ZEROES = [1 << 40]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", -1),
        ("number", 2**63),
        ("number", True),
        ("number", 1.0),
        ("number", None),
        ("name", b"x"),
        ("name", "a\0b"),
        ("name", "x" * (1 << 18)),
        ("allocate", [[2, 0, None, b"x"]]),
        ("allocate", [[-1, 0, None, b"x"]]),
        ("allocate", [[True, 0, None, b"x"]]),
        ("allocate", [[0, -1, None, b"x"]]),
        ("allocate", [[0, 2**63 - 1, None, b"x"]]),
        ("allocate", [[0, 0, None, b""]]),
        ("allocate", [[0, 0, b"xy", b"x"]]),
        ("allocate", [[0, 0, b"", b"x"]]),
        ("allocate", [[0, 0, None, None]]),
        ("allocate", [[0, 0, None]]),
        ("allocate", [[0, 0, None, b"x", 1]]),
        ("allocate", {}),
        ("allocate", None),
        ("allocate", "x"),
        ("link", [[0, 0, None, ZEROES]]),
        ("link", [[0, 0, None, [0]]]),
        ("link", [[0, 0, None, [-1]]]),
        ("link", [[0, 0, None, [64, 64]]]),
        ("link", [[0, 0, None, [b"a", b"b"]]]),
        ("link", [[0, 0, None, [b""]]]),
        ("link", [[0, 0, None, []]]),
        ("link", [[0, 0, None, [True]]]),
        ("link", [[0, 0, [65], [64]]]),
        ("link", [[0, 0, None, [40 << 20]], [0, 0, None, [40 << 20]]]),
        ("moves", [[0, 0, 0, 0]]),
        ("moves", [[0, 2**62, 2**62, 0]]),
        ("moves", [[0, 0, 1, 2**63 - 1]]),
        ("moves", [[0, 0, 1, -1]]),
        ("moves", [[0, 0, 2**64 - 1, None]]),
        ("fresh", [[0, 0, 65537, bytes(32)]]),
        ("fresh", [[0, 0, 1, b""]]),
        ("fresh", [[0, 0, 1, "x" * 32]]),
        ("fresh", [[0, 0, 2**62, bytes(32)]]),
        ("before", [[0, 0, 1, None, False, bytes(32)]]),
        ("before", [[0, 0, 1, 4096, False, b""]]),
        ("before", [[0, 0, 1, 4096, True, bytes(32)]]),
        ("before", [[0, 0, 1, 4096, 0, bytes(32)]]),
        ("before", [[0, 0, 1, 4096, False, bytes(31)]]),
        ("lengths", [[0, -1, 0]]),
        ("lengths", [[0, 0, 2**63]]),
        ("unlinked", [[0, 0, 0]]),
        ("cursor", b"bytes"),
        ("cursor", float("nan")),
        ("cursor", {1: 2}),
        ("cursor", msgpack.ExtType(5, b"")),
        ("cursor", msgpack.Timestamp(1)),
        ("done", -1),
        ("time", "now"),
        ("time", float("inf")),
        ("time", -1.0),
        ("time", False),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: object) -> None:
    kind, values = wire(STEP)
    message = refused([kind, values | {field: value}])
    assert field in message or "msgpack" in message


def test_missing_unknown_and_doubled_fields() -> None:
    kind, values = wire(STARTED)
    assert "unknown field" in refused([kind, values | {"more": 1}])
    del values["undo"]
    assert "undo" in refused([kind, values])
    assert "unknown kind" in refused(["Exploded", {}])
    for value in (
        [],
        [kind],
        [kind, values, 1],
        {},
        None,
        5,
        [5, {}],
        ["TakingBack", [1]],
        [["TakingBack"], {}],
    ):
        refused(value)
    doubled = b"\x92" + msgpack.packb("TakingBack") + b"\x82" + 2 * (msgpack.packb("number") + b"\x01")
    with pytest.raises(BadEvent, match="same key twice"):
        decode_event(doubled)


def test_lengths_for_every_image() -> None:
    refused(wire(STARTED), images=3)


def test_bad_identities() -> None:
    kind, values = wire(DECLARED)
    for operation in ("", "x" * 32, "A" * 32, "0" * 31, 5, "0" * 32 + "\n"):
        refused([kind, values | {"operation": operation}])
    refused([kind, values | {"images": []}])
    image = values["images"][0]
    for at, bad in ((0, -1), (0, 2**64), (1, "5"), (2, -1), (3, 2**63), (5, "tag"), (5, b"\0" * 32)):
        if not (at == 0 and bad == 2**64):
            changed = [
                *image[:3],
                [bad if index == at else item for index, item in enumerate(image[3])],
                image[4],
            ]
            refused([kind, values | {"images": [changed]}])
    refused([kind, values | {"owner": [*values["owner"][:5]]}])


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\xdc\x00\x10" * 3000,
        b"\xc9\xff\xff\xff\xff\x05",
        b"\xc1",
        b"",
        b"\x92\xa1\xff\x80",
    ],
)
def test_msgpack_bombs(payload: bytes) -> None:
    with pytest.raises(BadEvent):
        decode_event(payload)


def test_deep_cursors_are_refused_on_both_sides() -> None:
    cursor: list[Any] = []
    for _ in range(100):
        cursor = [cursor]
    with pytest.raises(BadEvent):
        encode_event(ev.StepPrepared(1, "x", cursor=cursor))


@pytest.mark.parametrize(
    "event",
    [
        ev.StepPrepared(1, "x", cursor=b"bytes"),
        ev.StepPrepared(1, "x", cursor=object()),
        ev.StepPrepared(1, "x", cursor=2**70),
        ev.StepPrepared(-1, "x"),
        ev.StepPrepared(1, "x", link=(ev.PatchRecord(5, 0, None, b"x"),)),
        ev.StepPrepared(1, "x", link=(ev.PatchRecord(0, 0, b"xy", b"x"),)),
        ev.StepPrepared(1, "x", link=(ev.PatchRecord(0, 0, None, b"x" * (MAX_PAYLOAD + 1)),)),
        ev.Paused("a\0b", 1.0),
        ev.RecoveryStarted("undo", OWNER, 1.0),
        ev.Paused("x", float("nan")),
    ],
)
def test_what_could_not_be_read_back_is_not_written(event: ev.Event) -> None:
    with pytest.raises(BadEvent):
        encode_event(event, images=2)
