"""`headrace key`: make, list and remove the API keys of the HTTP gateway, in the settings file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
import tomlkit.exceptions
import tomlkit.items

from pipeline.commands import say, tell
from pipeline.config import Config, ConfigError, HttpKey, load
from pipeline.gateway.identity import make_key

_KEYS = "http_keys"
_AFTERWARDS = "a gateway that runs knows of it once it is started again"


def add(file: Path | None, name: str, fields: Mapping[str, Any]) -> int:
    """Make a key and print it, this once; its entry goes to the end of the file, or is printed where there is none.

    Args:
        file: the settings file; it is made where it does not exist.
        name: of the key.
        fields: what else its entry says, None for what it does not.

    Returns:
        1 where the file has a key of that name.

    Raises:
        ConfigError: a field or the file cannot be used.
    """
    secret, entry = _made(name, {key: value for key, value in fields.items() if value is not None})
    if file is None:
        say(secret)
        document = tomlkit.document()
        _append(document, entry)
        tell(f"\nIts entry, for the settings file:\n\n{tomlkit.dumps(document).strip()}")
        return 0
    document = _read(file)
    if any(there["name"] == name for there in document.get(_KEYS, [])):
        tell(f"headrace: {file} has a key {name!r} already: remove it, or choose another name")
        return 1
    _append(document, entry)
    _write(file, document)
    say(secret)
    tell(f"added to {file}, which does not hold the key itself; {_AFTERWARDS}")
    return 0


def remove(file: Path | None, name: str) -> int:
    """Remove a key from the settings file. Returns 1 where it has none of that name.

    Raises:
        ConfigError: there is no file, or it cannot be used.
    """
    if file is None:
        raise ConfigError("name the settings file that holds the key: --config FILE")
    document = _read(file)
    keys = document.get(_KEYS, [])
    at = next((index for index, there in enumerate(keys) if there["name"] == name), None)
    if at is None:
        tell(f"headrace: {file} has no key {name!r}")
        return 1
    del keys[at]
    if not keys:
        del document[_KEYS]
    _write(file, document)
    tell(f"removed from {file}; {_AFTERWARDS}")
    return 0


def show_list(config: Config) -> int:
    """Print the keys that are in force, and what each may."""
    if not config.http_keys:
        tell("no keys: everybody on this machine may everything, and nobody from elsewhere may anything")
        return 0
    from rich.console import Console  # noqa: PLC0415 - not needed to make one
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "tenant", "priority", "highest", "operator", "answers/s", "lists/s", "statistics/s"):
        table.add_column(column, overflow="fold")
    for key in config.http_keys:
        rates = [
            "-" if rate is None else f"{rate:g}" for rate in (key.answers_per_s, key.lists_per_s, key.statistics_per_s)
        ]
        operator = "yes" if key.operator else "-"
        table.add_row(key.name, key.tenant or key.name, key.priority, key.highest, operator, *rates)
    Console(highlight=False, markup=False).print(table)
    return 0


def _made(name: str, fields: Mapping[str, Any]) -> tuple[str, HttpKey]:
    secret, entry = make_key(name)
    try:
        return secret, msgspec.convert({**msgspec.to_builtins(entry), **fields}, HttpKey)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no such key can be: {error}") from None


def _append(document: tomlkit.TOMLDocument, entry: HttpKey) -> None:
    table = tomlkit.table()
    table.update(msgspec.to_builtins(entry))
    there = document.get(_KEYS)
    if isinstance(there, tomlkit.items.AoT):
        there.append(table)
        return
    keys = tomlkit.aot()
    for old in there or []:  # written in one line
        keys.append(tomlkit.item(dict(old)))
    keys.append(table)
    if there is not None:
        del document[_KEYS]
    document[_KEYS] = keys


def _read(file: Path) -> tomlkit.TOMLDocument:
    """The file as it is written; an empty one where there is none.

    Raises:
        ConfigError: it cannot be read, or is no settings file.
    """
    if not file.exists():
        return tomlkit.document()
    load(environ={}, file=file)
    return tomlkit.parse(file.read_text(encoding="utf-8"))


def _write(file: Path, document: tomlkit.TOMLDocument) -> None:
    """Whole or not at all; who may read the file stays as it was, and a new one is its owner's."""
    draft = file.with_name(f"{file.name}.part")
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w", encoding="utf-8") as written:  # noqa: PTH123
            written.write(tomlkit.dumps(document))
        load(environ={}, file=draft)
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
