"""Engines in a child process, made as the role makes them."""

from __future__ import annotations

from typing import Any

from consumers.engines.local.process import EngineProcess
from consumers.models.names import located, served_name_of
from pipeline.config import Config


def engine_of(config: Config, **more: Any) -> EngineProcess:
    """An engine with the model that the settings name. Enter it to start its process."""
    return EngineProcess(config, model_path=located(config.model), served_name=served_name_of(config.model), **more)
