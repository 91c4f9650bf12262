"""Small JSON files beside snapshots, which no hash protects: what is read of one is whole, or it is refused."""

from __future__ import annotations

import json
import types
from dataclasses import fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def read_record(kind: type[Record], content: bytes) -> Record:
    """The dataclass that ``content``, a JSON object, holds; ValueError as of `checked_record`."""
    try:
        raw = json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    return checked_record(kind, raw)


def checked_record(kind: type[Record], raw: Any) -> Record:
    """The dataclass of decoded JSON; ValueError unless that is an object whose every field is of the type it declares.

    Somebody's editor or script wrote a text where a number belongs: that must not come to light as a TypeError in the
    middle of a worker.
    """
    try:
        record = kind(**raw)
    except TypeError as error:
        raise ValueError(str(error)) from error
    for name, declared in _declared(kind).items():  # type: ignore[arg-type] # to mypy no type[T] can be hashed
        value = getattr(record, name)
        if not _fits(value, declared):
            raise ValueError(f"{name} is {value!r}")
    return record


@cache
def _declared(kind: type) -> dict[str, Any]:
    """Name → type of each field; kept, because workers look at the pointer many times a second."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _fits(value: object, declared: Any) -> bool:
    origin, of = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in of)
    if origin is Literal:
        return value in of
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, of[0]) and _fits(v, of[1]) for k, v in value.items())
    if declared in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if declared is int else int | float)
    return isinstance(value, declared)
