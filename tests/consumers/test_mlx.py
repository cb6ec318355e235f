"""Models that were fetched for a worker of MLX: they are served beside its own, now and after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from consumers.engines.local.berth import FleetModel
from consumers.engines.local.growing import Growing
from consumers.mlx import _Fetched
from consumers.models.getting import pull
from consumers.models.store import Store
from pipeline.config import Config
from tests.consumers.models.ggufs import written

GIGABYTE = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a worker whose store has the model `tiny`."""
    config = Config(engine="simulated", models_dir=str(tmp_path / "store"))
    pull(str(written(tmp_path / "tiny.gguf")), Store(config.models_dir), lambda _: None)
    return config


@asynccontextmanager
async def worker(config: Config, budget_bytes: int = GIGABYTE) -> AsyncIterator[tuple[Growing, _Fetched]]:
    first = FleetModel("first", path="", config=config, place="first", aliases=("other",), known_bytes=10)
    async with Growing(config, first, budget_bytes) as engine:
        yield engine, _Fetched(engine, config)


async def test_a_fetched_model_is_served_now_and_after_a_restart_until_it_is_removed(config: Config):
    async with worker(config) as (engine, fetched):
        await fetched.serve_again()
        assert engine.status().models == ["first", "other"], "a model of `headrace pull` is not served"
        assert await fetched.serve("tiny") == ("tiny", "")
        assert await fetched.serve("tiny") == ("tiny", "")
        assert engine.status().models == ["first", "other", "tiny"]
        (_, tiny) = engine.models
        assert tiny.path == str(Store(config.models_dir).folder("tiny") / "mlx")
        assert tiny.expected_bytes > 0
        assert tiny.config.kv_bytes_limit > 0
    async with worker(config) as (engine, fetched):
        await fetched.serve_again()
        assert engine.status().models == ["first", "other", "tiny"]
    Store(config.models_dir).remove("tiny")
    async with worker(config) as (engine, fetched):
        await fetched.serve_again()
        assert engine.status().models == ["first", "other"]


async def test_a_name_that_the_worker_has_is_served_already(config: Config):
    async with worker(config) as (engine, fetched):
        assert await fetched.serve("other") == ("other", "")
        assert len(engine.models) == 1


async def test_a_model_that_never_fits_is_not_served_and_the_reason_is_told(config: Config):
    async with worker(config, budget_bytes=100) as (engine, fetched):
        served, trouble = await fetched.serve("tiny")
        assert (served, len(engine.models)) == ("", 1)
        assert trouble.startswith("Model tiny needs ")
        assert trouble.endswith("models_bytes is 0 MB. Raise --models-bytes.")
        Store(config.models_dir).serve("tiny")
        await fetched.serve_again()
        assert len(engine.models) == 1


async def test_the_settings_for_the_default_model_alone_are_not_those_of_a_fetched_one(config: Config, tmp_path: Path):
    changed = msgspec.structs.replace(config, adapters={"sql": str(tmp_path)}, draft_model="demo", slots=3)
    async with worker(changed) as (engine, fetched):
        await fetched.serve("tiny")
        own = engine.models[1].config
        assert (own.adapters, own.draft_model, own.slots) == ({}, "", 3)


async def test_what_is_not_stored_is_not_served(config: Config):
    async with worker(config) as (_, fetched):
        served, trouble = await fetched.serve("nothing")
        assert (served, trouble[:26]) == ("", 'There is no model "nothing')


def test_a_model_that_is_made_again_is_served_still(config: Config):
    store = Store(config.models_dir)
    store.serve("tiny")
    with store.locked("tiny", lambda: None) as part:
        source = store.source("tiny")
        assert source is not None
        (part / "mlx").mkdir()
        store.put("tiny", part, msgspec.structs.replace(source, serve=False))
    assert store.served() == ["tiny"]
