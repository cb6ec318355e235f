"""Every setting of headrace, in one flat structure: an option wins over the environment, that over the TOML file.

A key `http_port` is the option `--http-port`, the environment variable `HEADRACE_HTTP_PORT` and the TOML key
`http_port`. An unknown key or a bad value is refused with its name, never ignored.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from pipeline.wire.subjects import Priority

ENV_PREFIX = "HEADRACE_"

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(ge=0)]


class ConfigError(Exception):
    """A setting that cannot be used; the message names it and says what it takes."""


class HttpKey(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """An API key of the HTTP gateway: who has it, and what it may.

    Attributes:
        name: stands in the ids of its requests and in limits.
        hash: of the key, as `sha256:<salt>:<digest>`; the key itself is kept nowhere.
        tenant: whom its requests are for; by default its name.
        priority: of requests that name none.
        highest: the most urgent priority that it may ask for.
        operator: whether it sees, cancels and replays everybody's requests, and not its tenant's alone.
        answers_per_s, lists_per_s, statistics_per_s: its own limits instead of the configured ones; 0 for none.
    """

    # Not `LLM`, which begins the ids that the broker gives: the key would reach every request that brought none.
    name: Annotated[str, Meta(pattern="^(?!LLM$)[A-Za-z0-9]{1,32}$")]
    hash: Annotated[str, Meta(pattern="^sha256:[0-9A-Za-z]{8,64}:[0-9a-f]{64}$")]
    tenant: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{0,64}$")] = ""
    priority: Priority = Priority.MEDIUM
    highest: Priority = Priority.HIGH
    operator: bool = False
    answers_per_s: Rate | None = None
    lists_per_s: Rate | None = None
    statistics_per_s: Rate | None = None


class Config(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The settings. Times in seconds, sizes in bytes or messages, as the names say."""

    # Broker.
    nats_url: str = "nats://127.0.0.1:4222"
    nats_port: Port = 0
    http_port: Port = 0
    state_dir: str = ""
    replicas: Literal[1, 3, 5] = 1
    lane_max_messages: Count = 10_000
    max_body_bytes: Count = 1 << 20

    # HTTP.
    http_host: str = "127.0.0.1"
    http_keys: list[HttpKey] = field(default_factory=list)
    http_priority: Priority = Priority.MEDIUM
    http_answers_per_s: Rate = 100.0
    http_lists_per_s: Rate = 20.0
    http_statistics_per_s: Rate = 20.0
    http_connections: Count = 2000
    http_stall_timeout_s: Positive = 20.0

    # The MLX engine.
    engine: Literal["mlx", "simulated"] = "mlx"
    model: str = "headrace-demo"
    slots: Annotated[int, Meta(ge=1, le=1024)] = 8
    prefill_step_tokens: Count = 256
    default_max_tokens: Count = 1024
    kv_bytes_limit: Annotated[int, Meta(ge=0)] = 0
    step_timeout_s: Positive = 60.0
    engine_faults: bool = False

    # The simulated engine.
    simulated_tokens_per_s: Positive = 400.0
    simulated_prefill_tokens_per_s: Positive = 4000.0
    simulated_answer_tokens: Count = 32
    simulated_load_s: Annotated[float, Meta(ge=0)] = 0.0

    # Sharing the engine.
    weights: dict[Priority, Positive] = field(
        default_factory=lambda: {Priority.HIGH: 6.0, Priority.MEDIUM: 3.0, Priority.LOW: 1.0}
    )
    floor_share: Share = 0.05
    max_wait_s: Positive = 600.0
    prompt_token_cost: Annotated[float, Meta(ge=0)] = 0.1

    # Delivery.
    lease_s: Annotated[float, Meta(ge=1)] = 3.0
    max_attempts: Count = 3
    default_timeout_s: Positive | None = None
    drain_timeout_s: Positive = 20.0

    # Load.
    target_wait_s: Positive = 2.0
    busy_at: Positive = 0.7
    saturated_at: Positive = 1.0

    # Ollama.
    ollama_host: str = ""
    ollama_slots: Count = 4
    ollama_queue: Count = 4
    ollama_standin: bool = True
    ollama_timeout_s: Positive = 120.0
    spill_models: dict[str, str] = field(default_factory=dict)
    internal_models: list[str] = field(default_factory=lambda: ["tinyllama"])
    classifier_model: str = ""
    classifier_timeout_s: Positive = 0.5

    log_level: Literal["debug", "info", "warning", "error"] = "info"


KEYS = tuple(info.name for info in msgspec.structs.fields(Config))
_TYPES = {info.name: info.type for info in msgspec.structs.fields(Config)}


def load(
    options: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Config:
    """The settings in force.

    Args:
        options: given on the command line, by key; None stands for "not given".
        environ: where `HEADRACE_<KEY>` is looked up; tables are written as TOML inline tables or JSON objects.
        file: a TOML file with keys at its top level.

    Raises:
        ConfigError: an unknown key, a value of the wrong kind, an unreadable file.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values |= _read_file(file)
    values |= _read_environment(environ)
    values |= {key: value for key, value in (options or {}).items() if value is not None}
    values.setdefault("ollama_host", environ.get("OLLAMA_HOST", ""))
    try:
        config = msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"bad setting: {error}") from None
    if config.saturated_at <= config.busy_at:
        raise ConfigError("bad setting: `saturated_at` must be above `busy_at`")
    if set(config.weights) != set(Priority):
        raise ConfigError("bad setting: `weights` needs high, medium and low")
    return config


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the settings in {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(ENV_PREFIX):
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in _TYPES:
            raise ConfigError(f"{name} is no setting of headrace: see `headrace up --help`")
        values[key] = _parse(name, text) if text[:1] in ("{", "[") else text
    return values


def _parse(name: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"{name} is neither JSON nor a TOML value: {text!r}") from None


def to_environment(config: Config) -> dict[str, str]:
    """The environment in which a child process reads the same settings."""
    values = msgspec.to_builtins(config)
    return {
        ENV_PREFIX + key.upper(): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for key, value in values.items()
        if value is not None
    }
