"""Why a value does not fit its type, in sentences of our own: which field, what was given, what is accepted.

`msgspec` names a field and a Python type. It does not say which values an enumeration has, and what was given stands
in few of its messages. Both are looked up here: the accepted values in the type, what was given in the value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

_T = TypeVar("_T")

UNREADABLE: Final = (msgspec.DecodeError, UnicodeError, RecursionError)
"""What `msgspec` raises for bytes that are not what they should be. Text that is not UTF-8, and lists in lists without
end, have errors of their own."""

_PATH = re.compile(r" - at (`key` in )?`\$(.*)`$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")
_FIELD_AT_FAULT = re.compile(r"Object (missing required|contains unknown) field `([^`]*)`")
_BYTE = re.compile(r"\(byte (\d+)\)$")
# Python's own bound depends on its version: about 1000 levels in 3.11, any number in 3.14. Machines with different
# versions accept the same bodies.
MAX_LEVELS: Final = 500
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_MAX_GIVEN_CHARS = 60
_MAX_FIELD_CHARS = 80
_MAX_KNOWN = 12


class Problem(NamedTuple):
    """Why a value was refused.

    Attributes:
        field: the path of the value, such as `messages[0].role`; empty for the whole.
        given: the value as it is shown, empty where it is not known, or is missing.
        accepted: which values are accepted, such as `an integer from 0 to 65535`; empty for an unknown field.
        missing: whether the field is required and absent.
        unknown: whether the type has no such field.
        value: what was given, UNSET where it is not known.
        known: the fields that the type has, for an unknown one.
    """

    field: str
    given: str = ""
    accepted: str = ""
    missing: bool = False
    unknown: bool = False
    value: Any = msgspec.UNSET
    known: tuple[str, ...] = ()

    @property
    def param(self) -> str | None:
        """The top-level field, or None where the whole is at fault."""
        return re.split(r"[.\[]", self.field, maxsplit=1)[0] or None

    def sentence(self, *, whole: str = "The body") -> str:
        """The problem as a sentence. `whole` names the value that has no path."""
        subject = f"`{self.field}`" if self.field else whole
        if self.missing:
            return f"{subject} is required."
        if self.unknown:
            known = f" The fields are {_listed(self.known, 'and')}." if 1 < len(self.known) <= _MAX_KNOWN else ""
            return f"{subject} is not a known field.{known}"
        given = f", not {self.given}" if self.given else ""
        return f"{subject} must be {self.accepted}{given}."


_WHOLE = Problem("")


class NotValid(ValueError):
    """A body that does not fit.

    Args:
        sentence: why, for the client.
        problem: the field at fault; without a path where the body is no JSON.
    """

    def __init__(self, sentence: str, problem: Problem = _WHOLE) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.problem = problem


def decode(body: bytes, kind: type[_T]) -> _T:
    """Read a JSON body.

    Raises:
        NotValid: it is no JSON, not of that kind, or nested too deeply.
    """
    if is_too_deep(body):
        raise NotValid(explain_json(RecursionError()))
    if not body.strip():
        raise NotValid("The body is empty. Send a JSON object.")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        problem = explain(error, kind, untyped(body))
        raise NotValid(problem.sentence(), problem) from None
    except UNREADABLE as error:
        raise NotValid(explain_json(error)) from None


def is_too_deep(body: bytes) -> bool:
    """Whether a JSON body has more levels of lists and objects than any is read with."""
    if body.count(b"{") + body.count(b"[") <= MAX_LEVELS:
        return False
    brackets = _STRING.sub(b"", body).translate(None, _NOT_BRACKETS)
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > MAX_LEVELS


def untyped(body: bytes) -> Any:
    """A JSON body without a type. UNSET if the JSON is broken after the refused field."""
    try:
        return msgspec.json.decode(body)
    except UNREADABLE:
        return msgspec.UNSET


def explain(error: msgspec.ValidationError, kind: Any, value: Any = msgspec.UNSET, *, strict: bool = True) -> Problem:
    """Read an error of `msgspec.convert` or of a decoder.

    Args:
        error: what was raised.
        kind: the type that was asked for.
        value: what was converted, or the body decoded without a type; UNSET where it is not known.
        strict: as it was given to `msgspec.convert`.
    """
    text = str(error)
    found = _PATH.search(text)
    of_key, path = (bool(found[1]), found[2]) if found else (False, "")
    field, accepting, given = _walk(path, _type_of(kind), value, strict=strict)
    if at_fault := _FIELD_AT_FAULT.match(text):
        name = _short(at_fault[2], _MAX_FIELD_CHARS)
        named = f"{field}.{name}" if field else name
        if at_fault[1].startswith("missing"):
            return Problem(named, accepted=_accepted(_field_of(accepting, at_fault[2])), missing=True)
        return Problem(named, unknown=True, known=_fields_of(accepting))
    if of_key:
        key = next((each for each in _members(accepting) if isinstance(each, inspect.DictType)), None)
        accepted = "an object" if key is None else f"an object whose keys are {_accepted(key.key_type)}"
        return Problem(field, accepted=accepted)
    return Problem(field, shown(given), _accepted(accepting), value=given)


def explain_json(error: Exception, *, whole: str = "The body") -> str:
    """A sentence about what is no JSON at all: msgspec.DecodeError, UnicodeError or RecursionError."""
    if isinstance(error, UnicodeError):
        return f"{whole} is not valid UTF-8."
    if isinstance(error, RecursionError):
        return f"{whole} is nested too deeply. The limit is {MAX_LEVELS} levels."
    place = _BYTE.search(str(error))
    where = f" (see byte {place[1]})" if place else ": it ends too early" if "truncated" in str(error) else ""
    return f"{whole} is not valid JSON{where}."


# ---- where -----------------------------------------------------------------------------------------------------------


@lru_cache(64)
def _type_of(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _walk(path: str, accepting: inspect.Type, value: Any, *, strict: bool) -> tuple[str, inspect.Type, Any]:
    """Follow msgspec's path. Returns it in our spelling, with the type and the value at its end."""
    field = ""
    for name, index in _STEP.findall(path):
        if name:
            field = f"{field}.{_short(name, _MAX_FIELD_CHARS)}" if field else _short(name, _MAX_FIELD_CHARS)
            accepting = _field_of(accepting, name)
            value = value.get(name, msgspec.UNSET) if isinstance(value, dict) else msgspec.UNSET
        elif index == "...":
            accepting = _item_of(accepting)
            key, value = _first_refused(value, accepting, strict=strict)
            field += f"[{shown(_short(key, _MAX_FIELD_CHARS))}]" if key else "[...]"
        else:
            field += f"[{index}]"
            accepting = _item_of(accepting)
            there = isinstance(value, list) and int(index) < len(value)
            value = value[int(index)] if there else msgspec.UNSET
    return field, accepting, value


def _members(accepting: inspect.Type) -> Iterable[inspect.Type]:
    """The types of a union, without metadata; of any other type that type."""
    if isinstance(accepting, inspect.Metadata):
        accepting = accepting.type
    if isinstance(accepting, inspect.UnionType):
        for each in accepting.types:
            yield from _members(each)
    else:
        yield accepting


def _field_of(accepting: inspect.Type, name: str) -> inspect.Type:
    for each in _members(accepting):
        if isinstance(each, inspect.StructType):
            for field in each.fields:
                if field.encode_name == name:
                    return field.type
    return inspect.AnyType()


def _fields_of(accepting: inspect.Type) -> tuple[str, ...]:
    structs = (each for each in _members(accepting) if isinstance(each, inspect.StructType))
    return tuple(field.encode_name for each in structs for field in each.fields)


def _item_of(accepting: inspect.Type) -> inspect.Type:
    for each in _members(accepting):
        if isinstance(each, inspect.ListType):
            return each.item_type
        if isinstance(each, inspect.DictType):
            return each.value_type
    return inspect.AnyType()


def _first_refused(value: Any, accepting: inspect.Type, *, strict: bool) -> tuple[str, Any]:
    """The entry of an object that its type refuses: msgspec does not name it."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if not _fits(item, accepting, strict=strict):
            return str(key), item
    return "", msgspec.UNSET


def _fits(item: Any, accepting: inspect.Type, *, strict: bool) -> bool:
    if not strict and isinstance(item, str):
        try:
            item = msgspec.json.decode(item)
        except UNREADABLE:
            return any(isinstance(each, inspect.StrType | inspect.AnyType) for each in _members(accepting))
    return any(_is_of(item, each) for each in _members(accepting))


def _is_of(item: Any, each: inspect.Type) -> bool:
    match each:
        case inspect.FloatType() | inspect.IntType():
            kinds = int | float if isinstance(each, inspect.FloatType) else int
            number = isinstance(item, kinds) and not isinstance(item, bool)
            return bool(number and all(holds(item) for holds in _bounds(each)))
        case inspect.StrType():
            return isinstance(item, str)
        case inspect.BoolType():
            return isinstance(item, bool)
        case inspect.NoneType():
            return item is None
        case _:
            return True


def _bounds(each: inspect.IntType | inspect.FloatType) -> list[Callable[[Any], bool]]:
    ge, gt, le, lt = each.ge, each.gt, each.le, each.lt
    return [
        lambda item: ge is None or item >= ge,
        lambda item: gt is None or item > gt,
        lambda item: le is None or item <= le,
        lambda item: lt is None or item < lt,
    ]


# ---- what is accepted ------------------------------------------------------------------------------------------------


def _accepted(accepting: inspect.Type) -> str:
    """The values of a type: the `description` in its Meta, if it has one, else what can be told from its kind."""
    if isinstance(accepting, inspect.Metadata):
        described = (accepting.extra_json_schema or {}).get("description")
        return str(described) if described else _accepted(accepting.type)
    if isinstance(accepting, inspect.UnionType):
        kinds = [each for each in accepting.types if not isinstance(each, inspect.NoneType)]
        return _listed(dict.fromkeys(alternative for each in kinds for alternative in _alternatives(each)))
    match accepting:
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return f"an integer{_range(accepting)}"
        case inspect.FloatType():
            return f"a number{_range(accepting)}"
        case inspect.StrType():
            return _text(accepting)
        case inspect.LiteralType():
            return _listed(_alternatives(accepting))
        case inspect.EnumType():
            return _listed(_alternatives(accepting))
        case inspect.ListType():
            return f"a list{_length(accepting.min_length, accepting.max_length, 'item')}"
        case inspect.NoneType():
            return "null"
        case inspect.AnyType():
            return "another value"
        case _:
            return "an object"


def _alternatives(accepting: inspect.Type) -> list[str]:
    """The members of an enumeration, each by itself; of any other type its values together."""
    match accepting:
        case inspect.LiteralType():
            return [msgspec.json.encode(value).decode() for value in accepting.values]
        case inspect.EnumType():
            return [msgspec.json.encode(each.value).decode() for each in accepting.cls]
        case inspect.BoolType():
            return ["true", "false"]
        case _:
            return [_accepted(accepting)]


def _listed(texts: Iterable[str], word: str = "or") -> str:
    *others, last = texts
    return f"{', '.join(others)} {word} {last}" if others else last


def _text(accepting: inspect.StrType) -> str:
    if accepting.pattern is not None:
        return f"a string that matches {accepting.pattern}"
    if accepting.min_length == 1 and accepting.max_length is None:
        return "a non-empty string"
    return f"a string{_length(accepting.min_length, accepting.max_length, 'character')}"


def _length(least: int | None, most: int | None, unit: str) -> str:
    if least and most:
        return f" of {least} to {most} {unit}s"
    if most is not None:
        return f" of at most {most} {unit}s"
    return f" of at least {least} {unit}{'s' if least > 1 else ''}" if least else ""


def _range(accepting: inspect.IntType | inspect.FloatType) -> str:
    least, above, most, below = accepting.ge, accepting.gt, accepting.le, accepting.lt
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}" if isinstance(least, float) else f" from {least} to {most}"
    parts = [
        f"{word} {bound:g}" if isinstance(bound, float) else f"{word} {bound}"
        for word, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    return f"{' of' if parts[0].startswith('at') else ''} {' and '.join(parts)}" if parts else ""


# ---- what was given --------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as an error shows it: a short one whole, any other by its kind and size."""
    if value is msgspec.UNSET:
        return ""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)} item{'s' if len(value) > 1 else ''}"
    if isinstance(value, str) and len(value) > _MAX_GIVEN_CHARS:
        return f"a string of {len(value)} characters"
    if value == "":
        return "an empty string"
    try:
        return _short(msgspec.json.encode(value).decode(), 2 * _MAX_GIVEN_CHARS)
    except (TypeError, UnicodeError):
        return _short(repr(value), _MAX_GIVEN_CHARS)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
