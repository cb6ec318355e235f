"""The settings: how one is declared, every one of them, and which values are in force."""

from __future__ import annotations

from pipeline.config.declaring import ENV_PREFIX, Key
from pipeline.config.loading import base_url, given, load, to_environment
from pipeline.config.model_options import ModelOptions
from pipeline.config.settings import KEYS, NO_OLLAMA, SETTINGS, Config
from pipeline.config.tables import HttpKey, ModelEntry, Sampling
from pipeline.config.values import FILE_ENCODING, FILE_VARIABLE, ConfigError, Given, converted, in_file

__all__ = [
    "ENV_PREFIX",
    "FILE_ENCODING",
    "FILE_VARIABLE",
    "KEYS",
    "NO_OLLAMA",
    "SETTINGS",
    "Config",
    "ConfigError",
    "Given",
    "HttpKey",
    "Key",
    "ModelEntry",
    "ModelOptions",
    "Sampling",
    "base_url",
    "converted",
    "given",
    "in_file",
    "load",
    "to_environment",
]
