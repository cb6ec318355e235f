"""An engine of one model that gets another one while it runs: nothing that runs is disturbed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest

from consumers.demo_model import PATH as DEMO
from consumers.engines.local import host
from consumers.engines.local.berth import FleetModel
from consumers.engines.local.growing import Growing
from consumers.engines.local.run import Run
from pipeline.config import Config
from pipeline.core.models import CannotLoad
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import Answer, Conformance, read, until, work
from tests.consumers.engines.local.test_fleet import skip

BASE = Config(engine="simulated", slots=4, simulated_tokens_per_s=4000.0, simulated_answer_tokens=20)
SLOW = msgspec.structs.replace(BASE, simulated_tokens_per_s=50.0)


def model(name: str, config: Config = BASE, known_bytes: int = 10) -> FleetModel:
    return FleetModel(name, path="", config=config, place=name, known_bytes=known_bytes)


class Resolving(Growing):
    """An engine whose caller may leave the model to it."""

    async def submit(self, work: Work) -> Run:
        return await super().submit(msgspec.structs.replace(work, model=self.resolve(work.model or None)))


async def ask(engine: Growing, name: str | None, *, tokens: int = 20) -> Answer:
    request = ChatRequest(prompt="x", max_tokens=tokens)
    return await read(await engine.submit(msgspec.structs.replace(work(request), model=engine.resolve(name))))


@pytest.fixture
async def engine() -> AsyncIterator[Growing]:
    async with Resolving(BASE, model("a"), 20) as growing:
        await until(growing, lambda: growing.status().state == "ready")
        yield growing


class TestGrownEngine(Conformance):
    """What every engine must do."""

    @pytest.fixture
    async def engine(self, engine: Growing) -> Growing:
        engine.add(model("b"))
        return engine


async def test_a_model_is_added_while_the_first_one_answers():
    async with Growing(SLOW, model("a", SLOW), 20) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        running = asyncio.ensure_future(ask(engine, "a", tokens=40))
        await until(engine, lambda: engine.status().slots_used == 1)
        with pytest.raises(HeadraceError) as caught:
            engine.resolve("b")
        assert caught.value.code is ErrorCode.MODEL_NOT_FOUND
        told = asyncio.Event()
        engine.on_change(told.set)
        first = engine._first.child_pid
        engine.add(model("b"))
        assert told.is_set(), "the worker tells at once"
        assert engine.status().models == ["a", "b"]
        assert [each.name for each in engine.models] == ["a", "b"]
        assert not running.done()
        assert (await ask(engine, "b")).finish_reason
        assert (await running).finish_reason
        assert engine._first.child_pid == first
        facts = engine.status().facts
        assert (facts["a"].loaded, facts["b"].loaded) == (True, True)
        assert engine.resolve(None) == "a"


async def test_a_model_is_added_while_the_first_one_is_loaded():
    slow = msgspec.structs.replace(BASE, simulated_load_s=1.0)
    async with Growing(slow, model("a", slow), 20) as engine:
        engine.add(model("b"))
        assert engine.status().state == "loading"
        assert (await ask(engine, "a")).finish_reason
        assert (await ask(engine, "b")).finish_reason


async def test_a_model_takes_the_place_of_the_first_one_where_both_do_not_fit():
    async with Growing(BASE, model("a", known_bytes=30), 10) as engine:  # a single model may be larger
        await until(engine, lambda: engine.status().state == "ready")
        engine.add(model("b"))
        for name in ("b", "a", "b"):
            assert (await ask(engine, name)).finish_reason
            loaded = {each for each, facts in engine.status().facts.items() if facts.loaded}
            assert loaded == {name}
        await engine.count_tokens(ChatRequest(prompt="x"))


async def test_requests_for_a_single_model_that_cannot_be_loaded_again_end_with_the_reason_until_it_can(
    tmp_path, monkeypatch
):
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    whole = (folder / "config.json").read_text()
    real = Config(slots=1)
    async with Growing(real, FleetModel("m", path=str(folder), config=real, place="m"), 10) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        (folder / "config.json").write_text(whole.replace('"llama"', '"quux"'))
        os.kill(engine._first.child_pid, signal.SIGKILL)
        await until(engine, lambda: engine.status().cannot_load)
        assert engine.status().cannot_load == {"m": "ValueError: Model type quux not supported."}
        for name in ("m", None):
            with pytest.raises(CannotLoad, match="Model type quux not supported"):
                await ask(engine, name)
        await until(engine, lambda: engine._now._berths["m"].stage == "absent")
        status = engine.status()
        assert (status.state, status.models, status.slots_total - status.slots_used) == ("ready", [], 1), "it refuses"
        engine.others_serve = lambda: True
        assert engine.status().state == "down", "it leaves requests to another worker"
        engine.others_serve = lambda: False
        (folder / "config.json").write_text(whole)
        skip(engine._now, "m", monkeypatch)
        await until(engine, lambda: engine.status().models == ["m"])
        assert (await ask(engine, None)).finish_reason
        assert engine.status().cannot_load == {}


async def test_a_single_model_whose_process_dies_while_it_is_loaded_again_is_given_up_after_some_deaths(monkeypatch):
    async with Growing(BASE, model("a"), 20) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        monkeypatch.setenv("HEADRACE_ENGINE", "no engine")
        monkeypatch.setattr(host, "to_environment", lambda _: {})
        os.kill(engine._first.child_pid, signal.SIGKILL)
        await until(engine, lambda: engine._now is not engine._first)
        for _ in range(3):
            with pytest.raises(HeadraceError, match="cannot be loaded: its process ended while it loaded"):
                await ask(engine, "a")
        assert list(engine.status().cannot_load) == ["a"]


async def test_a_single_model_answers_to_its_aliases():
    async with Growing(BASE, replace(model("a"), aliases=("gpt-4o",)), 20) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        assert engine.status().models == ["a", "gpt-4o"]
        assert engine.status().facts["gpt-4o"].alias_of == "a"
        assert (await ask(engine, "gpt-4o")).finish_reason
        assert engine.resolve(None) == "a"


async def test_a_single_model_leaves_memory_after_its_idle_time():
    async with Growing(BASE, replace(model("a"), idle_s=0.05), 20) as engine:
        await until(engine, lambda: engine.status().state == "ready")
        await until(engine, lambda: not engine.status().facts["a"].loaded)
        assert (await ask(engine, "a")).finish_reason
