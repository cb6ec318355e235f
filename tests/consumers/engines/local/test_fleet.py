"""Several models of one worker, in real engine processes: who is loaded, who waits, and what a crash touches."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from consumers.demo_model import PATH as DEMO
from consumers.engines.local.berth import FleetModel, Ticket
from consumers.engines.local.fleet import HELD_OF_ONE, Fleet
from pipeline.config import Config
from pipeline.core import swapping
from pipeline.core.models import CannotLoad
from pipeline.engine import NotLoaded
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import Answer, read, until, work
from tests.waiting import eventually

BASE = Config(engine="simulated", slots=4, simulated_tokens_per_s=4000.0, simulated_answer_tokens=20)


def model(name: str, **more) -> FleetModel:
    return FleetModel(name, **({"path": "", "config": BASE, "place": name, "known_bytes": 10} | more))


@asynccontextmanager
async def fleet(*models: FleetModel, budget: int = 20) -> AsyncIterator[Fleet]:
    """A fleet whose first model is loaded."""
    async with Fleet(BASE, models, budget) as engine:
        await until(engine, lambda: stage(engine, models[0].name) == "ready")
        yield engine


def stage(engine: Fleet, name: str) -> str:
    return engine._berths[name].stage


def loaded(engine: Fleet) -> set[str]:
    return {name for name, facts in engine.status().facts.items() if facts.loaded}


async def ask(engine: Fleet, name: str | None, *, priority: Priority = Priority.MEDIUM, tokens: int = 20) -> Answer:
    request = ChatRequest(prompt="x", max_tokens=tokens)
    asked = msgspec.structs.replace(work(request, priority=priority), model=engine.resolve(name))
    return await read(await engine.submit(asked))


async def test_a_model_is_loaded_when_a_request_asks_for_it():
    async with fleet(model("a"), model("b")) as engine:
        assert loaded(engine) == {"a"}
        assert (await ask(engine, "b")).finish_reason
        assert loaded(engine) == {"a", "b"}
        assert engine.status().models == ["a", "b"]


async def test_three_models_in_a_budget_for_two_answer_all_with_few_swaps():
    async with fleet(model("a"), model("b"), model("c")) as engine:
        names = ["a", "b", "c"] * 40
        most = 0

        def look() -> None:
            nonlocal most
            most = max(most, sum(stage(engine, name) != "absent" for name in "abc"))

        engine.on_change(look)

        async def one(name: str) -> str:
            while True:
                try:
                    await ask(engine, name)
                except NotLoaded:  # its worker hands it back to the queue
                    await asyncio.sleep(0.05)
                else:
                    return name

        assert Counter(await asyncio.gather(*map(one, names))) == {"a": 40, "b": 40, "c": 40}
        assert most == 2
        assert engine.swaps < len(names) / 2


async def test_a_request_does_not_overtake_one_that_waits_unless_it_is_more_urgent():
    async with fleet(model("a")) as engine:
        waits = Ticket(work("x", priority=Priority.MEDIUM), 0.0, asyncio.get_running_loop().create_future())
        berth = engine._berths["a"]
        berth.tickets.append(waits)
        assert [berth.is_behind(work("y", priority=priority)) for priority in Priority] == [False, True, True]
        assert (await ask(engine, "a", priority=Priority.LOW)).finish_reason
        assert waits.entered.done(), "it entered first"
        await waits.entered.result().close()


async def test_what_waits_for_a_load_takes_no_slot():
    slow = msgspec.structs.replace(BASE, simulated_load_s=600.0)
    async with fleet(model("a"), model("b", config=slow)) as engine:
        free = engine.status().slots_total - engine.status().slots_used
        waiting = [asyncio.ensure_future(ask(engine, "b")) for _ in range(10)]
        await until(engine, lambda: stage(engine, "b") == "loading")
        status = engine.status()
        assert (status.slots_total - status.slots_used, status.state) == (free, "ready")
        assert (await ask(engine, "a", priority=Priority.HIGH)).finish_reason
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert engine._held == 0


async def test_more_than_the_bound_for_one_model_is_handed_back():
    slow = msgspec.structs.replace(BASE, simulated_load_s=600.0)
    async with fleet(model("a"), model("b", config=slow)) as engine:
        most = HELD_OF_ONE[Priority.LOW]
        waiting = [asyncio.ensure_future(ask(engine, "b", priority=Priority.LOW)) for _ in range(most)]
        await eventually(lambda: engine._held == most)
        with pytest.raises(NotLoaded, match="Many requests wait for model b"):
            await ask(engine, "b", priority=Priority.LOW)
        more = asyncio.ensure_future(ask(engine, "b", priority=Priority.HIGH))
        await eventually(lambda: engine._held == most + 1, what="a more urgent one is still held")
        for task in (more, *waiting):
            task.cancel()
        await asyncio.wait([more, *waiting])


async def test_a_request_is_left_to_another_worker_that_has_its_model_in_memory():
    async with fleet(model("a"), model("b", aliases=("other",))) as engine:
        engine.elsewhere = lambda names: "other" in names
        with pytest.raises(NotLoaded, match="another worker"):
            await ask(engine, "b")
        assert (await ask(engine, "a")).finish_reason


async def test_the_crash_of_one_model_touches_only_its_requests():
    slow = msgspec.structs.replace(BASE, simulated_tokens_per_s=400.0, simulated_answer_tokens=200)
    async with fleet(model("a", config=slow), model("b", config=slow)) as engine:
        await ask(engine, "b")
        answers = [asyncio.ensure_future(ask(engine, name, tokens=200)) for name in "ab"]
        await eventually(lambda: all(len(engine._berths[name].engine.requests) for name in "ab"))
        os.kill(engine.child_pid("b"), signal.SIGKILL)
        a, b = await asyncio.gather(*answers)
        assert (a.restarted, b.restarted) == (0, 1)
        assert (a.usage.completion_tokens, b.usage.completion_tokens) == (200, 200)
        assert engine.swaps == 2


async def test_a_process_that_is_killed_while_it_loads_is_started_again_for_what_waits():
    slow = msgspec.structs.replace(BASE, simulated_load_s=1.0)
    async with fleet(model("a"), model("b", config=slow)) as engine:
        waiting = asyncio.ensure_future(ask(engine, "b"))
        await eventually(lambda: stage(engine, "b") == "loading" and engine.child_pid("b"))
        os.kill(engine.child_pid("b"), signal.SIGKILL)
        await until(engine, lambda: stage(engine, "b") != "loading")
        assert "b" in engine.status().models
        assert engine.resolve("b") == "b"
        assert (await waiting).finish_reason
        assert loaded(engine) == {"a", "b"}


async def test_a_long_answer_is_suspended_for_high_and_goes_on_later(monkeypatch):
    monkeypatch.setattr(swapping, "HIGH_LEAVE_S", 0.05)
    endless = msgspec.structs.replace(BASE, simulated_tokens_per_s=400.0, simulated_answer_tokens=1_000_000)
    async with fleet(model("a", config=endless), model("b"), budget=10) as engine:
        submitted = msgspec.structs.replace(work(ChatRequest(prompt="x", max_tokens=1_000_000)), model="a")
        generation = await engine.submit(submitted)
        pieces = [await generation.next()]
        high = await ask(engine, "b", priority=Priority.HIGH)
        assert high.finish_reason
        while not (any(piece.preempted for piece in pieces[:-20]) and pieces[-1].token_ids):
            pieces.append(await generation.next())
        await generation.close()
        said = [token for piece in pieces for token in piece.token_ids]
        assert sum(piece.preempted for piece in pieces) == 1
        assert said == (await ask(engine, "a", tokens=len(said))).token_ids


async def test_without_a_name_the_default_answers_or_else_what_is_loaded():
    async with fleet(model("a"), model("b"), budget=10) as engine:
        assert engine.resolve(None) == "a"
        await ask(engine, "b")
        assert loaded(engine) == {"b"}
        assert engine.resolve(None) == "b"


async def test_aliases_paths_and_equivalents_name_a_model_and_others_are_not_found():
    config = msgspec.structs.replace(BASE, spill_models={"b": "b-at-ollama"})
    models = [model("a", aliases=("first", "gpt-4o")), model("b", place="./models/b")]
    engine = Fleet(config, models, 20)
    asked = ("a", "GPT-4o", "first", "b", "./models/b", "b-at-ollama")
    assert [engine.resolve(name) for name in asked] == ["a", "a", "a", "b", "b", "b"]
    with pytest.raises(HeadraceError, match='"c" is not available') as caught:
        engine.resolve("c")
    assert caught.value.code is ErrorCode.MODEL_NOT_FOUND
    with pytest.raises(HeadraceError, match="internal"):
        engine.resolve("tinyllama")


async def test_a_model_leaves_after_its_idle_time_and_a_pinned_one_does_not():
    async with fleet(model("a", idle_s=0.2, pinned=True), model("b", idle_s=0.2)) as engine:
        await ask(engine, "b")
        await until(engine, lambda: stage(engine, "b") == "absent")
        assert loaded(engine) == {"a"}


async def test_with_no_model_in_memory_a_slot_is_free_for_the_request_that_loads_one():
    async with fleet(model("a", idle_s=0.2), model("b")) as engine:
        await until(engine, lambda: stage(engine, "a") == "absent")
        assert (engine.status().state, free_slots(engine)) == ("ready", 1)
        assert (await ask(engine, "b")).finish_reason
        assert free_slots(engine) == BASE.slots


def free_slots(engine: Fleet) -> int:
    status = engine.status()
    return status.slots_total - status.slots_used


async def test_the_facts_say_what_is_loaded_how_large_it_is_and_when_it_leaves():
    async with fleet(model("a", size_bytes=7, idle_s=600.0, aliases=("x",)), model("b", size_bytes=8)) as engine:
        facts = engine.status().facts
        assert [(each.loaded, each.size_bytes, each.memory_bytes) for each in (facts["a"], facts["b"])] == [
            (True, 7, 10),
            (False, 8, 0),
        ]
        assert facts["x"] == msgspec.structs.replace(facts["a"], alias_of="a")
        assert facts["a"].expires_at > 0


async def test_a_model_that_cannot_be_loaded_is_named_and_the_others_answer(tmp_path):
    broken = msgspec.structs.replace(BASE, engine="mlx")
    async with fleet(model("a"), model("b", config=broken, path=str(tmp_path))) as engine:
        with pytest.raises(HeadraceError, match='"b" cannot be loaded: FileNotFoundError'):
            await ask(engine, "b")
        await eventually(lambda: "b" not in engine.status().models)
        assert engine.status().cannot_load == {
            "b": "FileNotFoundError: [Errno 2] No such file or directory: 'b/config.json'."
        }
        with pytest.raises(CannotLoad, match='"b" cannot be loaded: FileNotFoundError'):
            engine.resolve("b")
        assert (await ask(engine, "a")).finish_reason


async def test_a_model_whose_files_break_while_it_is_not_in_memory_is_refused_and_served_once_they_are_mended(
    tmp_path, monkeypatch
):
    shutil.copytree(DEMO, tmp_path / "b")
    config = (tmp_path / "b" / "config.json").read_text()
    real = msgspec.structs.replace(BASE, engine="mlx")
    async with fleet(model("a"), model("b", config=real, path=str(tmp_path / "b")), budget=10) as engine:
        assert (await ask(engine, "b")).finish_reason
        await ask(engine, "a")
        (tmp_path / "b" / "config.json").write_text(config.replace('"llama"', '"quux"'))
        with pytest.raises(CannotLoad, match="Model type quux not supported"):
            await ask(engine, "b")
        with pytest.raises(CannotLoad, match="Model type quux not supported"):
            engine.resolve("b")
        assert (engine.status().models, list(engine.status().cannot_load)) == (["a"], ["b"])
        await until(engine, lambda: stage(engine, "b") == "absent")
        assert (loaded(engine), free_slots(engine)) == (set(), 1), "a request for the other model is taken"
        assert engine.status().reason == ""
        (tmp_path / "b" / "config.json").write_text(config)
        skip(engine, "b", monkeypatch)
        await until(engine, lambda: "b" in engine.status().models)
        assert list(engine.status().cannot_load) == ["b"], "it is tried for the next request"
        assert (await ask(engine, "b")).finish_reason
        assert engine.status().cannot_load == {}


async def test_a_request_for_any_model_is_not_answered_with_one_that_cannot_be_loaded(tmp_path):
    broken = msgspec.structs.replace(BASE, engine="mlx")
    models = [model("a", config=broken, path=str(tmp_path)), model("b"), model("c")]
    async with Fleet(BASE, models, 10) as engine:
        assert await engine.load_failed()
        await until(engine, lambda: "a" in engine.status().cannot_load)
        assert engine.resolve(None) == "b"
        assert (await ask(engine, None)).finish_reason


async def test_an_internal_model_that_is_in_memory_answers_no_request_without_a_name():
    async with fleet(model("a"), model("tinyllama", pinned=True), model("b"), budget=20) as engine:
        await until(engine, lambda: stage(engine, "tinyllama") == "ready")
        await ask(engine, "b")
        assert {stage(engine, "tinyllama"), stage(engine, "b")} == {"ready"}
        engine._berths["tinyllama"].used_at = engine._now()
        assert engine.resolve(None) == "b"


def skip(engine: Fleet, name: str, monkeypatch) -> None:
    """The pause after which a model may be tried again is over."""
    late = engine._berths[name].failed_until
    began_at = engine._now()
    monkeypatch.setattr(engine, "_now", lambda: asyncio.get_running_loop().time() + max(0.0, late - began_at))
    engine._consider_soon(0.0)


async def test_the_tokens_of_a_prompt_are_counted_by_its_model_if_that_is_loaded():
    async with fleet(model("a"), model("b")) as engine:
        assert await engine.count_tokens(ChatRequest(prompt="one two three", model="a")) > 0
        with pytest.raises(HeadraceError) as caught:
            await engine.count_tokens(ChatRequest(prompt="one two three", model="b"))
        assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_a_search_for_a_blas_library_that_failed_is_begun_again_for_the_next_model(monkeypatch):
    tries = []

    async def select(wanted: str, _: int) -> None:
        tries.append(wanted)
        if len(tries) == 1:
            raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr("consumers.engines.local.fleet.selected", select)
    config = Config(engine="simulated")
    fleet = Fleet(config, [FleetModel("m", "", config)], 0)
    with pytest.raises(OSError, match="temporarily"):
        await fleet._selected("auto", 1)
    for _ in range(2):
        assert await fleet._selected("auto", 1) is None
    assert len(tries) == 2
