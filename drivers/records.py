"""`typing.NamedTuple`, made in a tenth of the time.

A command that ends within a tenth of a second loads a hundred records, and `typing` takes a third of that time to make
them: it compiles each annotation, and a function for each class. Here annotations stay as they are, and records with
as many fields share the code of one function. A type checker sees `typing`'s; `_fields`, `_replace`, `_asdict` and
`_make` are there.
"""

from __future__ import annotations

from functools import cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    try:
        from _collections import _tuplegetter
    except ImportError:  # then it is slower

        def _tuplegetter(index, doc):
            return property(lambda record: tuple.__getitem__(record, index), doc=doc)

    class _Fields(tuple):
        """What all records have."""

        __slots__ = ()
        _fields: tuple[str, ...] = ()

        @classmethod
        def _make(cls, values):
            record = tuple.__new__(cls, values)
            if len(record) != len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, not {len(record)}")
            return record

        def _replace(self, /, **values):
            record = tuple.__new__(type(self), map(values.pop, self._fields, self))
            if values:
                raise ValueError(f"{type(self).__name__} has no fields {sorted(values)}")
            return record

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            shown = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({shown})"

        def __getnewargs__(self):
            return tuple(self)

    class _Made(type):
        """Makes a class of fields and methods into a tuple's."""

        def __new__(cls, name, bases, namespace):
            fields = tuple(namespace.get("__annotations__", ()))
            defaults = tuple(namespace.pop(field) for field in fields if field in namespace)
            if any(field in namespace for field in ("__new__", "__slots__")) or len(bases) > 1:
                raise TypeError(f"{name}: a record has fields and methods, and no other base")
            namespace["__slots__"] = ()
            namespace["_fields"] = namespace["__match_args__"] = fields
            namespace["__new__"] = _new(name, fields, defaults)
            for index, field in enumerate(fields):
                namespace[field] = _tuplegetter(index, None)
            return type.__new__(type, name, (_Fields,), namespace)

    NamedTuple = type.__new__(_Made, "NamedTuple", (), {})


def _new(name: str, fields: tuple[str, ...], defaults: tuple[Any, ...]) -> FunctionType:
    """`__new__` of a record, with its fields as parameters."""
    code = _code(len(fields)).replace(co_varnames=("cls", *fields), co_qualname=f"{name}.__new__")
    return FunctionType(code, {"make": tuple.__new__}, "__new__", defaults)


@cache
def _code(fields: int) -> CodeType:
    names = ", ".join(f"field{number}" for number in range(fields))
    made = eval(f"lambda cls, {names}: make(cls, ({names}{',' if fields else ''}))")
    code = made.__code__
    assert isinstance(code, CodeType)
    return code
