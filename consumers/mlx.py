"""The MLX worker: requests of all lanes, answered by the model in the supervised child process."""

from __future__ import annotations

import asyncio
import os
from typing import Final

import msgspec

from consumers.engines.local.process import EngineProcess
from consumers.models.obtain import GettingStopped, obtain
from pipeline.config import Config
from pipeline.delivery.taking import MLX_SOURCE
from pipeline.process.lifecycle import Lifecycle, StartError
from pipeline.process.role import role
from pipeline.worker.worker import Worker

_REPORT_EVERY_S: Final = 2.0


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        ModelError: the model cannot be got.
        StartError: the engine cannot load it, and has not loaded it before.
        BusError, TopologyError: as `pipeline.process.role.role`.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the engine's process, which loads repositories
    try:
        if config.draft_model and config.engine == "mlx":
            wanted = msgspec.structs.replace(config, model=config.draft_model)
            draft = await obtain(wanted, lifecycle, every_s=_REPORT_EVERY_S)
            config = msgspec.structs.replace(config, draft_model=draft.path)
        model = await obtain(config, lifecycle, every_s=_REPORT_EVERY_S)
    except GettingStopped:
        return
    async with (
        # First, so that the model is loaded while the broker is reached.
        EngineProcess(config, model_path=model.path, served_name=model.name) as engine,
        role("mlx", config) as me,
    ):
        working = asyncio.ensure_future(Worker(me, engine, config, MLX_SOURCE).run(lifecycle))
        failing = asyncio.ensure_future(engine.load_failed())
        try:
            await asyncio.wait([working, failing], return_when=asyncio.FIRST_COMPLETED)
            if not failing.done():
                await working
                return
            lifecycle.stop(drain_s=0.0)
            await working
            raise StartError(failing.result())
        finally:
            failing.cancel()
            working.cancel()
