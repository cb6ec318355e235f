"""`headrace key`: add, list and remove the API keys of the HTTP gateway in the settings file."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
import tomlkit.exceptions
import tomlkit.items

from pipeline.commands import say, tell
from pipeline.config import FILE_ENCODING, Config, ConfigError, Given, HttpKey, converted, load
from pipeline.gateway.identity import make_key
from pipeline.wire.subjects import Priority

_KEYS = "http_keys"
_RATES = ("answers_per_s", "lists_per_s", "statistics_per_s")
_QUOTAS = ("requests_per_minute", "tokens_per_minute", "tokens_per_day")
_LIST_CHARS = 160
_URGENCY = {Priority.LOW: 0, Priority.MEDIUM: 1, Priority.HIGH: 2}
LIMITS = (*_RATES, *_QUOTAS)


def add(file: Path | None, name: str, fields: Mapping[str, Any]) -> int:
    """Make a key, print it, and append its entry to the file. Without a file, print the entry.

    The key itself is not stored, so it cannot be shown again.

    Args:
        file: the settings file. It is created if it does not exist.
        name: the name of the key.
        fields: the other fields of the entry. None means the default.

    Returns:
        1 if the file already has a key of that name, else 0.

    Raises:
        ConfigError: a field is invalid, or the file cannot be read or written.
    """
    secret, entry = _made(name, fields)
    if file is None:
        say(secret)
        document = tomlkit.document()
        _append(document, entry)
        tell(f"\nAdd this entry to the settings file:\n\n{tomlkit.dumps(document).strip()}")
        return 0
    document = _read(file)
    if any(there["name"] == name for there in document.get(_KEYS, [])):
        tell(f'headrace: {file} already has a key "{name}". Remove it, or use another name.')
        return 1
    _append(document, entry)
    _write(file, document)
    say(secret)
    first = len(document[_KEYS]) == 1
    tell(
        f"Added the hash of the key to {file}. The key itself is not stored and cannot be shown again.\n"
        + _applied(file)
        + (" Restart it as well, so that its broker is protected too." if first else "")
    )
    return 0


def limit(file: Path | None, name: str, fields: Mapping[str, Any]) -> int:
    """Change limits of a key in the settings file. Return 1 if the file has no key of that name, else 0.

    Args:
        file: the settings file.
        name: of the key.
        fields: the limits by their names in the entry. None leaves a limit as it is.

    Raises:
        ConfigError: no file or no limit is named, a limit is invalid, or the file cannot be read or written.
    """
    if file is None:
        raise ConfigError("Name the settings file that contains the key: --config FILE.")
    changes = {field: value for field, value in fields.items() if value is not None}
    if not changes:
        raise ConfigError("Name a limit to change, such as --tokens-per-day 100000.")
    document = _read(file)
    entry = next((there for there in document.get(_KEYS, []) if there["name"] == name), None)
    if entry is None:
        tell(f'headrace: {file} has no key "{name}".')
        return 1
    given = {field: Given(value, "--" + field.replace("_", "-")) for field, value in changes.items()}
    whole = {field: Given(value, field, typed=True) for field, value in entry.unwrap().items()}
    valid = msgspec.to_builtins(converted(HttpKey, whole | given))
    for field in changes:
        if field in valid:
            entry[field] = valid[field]
        else:
            entry.pop(field, None)
    _write(file, document)
    tell(f'Changed the limits of the key "{name}" in {file}.\n{_applied(file)}')
    return 0


def remove(file: Path | None, name: str) -> int:
    """Remove a key from the settings file. Return 1 if the file has no key of that name, else 0.

    Raises:
        ConfigError: no file is named, or it cannot be read or written.
    """
    if file is None:
        raise ConfigError("Name the settings file that contains the key: --config FILE.")
    document = _read(file)
    keys = document.get(_KEYS, [])
    at = next((index for index, there in enumerate(keys) if there["name"] == name), None)
    if at is None:
        tell(f'headrace: {file} has no key "{name}".')
        return 1
    del keys[at]
    if not keys:
        del document[_KEYS]
    _write(file, document)
    tell(f'Removed the key "{name}" from {file}.\n{_applied(file)}')
    return 0


def show_list(config: Config) -> int:
    """Print the configured keys and their permissions."""
    if not config.http_keys:
        tell(
            "There are no API keys. Without keys, anyone on this machine can do anything, and other machines have no "
            "access."
        )
        return 0
    from rich.console import Console  # noqa: PLC0415 - `add` and `remove` need no table
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "tenant", "priority", "highest", "operator", *map(_heading, LIMITS)):
        table.add_column(column, overflow="fold")
    for key in config.http_keys:
        rates = ["-" if (rate := getattr(key, name)) is None else f"{rate:g}" for name in _RATES]
        rates += [f"{quota}" if (quota := getattr(key, name)) else "-" for name in _QUOTAS]
        operator = "yes" if key.operator else "-"
        table.add_row(key.name, key.tenant or key.name, key.priority, key.highest, operator, *rates)
    console = Console(highlight=False, markup=False)
    # A key stays on one line, which a narrow terminal wraps itself.
    console.width = max(console.width, _LIST_CHARS)
    console.print(table)
    return 0


def _heading(limit: str) -> str:
    return limit.replace("_per_", "/").replace("minute", "min")


def _made(name: str, fields: Mapping[str, Any]) -> tuple[str, HttpKey]:
    """A new key and its entry."""
    secret, entry = make_key(name)
    options = {
        field: Given(value, "--" + field.replace("_", "-")) for field, value in fields.items() if value is not None
    }
    made = converted(HttpKey, {"name": Given(name, ""), "hash": Given(entry.hash, ""), **options})
    if "priority" in options and _URGENCY[made.priority] > _URGENCY[made.highest]:
        raise ConfigError(f"--priority {made.priority} is above --highest {made.highest}. Change one of them.")
    return secret, made


def _applied(file: Path) -> str:
    return f"A gateway that runs with --config {shlex.quote(str(file))} applies the change within seconds."


def _append(document: tomlkit.TOMLDocument, entry: HttpKey) -> None:
    table = tomlkit.table()
    table.update(msgspec.to_builtins(entry))
    there = document.get(_KEYS)
    if isinstance(there, tomlkit.items.AoT):
        there.append(table)
        return
    keys = tomlkit.aot()
    for old in there or []:  # a list in one line
        keys.append(tomlkit.item(dict(old)))
    keys.append(table)
    if there is not None:
        del document[_KEYS]
    document[_KEYS] = keys


def _read(file: Path) -> tomlkit.TOMLDocument:
    """The content of the file, or an empty document if there is no file.

    Raises:
        ConfigError: the file cannot be read, or has an invalid setting.
    """
    if not file.exists():
        return tomlkit.document()
    load(environ={}, file=file)
    return tomlkit.parse(file.read_text(encoding=FILE_ENCODING))


def _write(file: Path, document: tomlkit.TOMLDocument) -> None:
    """Replace the file in one step. Its permissions stay; a new file is readable by its owner only."""
    draft = file.with_name(f"{file.name}.part")
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode), "w", encoding="utf-8") as written:  # noqa: PTH123
            written.write(tomlkit.dumps(document))
        load(environ={}, file=draft)
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"Cannot write {file}: {error.strerror}.") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
