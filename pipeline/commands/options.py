"""The settings as command-line options, one for each key that `pipeline.config` declares."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config import FILE_VARIABLE, KEYS, SETTINGS, Config, Key, given, in_file, load
from pipeline.process.lifecycle import without_private

# The settings of a command that only sends requests to a running pipeline.
CLIENT_KEYS = ("nats_url", "state_dir")

# Read from the current folder if no other file is named.
DEFAULT_FILE = "headrace.toml"


def add_options(parser: argparse.ArgumentParser, *, keys: tuple[str, ...] = KEYS) -> None:
    """Add `--config` and the options of keys to the parser, below the headings of their sections."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file of settings, with keys such as http_port (default: {DEFAULT_FILE} in the current folder)",
    )
    group: argparse._ArgumentGroup | None = None
    section = title = ""
    for key in SETTINGS.values():
        section = key.setting.section or section
        if key.name not in keys:
            continue
        if group is None or section != title:
            group, title = parser.add_argument_group(section), section
        _add_option(group, key)


def config_from(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Config:
    """Return the settings in force for parsed options.

    Raises:
        ConfigError: a setting cannot be used.
    """
    return load(_options(args), environ=_settings(environ), file=settings_file(args, environ))


def with_keys_file(config: Config, args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Config:
    """Return the settings with the settings file as the file of the API keys, unless another source has the keys.

    Raises:
        ConfigError: as `pipeline.config.given`.
    """
    file = settings_file(args, environ)
    values = given(_options(args), environ=_settings(environ), file=file)
    from_file = in_file(file, SETTINGS).get("http_keys") if file is not None else None
    if file is None or config.http_keys_file or values.get("http_keys") != from_file:
        return config
    return msgspec.structs.replace(config, http_keys_file=str(file.absolute()))


def given_options(args: argparse.Namespace) -> list[str]:
    """Return the options of settings that were given, as they can be given to another command."""
    given = ["--config", args.config] if args.config else []
    for name, value in _options(args).items():
        if isinstance(value, bool):
            option = SETTINGS[name].option
            given.append(option if value else option.replace("--", "--no-", 1))
        elif value is not None:
            items = value if isinstance(value, list) else [value]
            given += [part for item in items for part in (SETTINGS[name].option, item)]
    return given


def settings_file(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the settings file that `--config` or `HEADRACE_CONFIG` names, else the one in the current folder, or None.

    An empty `HEADRACE_CONFIG` reads no file.
    """
    name = args.config or environ.get(FILE_VARIABLE)
    if name:
        return Path(name).expanduser()
    here = Path(DEFAULT_FILE)
    return here if name is None and here.is_file() else None


def names_a_broker(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether an option, the environment or the settings file sets `nats_url`.

    Raises:
        ConfigError: as `pipeline.config.given`.
    """
    return sets(args, "nats_url", environ)


def sets(args: argparse.Namespace, key: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether an option, the environment or the settings file sets a key.

    Raises:
        ConfigError: as `pipeline.config.given`.
    """
    return key in given(_options(args), environ=_settings(environ), file=settings_file(args, environ))


def _add_option(group: argparse._ArgumentGroup, key: Key) -> None:
    text = (key.setting.help + _default(key)).replace("%", "%%")
    if key.is_switch:
        group.add_argument(key.option, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif key.kind.repeats:
        group.add_argument(key.option, metavar=key.kind.metavar, action="append", help=text)
    else:
        group.add_argument(key.option, metavar=key.kind.metavar, help=text)


def _default(key: Key) -> str:
    """The default in parentheses, unless it means "none", which the help explains itself."""
    value = key.default
    if key.is_switch:
        return f" (default: {'on' if value else 'off'})"
    return f" (default: {value if isinstance(value, str) else key.written_default})" if value else ""


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(args, key, None) for key in KEYS}


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that begin like settings and are none."""
    return {name: value for name, value in without_private(environ).items() if name != FILE_VARIABLE}
