"""The settings in force: which source wins, and what one setting means for another.

A command-line option overrides the environment, which overrides the TOML file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pipeline.config.declaring import ENV_PREFIX
from pipeline.config.settings import SETTINGS, Config
from pipeline.config.tables import HttpKey, ModelEntry
from pipeline.config.values import ConfigError, Given, converted, entries, in_environment, in_file, named_entries, read


def load(
    options: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Config:
    """Return the settings in force.

    Args:
        options: command-line options by key. None means that an option was not given.
        environ: the environment. As in options, tables and lists are TOML values or JSON.
        file: a TOML file with keys at its top level.

    Raises:
        ConfigError: an unknown key, an invalid value, or a file that cannot be read.
    """
    values = given(options, environ=environ, file=file)
    if "OLLAMA_HOST" in environ:
        values.setdefault("ollama_host", Given(environ["OLLAMA_HOST"], "OLLAMA_HOST"))
    if "http_keys" in values:
        values["http_keys"] = _distinct(entries(HttpKey, values["http_keys"]))
    if "openai" in values:
        values["openai"] = _server_urls(values["openai"])
    if "models" in values:
        values["models"] = named_entries(ModelEntry, values["models"])
        tables = values["models"].value
        if "model" not in values and isinstance(tables, dict) and tables:
            values["model"] = Given(next(iter(tables)), values["models"].place)
    if "model" in values:
        values |= _several(values["model"], values.get("models"))
    config = converted(Config, values)
    if config.saturated_at <= config.busy_at:
        raise ConfigError(f"saturated_at ({config.saturated_at:g}) must be greater than busy_at ({config.busy_at:g}).")
    return config


def _distinct(keys: Given) -> Given:
    """Return API keys of which no two share a name, which would let each reach the other's requests, or a hash.

    Raises:
        ConfigError: two of them do.
    """
    seen: dict[str, str] = {}
    for key in keys.value if isinstance(keys.value, list) else []:
        if not isinstance(key, HttpKey):
            break  # refused later, with the whole value
        if key.name in seen.values():
            raise ConfigError(f'{keys.place}: two keys have the name "{key.name}". Rename or remove one.')
        if (other := seen.setdefault(key.hash, key.name)) != key.name:
            raise ConfigError(f'{keys.place}: "{other}" and "{key.name}" are the same key. Remove one.')
    return keys


def _several(model: Given, models: Given | None) -> dict[str, Given]:
    """Return the values of `model` and `models` for a model that is given several times. The first is the default."""
    places = model.value
    if not model.typed and isinstance(places, list) and len(places) == 1 and isinstance(places[0], str):
        places = read(places[0], model.place).value
    if not isinstance(places, list):
        return {"model": Given(places, model.place, model.typed)}
    if not places or not all(isinstance(place, str) and place for place in places):
        raise ConfigError(f"{model.place}: each model must be the name, the folder or the GGUF file of one.")
    first, *others = dict.fromkeys(places)
    tables = models.value if models is not None and isinstance(models.value, dict) else {}
    further = dict.fromkeys(others, ModelEntry()) | tables
    return {"model": Given(first, model.place), "models": Given(further, models.place if models else model.place)}


def base_url(url: str) -> str:
    """Return the URL of a server below which it has `/v1`. One without a scheme is reached over HTTP.

    Raises:
        ConfigError: it is not the URL of a server.
    """
    text = url.strip() if "://" in url else f"http://{url.strip()}"
    text = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(text)
        names_server = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        parts, names_server = urlsplit(""), False
    if not names_server or parts.query or parts.fragment or any(char.isspace() for char in text):
        raise ConfigError(f'"{url}" is not the URL of a server, such as http://127.0.0.1:8000.')
    if "@" in parts.netloc:
        raise ConfigError("The URL of a server must not hold a password. Set `openai_key` instead.")
    return text


def _server_urls(given: Given) -> Given:
    """Return the URLs of servers as `base_url` writes them, each once. The text of a variable is one URL."""
    urls = [given.value] if isinstance(given.value, str) and not given.typed else given.value
    if not given.typed and isinstance(urls, list) and len(urls) == 1 and str(urls[0]).startswith("["):
        urls = read(urls[0], given.place).value
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        return given
    try:
        return Given(list(dict.fromkeys(map(base_url, filter(None, urls)))), given.place)
    except ConfigError as error:
        raise ConfigError(f"{given.place}: {error}") from None


def given(
    options: Mapping[str, Any] | None = None, *, environ: Mapping[str, str] = os.environ, file: Path | None = None
) -> dict[str, Given]:
    """Return the values that were given, by key, each from the source that wins.

    Raises:
        ConfigError: an unknown key, a table or list that is neither TOML nor JSON, or a file that cannot be read.
    """
    values: dict[str, Given] = {}
    if file is not None:
        values |= in_file(file, SETTINGS)
    values |= in_environment(environ, SETTINGS)
    for key, value in (options or {}).items():
        if value is not None:
            values[key] = read(value, SETTINGS[key].option)
    return values


def to_environment(config: Config) -> dict[str, str]:
    """Return the environment variables from which a child process reads the same settings."""
    values = msgspec.to_builtins(config)
    return {
        ENV_PREFIX + key.upper(): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in values.items()
        if value is not None
    }
