"""How a setting is declared: a field of a struct, annotated with what its values are called and with its texts.

`--help`, `docs/configuration.md` and the messages about invalid values are made from the declarations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Struct

ENV_PREFIX = "HEADRACE_"


@dataclass(frozen=True, slots=True)
class ValueKind:
    """What the values of a type are called.

    Attributes:
        metavar: the placeholder of a value in `--help`.
        phrase: the noun that completes "... is not": `a port number (0 to 65535)`.
        advice: a sentence that follows it.
        secret: whether a message must not quote the value.
        repeats: whether its option can be given several times, once for each item of a list.
    """

    metavar: str
    phrase: str
    advice: str = ""
    secret: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """The texts of one key.

    Attributes:
        help: one line, without a capital or a full stop, for `--help`.
        more: sentences that follow it in `docs/configuration.md`.
        section: the heading, if the key is the first one below it.
    """

    help: str
    more: str = ""
    section: str = ""


class Key(NamedTuple):
    """One setting as it is declared, for the options and the documentation."""

    name: str
    default: Any
    kind: ValueKind
    setting: Setting

    @property
    def option(self) -> str:
        """Its command-line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENV_PREFIX + self.name.upper()

    @property
    def written_default(self) -> str:
        """The default as TOML, or `none`."""
        if self.default is None:
            return "none"
        if isinstance(self.default, dict):
            return "{" + ", ".join(f"{name} = {item}" for name, item in self.default.items()) + "}"
        return msgspec.json.encode(self.default).decode()

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return isinstance(self.default, bool)


_N = TypeVar("_N", ValueKind, Setting)


def declared(config: type[Struct]) -> dict[str, Key]:
    """Return the settings that the fields of a struct declare, by name, in their order, inherited ones last."""
    defaults = msgspec.to_builtins(config())
    inherited = {name for base in config.__bases__ for name in getattr(base, "__struct_fields__", ())}
    return {
        each.name: Key(each.name, defaults[each.name], note(each.type, ValueKind), note(each.type, Setting))
        for each in sorted(msgspec.structs.fields(config), key=lambda each: each.name in inherited)
    }


def _notes(annotation: Any, what: type[_N]) -> Iterator[_N]:
    """The annotations of a type, and then those of the types inside it."""
    yield from (each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, what))
    for inner in get_args(annotation):
        yield from _notes(inner, what)


def note(annotation: Any, what: type[_N]) -> _N:
    """The note of a kind that a type has, or a type inside it."""
    return next(_notes(annotation, what))
