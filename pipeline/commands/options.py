"""The settings as command line options: one option for each key of `Config`, grouped, with its help."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import get_type_hints

from pipeline.config import ENV_PREFIX, KEYS, Config, load
from pipeline.process.lifecycle import without_private

_TABLE = "TABLE"

# Key by key: what the value is called, and what it does. A key that is missing here has no option: a test sees to it.
HELP: dict[str, dict[str, tuple[str, str]]] = {
    "broker": {
        "nats_url": ("URL", "broker to use, several separated by commas; `up` starts its own unless it is given"),
        "nats_port": ("PORT", "port of the embedded broker; 0 for any that is free"),
        "state_dir": ("DIR", "folder of the broker's store and the logs; by default the user's state folder"),
        "replicas": ("N", "copies of each stream: 1, or 3 or 5 on a cluster"),
        "lane_max_messages": ("N", "requests that one lane holds before it refuses more"),
        "max_body_bytes": ("BYTES", "largest request"),
    },
    "HTTP": {
        "http_host": ("HOST", "address that the HTTP gateway listens on; one that is not loopback needs `http_keys`"),
        "http_port": ("PORT", "port of the HTTP gateway; 0 for the usual one, or any that is free"),
        "http_keys": (_TABLE, "API keys, hashed, with what each may; without any, everybody may everything"),
        "http_priority": ("PRIORITY", "priority of a call that names none"),
        "http_answers_per_s": ("RATE", "calls for answers a second from one client; 0 for no limit"),
        "http_lists_per_s": ("RATE", "calls for lists of models a second from one client; 0 for no limit"),
        "http_statistics_per_s": ("RATE", "calls for statistics a second from one client; 0 for no limit"),
        "http_connections": ("N", "connections at once; more get status 503"),
        "http_stall_timeout_s": ("SECONDS", "a client that sends or reads nothing for so long is cut off"),
    },
    "MLX engine": {
        "engine": ("ENGINE", "mlx, or simulated: no model, for load studies; every answer says so"),
        "model": ("NAME_OR_PATH", "model of the MLX engine: a folder, a name on the hub, or the demo model"),
        "slots": ("N", "requests that the engine runs at once"),
        "prefill_step_tokens": ("N", "prompt tokens taken in at one step: smaller stalls running answers less"),
        "default_max_tokens": ("N", "longest answer where the request sets no limit"),
        "kv_bytes_limit": ("BYTES", "memory for the KV caches; 0 for no limit"),
        "step_timeout_s": ("SECONDS", "an engine whose step takes longer is started again"),
        "engine_faults": ("", "let requests inject faults into the engine: for tests only"),
    },
    "simulated engine": {
        "simulated_tokens_per_s": ("RATE", "output tokens a second of the whole batch"),
        "simulated_prefill_tokens_per_s": ("RATE", "prompt tokens a second"),
        "simulated_answer_tokens": ("N", "length of an answer"),
        "simulated_load_s": ("SECONDS", "time that loading takes"),
    },
    "sharing the engine": {
        "weights": (_TABLE, "service shares of the lanes, as {high = 6, medium = 3, low = 1}"),
        "floor_share": ("SHARE", "least share of service of a lane that has work, 0 to 1"),
        "max_wait_s": ("SECONDS", "a request that has waited longer is lifted before the others"),
        "prompt_token_cost": ("COST", "what a prompt token costs a lane; an output token costs 1"),
    },
    "delivery": {
        "lease_s": ("SECONDS", "a worker that is silent for so long has lost its request to another one"),
        "max_attempts": ("N", "attempts before a request goes to the dead letters"),
        "default_timeout_s": ("SECONDS", "deadline of a request that sets none; without it there is none"),
        "drain_timeout_s": ("SECONDS", "time to finish what is running when told to stop"),
    },
    "load": {
        "target_wait_s": ("SECONDS", "predicted wait at which the engine counts as full"),
        "busy_at": ("SATURATION", "saturation from which the level is busy; 1.0 is full"),
        "saturated_at": ("SATURATION", "saturation from which the level is saturated, and simple requests spill"),
    },
    "Ollama": {
        "ollama_host": ("HOST", "the Ollama to spill to, as in OLLAMA_HOST"),
        "ollama_slots": ("N", "requests that Ollama gets at once"),
        "ollama_queue": ("N", "requests that may wait for Ollama"),
        "ollama_standin": ("", "start a stand-in with the demo model where no Ollama answers"),
        "ollama_timeout_s": ("SECONDS", "an Ollama that is silent for so long has failed"),
        "spill_models": (_TABLE, "Ollama's model for each MLX model, as {'mlx-name' = 'ollama-name'}"),
        "internal_models": (_TABLE, "models that answer no user, as ['tinyllama']"),
        "classifier_model": ("MODEL", "Ollama's model that judges doubtful prompts; none by default"),
        "classifier_timeout_s": ("SECONDS", "time that it may take for one"),
    },
    "log": {"log_level": ("LEVEL", "debug, info, warning or error")},
}

# What a command needs that only asks a running pipeline.
CLIENT_KEYS = ("nats_url", "state_dir")


def add_options(parser: argparse.ArgumentParser, *, keys: tuple[str, ...] = KEYS) -> None:
    """Give parser the options of keys, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings: the options' names with underscores")
    types = get_type_hints(Config)
    for title, entries in HELP.items():
        chosen = {key: entry for key, entry in entries.items() if key in keys}
        if not chosen:
            continue
        group = parser.add_argument_group(title)
        for key, (metavar, text) in chosen.items():
            option = "--" + key.replace("_", "-")
            if types[key] is bool:
                group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
            else:
                group.add_argument(option, metavar=metavar, help=text + _default(key))


def config_from(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Config:
    """The settings in force for parsed options: option before environment before file before default.

    Raises:
        ConfigError: a setting that cannot be used.
    """
    environ = without_private(environ)
    file = environ.pop(ENV_PREFIX + "CONFIG", None)
    # Options are written as the environment's values are, so that a table means the same in both.
    for key, value in _given(args).items():
        environ[ENV_PREFIX + key.upper()] = str(value).lower() if isinstance(value, bool) else value
    return load(environ=environ, file=_file(args.config or file))


def settings_file(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The file of settings that is named, if any is."""
    return _file(args.config or environ.get(ENV_PREFIX + "CONFIG"))


def names_a_broker(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether anybody, in whatever way, has said which broker to use."""
    file = settings_file(args, environ)
    in_file = file is not None and "nats_url" in tomllib.loads(file.read_text())
    return bool(args.nats_url) or ENV_PREFIX + "NATS_URL" in environ or in_file


def _given(args: argparse.Namespace) -> dict[str, str | bool]:
    return {key: value for key in KEYS if (value := getattr(args, key, None)) is not None}


def _file(name: str | None) -> Path | None:
    return Path(name).expanduser() if name else None


def _default(key: str) -> str:
    value = getattr(Config(), key)
    return f" (default: {value})" if isinstance(value, (int, float, str)) and value not in ("", 0) else ""
