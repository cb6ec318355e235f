"""Values of settings: where each can be given, and how it is checked.

A message about an invalid value is made from the setting's declaration: it names the place where the value was given
and the values that are accepted.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Struct

from pipeline.config.declaring import ENV_PREFIX, ValueKind, note
from pipeline.wire.validation import UNREADABLE

# Names the settings file. It is no setting.
FILE_VARIABLE = ENV_PREFIX + "CONFIG"
# Editors on Windows write a byte order mark, which is no TOML.
FILE_ENCODING = "utf-8-sig"
_LIST_SETTINGS = "`headrace up --help` lists the settings."
_SHOWN_CHARS = 80
# Keys of older versions, and the keys that replace them.
_REPLACED = {"suspended_kv_bytes": "kept_kv_bytes"}


class ConfigError(Exception):
    """A setting that cannot be used. The message names the place where it was given and the values it takes."""


class Given(NamedTuple):
    """A value and the place where it was given: `--slots`, `HEADRACE_SLOTS`, `slots in headrace.toml`; "" for none.

    Attributes:
        value: the value.
        place: where it was given.
        typed: whether it was written in TOML or JSON, where a number is no text. An option or a variable is a text.
    """

    value: Any
    place: str
    typed: bool = False


_S = TypeVar("_S", bound=Struct)


def in_file(file: Path, known: Container[str]) -> dict[str, Given]:
    """Return the values in a TOML file, by key.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or has a key that is not known.
    """
    try:
        values = tomllib.loads(file.read_text(encoding=FILE_ENCODING))
    except OSError as error:
        raise ConfigError(f"Cannot read the settings file {file}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {file} is not valid TOML: {error}.") from None
    for key in values:
        if key not in known:
            raise ConfigError(f'Unknown setting "{key}" in {file}. {_advice(key)}')
    return {key: Given(value, f"{key} in {file}", typed=True) for key, value in values.items()}


# The variables that Kubernetes sets in each pod beside a Service named `headrace` or `headrace-...`, and that
# `docker --link` sets for a container of that name.
_SERVICE_LINK = re.compile(
    rf"{ENV_PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?|NAME|ENV_\w+)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")


def in_environment(environ: Mapping[str, str], known: Container[str]) -> dict[str, Given]:
    """Return the values in the environment, by key, without the variables that announce a service.

    Raises:
        ConfigError: a variable that begins with `HEADRACE_` is not known, or as `read`.
    """
    values = {}
    for name, text in environ.items():
        key = name.removeprefix(ENV_PREFIX).lower()
        if not name.startswith(ENV_PREFIX) or name == FILE_VARIABLE or _is_service_link(name, text, known=key in known):
            continue
        if key not in known:
            raise ConfigError(f"Unknown setting {name}. {_advice(key)}")
        values[key] = read(text, name)
    return values


def _advice(key: str) -> str:
    """What to do about a key that is not known."""
    replacement = _REPLACED.get(key)
    return _LIST_SETTINGS if replacement is None else f"Use {replacement} instead, which replaces it."


def _is_service_link(name: str, text: str, *, known: bool) -> bool:
    """Whether a variable announces a service. `HEADRACE_HTTP_PORT` is both a setting and a link to `headrace-http`."""
    if name.endswith("_PORT") and _SERVICE_ADDRESS.match(text):
        return True
    return not known and _SERVICE_LINK.fullmatch(name) is not None


def read(value: Any, place: str) -> Given:
    """Return a value with its place. The text of a table or a list is decoded from JSON or TOML.

    Raises:
        ConfigError: a table or list is neither JSON nor TOML.
    """
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return Given(value, place)
    try:
        return Given(msgspec.json.decode(value), place, typed=True)
    except UNREADABLE:
        pass
    try:
        return Given(tomllib.loads(f"value = {value}")["value"], place, typed=True)
    except (tomllib.TOMLDecodeError, RecursionError):
        raise ConfigError(f"{place}: {_shown(value)} is neither JSON nor a TOML value.") from None


def converted(struct: type[_S], values: Mapping[str, Given]) -> _S:
    """Return the struct with these values, each converted to the type of its field.

    Raises:
        ConfigError: a value does not fit its field.
    """
    fields = {each.name: each.type for each in msgspec.structs.fields(struct)}
    fitting = {}
    for name, (value, place, typed) in values.items():
        table = _table_of(fields[name])
        if table is not None and isinstance(value, dict):
            fitting[name] = _entry(table, place, value)
            continue
        if typed and isinstance(value, float) and value.is_integer():
            value = int(value)  # noqa: PLW2901 - 8e9 is a whole number, and one that fits where a fraction does
        try:
            fitting[name] = msgspec.convert(value, fields[name], strict=typed)
        except msgspec.ValidationError:
            raise ConfigError(_refusal(value, place, note(fields[name], ValueKind))) from None
    return struct(**fitting)


def _table_of(annotation: Any) -> type[Struct] | None:
    """The struct whose table a field takes; None if it takes something else, also a list or a table of such tables."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        return annotation
    if get_origin(annotation) in (list, dict):
        return None
    return next(filter(None, map(_table_of, get_args(annotation))), None)


def entries(struct: type[Struct], given: Given) -> Given:
    """Return a list of tables with each of them converted to the struct; anything else is returned unchanged.

    Raises:
        ConfigError: a table is invalid. The message names the table and its key.
    """
    tables, place, typed = given
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return given
    return Given([_entry(struct, f"{place}, entry {n}", table) for n, table in enumerate(tables, 1)], place, typed)


def named_entries(struct: type[Struct], given: Given) -> Given:
    """Return a table of tables with each of them converted to the struct; anything else is returned unchanged.

    Raises:
        ConfigError: a table is invalid. The message names the table and its key.
    """
    tables, place, typed = given
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        return given
    return Given({name: _entry(struct, f"{place}, {name}", table) for name, table in tables.items()}, place, typed)


def _entry(struct: type[_S], place: str, table: Mapping[str, Any]) -> _S:
    fields = msgspec.structs.fields(struct)
    known = [each.name for each in fields]
    for name in table:
        if name not in known:
            raise ConfigError(f'{place}: unknown key "{name}". Its keys are {", ".join(known)}.')
    for name in [each.name for each in fields if each.required]:
        if name not in table:
            raise ConfigError(f'{place}: the key "{name}" is missing.')
    return converted(struct, {name: Given(value, f"{place}, {name}", typed=True) for name, value in table.items()})


def _refusal(value: Any, place: str, kind: ValueKind) -> str:
    shown = "the value" if kind.secret else _shown(value)
    return f"{place}: {shown} is not {kind.phrase}. {kind.advice}".removeprefix(": ").rstrip()


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
