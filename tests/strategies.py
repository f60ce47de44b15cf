"""Hypothesis strategies for any msgspec type, with its bounds: what a record may hold is what the tests draw."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=4,
)


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    """Values of a msgspec-decodable type."""
    return _values(inspect.type_info(type_))


def _values(info: inspect.Type) -> st.SearchStrategy[Any]:
    match info:
        case inspect.Metadata(type=inner):
            return _values(inner)
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=low, le=high):
            return st.integers(0 if low is None else low, 2**53 if high is None else high)
        case inspect.FloatType(ge=low, le=high):
            return st.floats(min_value=low, max_value=high, allow_nan=False, allow_infinity=False)
        case inspect.StrType():
            return _TEXT
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case inspect.UnionType(types=types):
            return st.one_of([_values(t) for t in types])
        case inspect.VarTupleType(item_type=item):
            return st.lists(_values(item), max_size=3).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*[_values(item) for item in items])
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_values(key), _values(value), max_size=3)
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{f.name: st.deferred(_lazy(f.type)) for f in fields})
        case inspect.AnyType():
            return _JSON
    raise NotImplementedError(info)


def _lazy(info: inspect.Type) -> Any:
    return lambda: _values(info)
