"""The MLX worker: requests of all lanes, answered by the models in supervised child processes."""

from __future__ import annotations

import asyncio
import logging
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
from consumers.engines.local.growing import Growing
from consumers.models.fetcher import StoreFetcher
from consumers.models.getting import LocalModel, get
from consumers.models.obtain import GettingStopped, obtain
from consumers.models.several import WantedModel, config_of, draft_config_of, fetched_model, wanted_models
from consumers.models.sizes import expected_bytes, files_bytes
from consumers.models.store import ModelError, Store
from pipeline.config import Config
from pipeline.core.cores import threads_each, usable_cores
from pipeline.core.models import same_model
from pipeline.core.swapping import ModelUse, kv_bytes_each, most_at_once, needed_bytes
from pipeline.delivery.lanes import MLX_SOURCE
from pipeline.machine import cpu_count, cpu_quota, has_gpu, memory_available, memory_total
from pipeline.process.lifecycle import Lifecycle, StartError
from pipeline.process.role import Role, role
from pipeline.worker.worker import Worker

log = logging.getLogger(__name__)

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
    engine = _engine_of(config, wanted, models)
    # First, so that the model is loaded while the broker is reached.
    async with engine, role("mlx", config) as me:
        fetcher = None
        engine.elsewhere, engine.others_serve = partial(_is_loaded_elsewhere, me), partial(_others_serve, me)
        if config.engine == "mlx":
            fetched = _Fetched(engine, config)
            await fetched.serve_again()
            fetcher = StoreFetcher(config, fetched.serve)
        await _run(Worker(me, engine, config, MLX_SOURCE, fetcher=fetcher), engine, lifecycle)


async def _run(worker: Worker, engine: Growing | Fleet, lifecycle: Lifecycle) -> None:
    """Run the worker until it has drained, or until a model that must be loaded cannot be.

    Raises:
        StartError: the model cannot be loaded.
    """
    working = asyncio.ensure_future(worker.run(lifecycle))
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


def _engine_of(config: Config, wanted: Sequence[WantedModel], models: Sequence[LocalModel]) -> Growing | Fleet:
    if len(wanted) > 1:
        return fleet_of(config, wanted, models)
    return Growing(config, _fleet_model(wanted[0], models[0], config), _budget_bytes(config))


def fleet_of(config: Config, wanted: Sequence[WantedModel], models: Sequence[LocalModel]) -> Fleet:
    """The engine of several models.

    Raises:
        StartError: a model can never fit into the memory for models.
    """
    budget_bytes = _budget_bytes(config)
    fleet = [_fleet_model(each, model, config) for each, model in zip(wanted, models, strict=True)]
    uses = [_use(model) for model in fleet]
    for use in uses:
        if trouble := _too_large(use, uses, budget_bytes):
            raise StartError(f"{trouble} Raise --models-bytes, or leave the model out.")
    at_once = most_at_once((use.size_bytes for use in uses), budget_bytes)
    weights_bytes = min(budget_bytes, sum(use.size_bytes for use in uses))
    each_bytes = kv_bytes_each(memory_available() or memory_total(), weights_bytes, at_once)
    return Fleet(config, [_with_its_part(model, each_bytes, at_once) for model in fleet], budget_bytes)


class _Fetched:
    """The models that clients have fetched, which no setting names. The engine serves them beside its own."""

    def __init__(self, engine: Growing | Fleet, config: Config) -> None:
        self._engine = engine
        self._config = config
        self._store = Store(config.models_dir)

    async def serve_again(self) -> None:
        """Serve those of earlier runs."""
        for name in await asyncio.to_thread(self._store.served):
            _, trouble = await self.serve(name)
            if trouble:
                log.warning("The fetched model %s is not served: %s", name, trouble)

    async def serve(self, name: str) -> tuple[str, str]:
        """Serve a stored model, now and after a restart. Returns its name, or why it is not served."""
        if any(same_model(name, known) for model in self._engine.models for known in (model.name, *model.aliases)):
            return name, ""
        try:
            model = await asyncio.to_thread(self._model, name)
        except ModelError as error:
            return "", str(error)
        uses = [_use(each) for each in self._engine.models]
        use, budget_bytes = _use(model), self._engine.budget_bytes
        if trouble := _too_large(use, uses, budget_bytes):
            return "", f"{trouble} Raise --models-bytes."
        at_once = most_at_once((each.size_bytes for each in (*uses, use)), budget_bytes)
        each_bytes = kv_bytes_each(memory_available() or memory_total(), use.size_bytes, at_once)
        self._engine.add(_with_its_part(model, each_bytes, at_once))
        await asyncio.to_thread(self._store.serve, name)
        return name, ""

    def _model(self, name: str) -> FleetModel:
        found = get(name, self._store, lambda _: None, offline=True)
        return _fleet_model(fetched_model(name), found, self._config)


def _budget_bytes(config: Config) -> int:
    """The memory for the weights of several models."""
    memory = memory_total()
    return config.models_bytes or (int(memory * _WEIGHTS_SHARE) if memory else sys.maxsize)


def _on_cpu() -> bool:
    return sys.platform == "linux" and not has_gpu()


def _use(model: FleetModel) -> ModelUse:
    return ModelUse(model.name, model.known_bytes or model.expected_bytes, pinned=model.pinned)


def _too_large(use: ModelUse, uses: Sequence[ModelUse], budget_bytes: int) -> str:
    """Why a model can never be loaded; empty if it can."""
    needed = needed_bytes(use, uses)
    if needed <= budget_bytes:
        return ""
    beside = " beside the pinned models" if needed > use.size_bytes else ""
    return (
        f"Model {use.name} needs {use.size_bytes / 1e6:.0f} MB{beside} and can never be loaded: "
        f"models_bytes is {budget_bytes / 1e6:.0f} MB."
    )


def _fleet_model(wanted: WantedModel, model: LocalModel, config: Config) -> FleetModel:
    own, folder = wanted.entry.over(config), Path(model.path)
    return FleetModel(
        wanted.name,
        model.path,
        own,
        place=wanted.place,
        aliases=tuple(name for name in dict.fromkeys(wanted.entry.aliases) if name != wanted.name),
        size_bytes=files_bytes(folder) if model.path else 0,
        expected_bytes=expected_bytes(folder, float32=_on_cpu() and own.float32_weights) if model.path else 0,
        known_bytes=wanted.entry.bytes,
        pinned=wanted.entry.pinned,
        idle_s=wanted.entry.idle_s,
    )


def _with_its_part(model: FleetModel, kv_bytes: int, at_once: int) -> FleetModel:
    """The model with its part of the machine: one process does not see what the others take."""
    own = model.config
    if not own.kv_bytes_limit:
        own = msgspec.structs.replace(own, kv_bytes_limit=kv_bytes)
    if _on_cpu():
        threads = own.mlx_threads or usable_cores(cpu_count(), cpu_quota())
        own = msgspec.structs.replace(own, mlx_threads=threads_each(threads, at_once))
    return replace(model, config=own)


def _others_serve(me: Role) -> bool:
    """Whether another worker is ready and has a model in memory."""
    return any(
        status.state == "ready" and any(facts.loaded for facts in status.facts.values())
        for status in me.peers.workers("mlx")
        if status.worker != me.name
    )


def _is_loaded_elsewhere(me: Role, names: Sequence[str]) -> bool:
    """Whether another worker that is ready and has a free slot has one of these names in memory."""
    return any(
        status.state == "ready"
        and status.slots.used < status.slots.total
        and any(name in status.facts and status.facts[name].loaded for name in names)
        for status in me.peers.workers("mlx")
        if status.worker != me.name
    )
