"""The MLX worker: requests of all lanes, answered by the models in supervised child processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from consumers.engines.local.berth import FleetModel
from consumers.engines.local.fleet import Fleet
from consumers.engines.local.process import EngineProcess
from consumers.models.getting import LocalModel
from consumers.models.obtain import GettingStopped, obtain
from consumers.models.several import WantedModel, config_of, draft_config_of, wanted_models
from consumers.models.sizes import expected_bytes, files_bytes
from pipeline.config import Config
from pipeline.core.cores import threads_each, usable_cores
from pipeline.core.swapping import ModelUse, kv_bytes_each, most_at_once, needed_bytes
from pipeline.delivery.lanes import MLX_SOURCE
from pipeline.machine import cpu_count, cpu_quota, has_gpu, memory_available, memory_total
from pipeline.process.lifecycle import Lifecycle, StartError
from pipeline.process.role import Role, role
from pipeline.worker.worker import Worker

_REPORT_EVERY_S: Final = 2.0
_WEIGHTS_SHARE: Final = 0.5
"""The part of the machine's memory that the weights of several models take, unless `models_bytes` is set."""


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        ModelError: a model cannot be got.
        ConfigError: two models have one name.
        StartError: the engine cannot load the model, and has not loaded it before, or it can never fit into memory.
        BusError, TopologyError: as `pipeline.process.role.role`.
    """
    if config.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the engine's process, which loads repositories
    wanted = wanted_models(config)
    try:
        wanted = [await _with_draft(each, config, lifecycle) for each in wanted]
        models = [await obtain(config_of(each, config), lifecycle, every_s=_REPORT_EVERY_S) for each in wanted]
    except GettingStopped:
        return
    engine: EngineProcess | Fleet
    if len(wanted) == 1:
        (one,), (model,) = wanted, models
        engine = EngineProcess(one.entry.over(config), model_path=model.path, served_name=one.name)
    else:
        engine = fleet_of(config, wanted, models)
    # First, so that the model is loaded while the broker is reached.
    async with engine, role("mlx", config) as me:
        if isinstance(engine, Fleet):
            engine.elsewhere = partial(_is_loaded_elsewhere, me)
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


async def _with_draft(wanted: WantedModel, config: Config, lifecycle: Lifecycle) -> WantedModel:
    """The model with the folder of its draft model in place of the name."""
    draft = draft_config_of(wanted, config)
    if draft is None or config.engine != "mlx":
        return wanted
    found = await obtain(draft, lifecycle, every_s=_REPORT_EVERY_S)
    return wanted._replace(entry=msgspec.structs.replace(wanted.entry, draft_model=found.path))


def fleet_of(config: Config, wanted: Sequence[WantedModel], models: Sequence[LocalModel]) -> Fleet:
    """The engine of several models.

    Raises:
        StartError: a model can never fit into the memory for models.
    """
    memory = memory_total()
    budget_bytes = config.models_bytes or (int(memory * _WEIGHTS_SHARE) if memory else sys.maxsize)
    on_cpu = sys.platform == "linux" and not has_gpu()
    fleet = [_fleet_model(each, model, config, on_cpu=on_cpu) for each, model in zip(wanted, models, strict=True)]
    uses = [ModelUse(model.name, model.known_bytes or model.expected_bytes, pinned=model.pinned) for model in fleet]
    for use in uses:
        if (needed := needed_bytes(use, uses)) > budget_bytes:
            beside = " beside the pinned models" if needed > use.size_bytes else ""
            raise StartError(
                f"Model {use.name} needs {use.size_bytes / 1e6:.0f} MB{beside} and can never be loaded: "
                f"models_bytes is {budget_bytes / 1e6:.0f} MB. Raise --models-bytes, or leave the model out."
            )
    at_once = most_at_once((use.size_bytes for use in uses), budget_bytes)
    weights_bytes = min(budget_bytes, sum(use.size_bytes for use in uses))
    each_bytes = kv_bytes_each(memory_available() or memory, weights_bytes, at_once)
    threads = config.mlx_threads or usable_cores(cpu_count(), cpu_quota())
    each_threads = threads_each(threads, at_once) if on_cpu else 0
    return Fleet(config, [_with_its_part(model, each_bytes, each_threads) for model in fleet], budget_bytes)


def _fleet_model(wanted: WantedModel, model: LocalModel, config: Config, *, on_cpu: bool) -> FleetModel:
    own, folder = wanted.entry.over(config), Path(model.path)
    return FleetModel(
        wanted.name,
        model.path,
        own,
        place=wanted.place,
        aliases=tuple(name for name in dict.fromkeys(wanted.entry.aliases) if name != wanted.name),
        size_bytes=files_bytes(folder) if model.path else 0,
        expected_bytes=expected_bytes(folder, float32=on_cpu and own.float32_weights) if model.path else 0,
        known_bytes=wanted.entry.bytes,
        pinned=wanted.entry.pinned,
        idle_s=wanted.entry.idle_s,
    )


def _with_its_part(model: FleetModel, kv_bytes: int, threads: int) -> FleetModel:
    """The model with its part of the machine: one process does not see what the others take."""
    own = model.config
    if not own.kv_bytes_limit:
        own = msgspec.structs.replace(own, kv_bytes_limit=kv_bytes)
    if threads:
        own = msgspec.structs.replace(own, mlx_threads=threads)
    return replace(model, config=own)


def _is_loaded_elsewhere(me: Role, names: Sequence[str]) -> bool:
    """Whether another worker that is ready and has a free slot has one of these names in memory."""
    return any(
        status.state == "ready"
        and status.slots.used < status.slots.total
        and any(name in status.facts and status.facts[name].loaded for name in names)
        for status in me.peers.workers("mlx")
        if status.worker != me.name
    )
