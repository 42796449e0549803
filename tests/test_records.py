"""`drivers/records.py` against `typing.NamedTuple`."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Any

import pytest
from safeimg.drivers import records


def record_of(base: Any, name: str) -> Any:
    class Made(base):  # type: ignore[misc]
        """One of its own."""

        one: int
        two: str | None = None
        three: tuple[int, ...] = ()

        @property
        def more(self) -> int:
            return self.one + 1

    Made.__name__ = Made.__qualname__ = name  # where pickle looks for it
    return Made


Theirs = record_of(typing.NamedTuple, "Theirs")
Ours = record_of(records.NamedTuple, "Ours")


class Empty(records.NamedTuple):
    pass


BOTH = pytest.mark.parametrize("kind", [Theirs, Ours])


@BOTH
def test_what_a_record_does(kind: Any) -> None:
    record = kind(1, three=(4, 5))
    assert record == (1, None, (4, 5)) and isinstance(record, tuple) and hash(record) == hash((1, None, (4, 5)))
    assert (record.one, record.two, record.three, record.more) == (1, None, (4, 5), 2)
    assert record._replace(two="x") == (1, "x", (4, 5)) and type(record._replace()) is kind
    assert record._asdict() == {"one": 1, "two": None, "three": (4, 5)}
    assert kind._fields == kind.__match_args__ == ("one", "two", "three")
    assert kind._make([1, 2, 3]) == (1, 2, 3)
    assert repr(record) == f"{kind.__name__}(one=1, two=None, three=(4, 5))"
    assert kind.__doc__.startswith("One of ")
    one, _two, _three = record
    assert one == 1
    for copied in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert copied == record and type(copied) is kind
    match record:
        case kind(one=1, two=None):
            pass
        case _:
            pytest.fail("no match")


@BOTH
def test_what_it_refuses(kind: Any) -> None:
    for wrong in ((), (1, 2, 3, 4)):
        with pytest.raises(TypeError):
            kind(*wrong)
    with pytest.raises(TypeError):
        kind(1, four=4)
    with pytest.raises(TypeError):
        kind._make([1])
    with pytest.raises(ValueError):
        kind(1)._replace(four=4)
    with pytest.raises(AttributeError):
        kind(1).one = 2
    with pytest.raises(AttributeError):
        kind(1).four = 2


def test_records_without_fields_and_below_others() -> None:
    class Derived(Ours):
        def twice(self) -> int:
            return 2 * self.one

    assert Empty() == () and repr(Empty()) == "Empty()"
    assert Derived(2).twice() == 4 and type(Derived(2)._replace(one=3)) is Derived


def test_a_record_is_made_of_fields_and_methods_alone() -> None:
    with pytest.raises(TypeError, match="fields and methods"):
        exec("class Wrong(records.NamedTuple, int): pass", {"records": records})
    with pytest.raises(TypeError, match="fields and methods"):
        exec("class Wrong(records.NamedTuple):\n    def __new__(cls): pass", {"records": records})
