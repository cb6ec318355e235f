"""`POST /api/pull` with Ollama's own client: progress, the end, errors, hang-ups, and who can call it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import msgspec
import pytest
from httpx import AsyncClient
from ollama import AsyncClient as Ollama
from ollama import ProgressResponse, ResponseError

from pipeline.broker import fetching
from pipeline.broker.jetstream import Bus
from pipeline.core import fetches
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.gateway import fetching as responses
from pipeline.gateway.identity import make_key
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus, encode
from tests.pipeline.gateway.conftest import Serve
from tests.pipeline.worker.conftest import Running, ScriptedEngine, ScriptedFetcher, StartWorker
from tests.pipeline.worker.conftest import start as start  # noqa: PLC0414 - a fixture
from tests.waiting import eventually

SECRET, KEY = make_key("alice")
BOSS_SECRET, BOSS = make_key("boss")
KEYS = [KEY, msgspec.structs.replace(BOSS, operator=True)]


OllamaOf = Callable[..., Ollama]


@pytest.fixture
async def ollama_of() -> AsyncIterator[OllamaOf]:
    """Makes Ollama's clients of a gateway, with a key or without."""
    made: list[Ollama] = []

    def make(client: AsyncClient, secret: str = "") -> Ollama:
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        made.append(Ollama(str(client.base_url), headers=headers, timeout=60, trust_env=False))
        return made[-1]

    yield make
    for each in made:
        await each.close()


@pytest.fixture
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch whose caller says nothing is not given up."""
    monkeypatch.setattr(fetches, "LEASE_S", 1e9)


async def heard(client: AsyncClient, model: str, **headers: str) -> None:
    """Wait until the gateway lists a model."""

    async def listed() -> bool:
        return model in [each["id"] for each in (await client.get("/v1/models", headers=headers)).json()["data"]]

    await eventually(listed, what=f"the gateway lists {model}")


async def lines_of(client: Ollama, model: str = "x") -> list[ProgressResponse]:
    return [line async for line in await client.pull(model, stream=True)]


async def has_begun(fetcher: ScriptedFetcher, count: int = 1) -> None:
    await eventually(lambda: len(fetcher.begun) == count, what="the fetch begins")


async def test_the_progress_is_as_ollamas_client_reads_it_and_the_model_is_there_at_the_end(
    serve: Serve, ollama_of: OllamaOf, start: StartWorker
):
    engine, fetcher = ScriptedEngine(), ScriptedFetcher(served="x")
    await start(engine, fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling manifest")
        fetcher.say("pulling", 3, 10)
        async with aclosing(await ollama_of(client).pull("x", stream=True)) as lines:
            assert (await anext(lines)).status == "pulling manifest"
            assert (await anext(lines)).completed == 3
            fetcher.say("pulling", 10, 10)
            fetcher.say("converting x")
            engine.model = "x"
            engine.changed()
            fetcher.finish()
            rest = [line.model_dump(exclude_none=True) async for line in lines]
        assert rest[-2:] == [{"status": "converting x"}, {"status": "success"}]
        assert {"status": "pulling", "digest": "sha256:pulling", "total": 10, "completed": 10} in rest
        listed = await ollama_of(client).list()
        assert [model.model for model in listed.models] == ["x", "auto"]
        assert [line.status for line in await lines_of(ollama_of(client))] == ["pulling manifest", "success"]
        assert fetcher.begun == ["x"]


async def test_without_a_stream_there_is_only_the_end(serve: Serve, ollama_of: OllamaOf, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling", 3, 10)
        fetcher.finish()
        answer = await client.post("/api/pull", json={"model": "x", "stream": False})
        assert (answer.status_code, answer.json()) == (200, {"status": "success"})
        fetcher.fail(HeadraceError(ErrorCode.ENGINE_FAILED, "The index does not answer."))
        with pytest.raises(ResponseError, match="The index does not answer") as caught:
            await ollama_of(client).pull("x")
        assert caught.value.status_code == 502


async def test_an_error_in_a_stream_is_its_last_line(serve: Serve, ollama_of: OllamaOf, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling manifest")
        fetcher.fail(HeadraceError(ErrorCode.ENGINE_FAILED, "The disk is full."))
        answer = await client.post("/api/pull", json={"name": "x"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
        said = [json.loads(line) for line in answer.text.splitlines()]
        assert said == [{"status": "pulling manifest"}, {"error": "The disk is full.", "code": "engine_failed"}]
        fetcher.fail(HeadraceError(ErrorCode.ENGINE_FAILED, "The disk is full."))
        with pytest.raises(ResponseError, match="The disk is full"):
            await lines_of(ollama_of(client))


async def test_two_callers_share_a_fetch(serve: Serve, ollama_of: OllamaOf, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client, serve() as other:
        await heard(client, "scripted")
        await heard(other, "scripted")
        fetcher.say("pulling", 3, 10)
        pulls = [await ollama_of(each).pull("x", stream=True) for each in (client, other)]
        for lines in pulls:
            assert (await anext(lines)).completed == 3
        fetcher.finish()
        for lines in pulls:
            assert [line.status async for line in lines] == ["success"]
        assert fetcher.begun == ["x"]


@pytest.mark.usefixtures("long_lease")
async def test_the_last_caller_that_hangs_up_ends_the_fetch(serve: Serve, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling", 3, 10)
        async with client.stream("POST", "/api/pull", json={"model": "x"}) as answer:
            assert await anext(answer.aiter_lines())
            assert fetcher.cancelled == []
        await eventually(lambda: fetcher.cancelled == ["x"], what="the fetch is given up")


@pytest.mark.usefixtures("long_lease")
async def test_a_caller_that_waits_for_the_end_alone_can_hang_up_too(serve: Serve, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        pulling = asyncio.ensure_future(client.post("/api/pull", json={"model": "x", "stream": False}))
        await has_begun(fetcher)
        pulling.cancel()
        await eventually(lambda: fetcher.cancelled == ["x"], what="the fetch is given up")


async def test_a_worker_that_dies_is_an_error_in_the_stream_and_another_one_takes_the_next_call(
    serve: Serve, ollama_of: OllamaOf, start: StartWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetching, "_SILENCE_S", 0.5)
    fetcher, next_fetcher = ScriptedFetcher(), ScriptedFetcher()
    dying: Running = await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling", 3, 10)
        pulling = asyncio.ensure_future(lines_of(ollama_of(client)))
        await has_begun(fetcher)
        await dying.kill()
        with pytest.raises(ResponseError, match=r"does not answer any more\. Pull again"):
            await pulling
        await start(fetcher=next_fetcher)
        next_fetcher.finish()

        async def pulled() -> bool:
            return (await client.post("/api/pull", json={"model": "x"})).status_code == 200

        await eventually(pulled, what="the other worker fetches")


async def test_a_gateway_that_stops_says_so(serve: Serve, start: StartWorker):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("pulling", 3, 10)
        async with client.stream("POST", "/api/pull", json={"model": "x"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines)
            client.life.stop()  # type: ignore[attr-defined]
            assert json.loads([line async for line in lines][-1])["code"] == "unavailable"


async def test_a_silent_fetch_repeats_its_last_line(serve: Serve, start: StartWorker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.0)
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve() as client:
        await heard(client, "scripted")
        fetcher.say("converting x")
        async with client.stream("POST", "/api/pull", json={"model": "x"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == await anext(lines) == await anext(lines) == '{"status":"converting x"}'


async def test_what_mlx_does_not_fetch_goes_to_a_real_ollama_and_not_to_a_stand_in(
    serve: Serve, ollama_of: OllamaOf, start: StartWorker
):
    mlx, ollama = ScriptedFetcher(), ScriptedFetcher()
    ollama.fetchable = lambda name: name  # type: ignore[method-assign]
    standin = ScriptedFetcher(refusal=HeadraceError(ErrorCode.MODEL_NOT_FOUND, "It is not to be asked."))
    await start(fetcher=mlx)
    at: dict[str, object] = {"server": "http://127.0.0.1:9", "dialect": "ollama"}
    for name, reported, fetcher in (
        ("llama", at | {"standin": True}, standin),
        ("gpt", at | {"dialect": "openai"}, None),
    ):
        await start(ScriptedEngine(name="ollama", model=name, reports=reported), OLLAMA_SOURCE, fetcher)
    async with serve() as client:
        for model in ("scripted", "llama", "gpt"):
            await heard(client, model)
        with pytest.raises(ResponseError, match=r"There is no qwen3:0.6b\.") as caught:
            await lines_of(ollama_of(client), "qwen3:0.6b")
        assert caught.value.status_code == 404
        real = ScriptedEngine(name="ollama", model="real", reports=at)
        await start(real, OLLAMA_SOURCE, ollama)
        await heard(client, "real")
        ollama.finish()
        assert [line.status for line in await lines_of(ollama_of(client), "qwen3:0.6b")] == ["success"]
        assert (mlx.begun, ollama.begun, standin.begun) == ([], ["qwen3:0.6b"], [])


async def test_a_worker_that_may_not_fetch_says_why(serve: Serve, ollama_of: OllamaOf, start: StartWorker):
    message = 'Model "x" is not stored here, and --offline forbids fetching it.'
    await start(fetcher=ScriptedFetcher(refusal=HeadraceError(ErrorCode.INVALID_REQUEST, message)))
    async with serve() as client:
        await heard(client, "scripted")
        with pytest.raises(ResponseError, match="--offline forbids") as caught:
            await lines_of(ollama_of(client))
        assert caught.value.status_code == 400


async def test_without_a_worker_that_fetches_the_error_says_what_to_do(serve: Serve, bus: Bus):
    async with serve() as client:
        missing = await client.post("/api/pull", json={"model": "x"})
        assert (missing.status_code, missing.json()["code"]) == (503, "unavailable")
        assert missing.json()["error"].endswith("a worker that may fetch it does not answer. Retry later.")
        # One of an older version, or without models, says nothing of fetching; one that has just died does not answer.
        status = WorkerStatus("a", "mlx", "ready", ["a"], Slots(0, 1), PerPriorityCount(), 0, 0, 0, 0, 0, at=0.0)
        await bus.publish("llm.worker.a", encode(status))
        await heard(client, "a")
        missing = await client.post("/api/pull", json={"model": "x"})
        assert (missing.status_code, missing.json()["code"]) == (404, "model_not_found")
        assert "Run `headrace pull x` on the engine's machine" in missing.json()["error"]
        await bus.publish("llm.worker.a", encode(msgspec.structs.replace(status, models=["b"], fetches=True)))
        await heard(client, "b")
        assert (await client.post("/api/pull", json={"model": "x"})).status_code == 503
        assert (await client.post("/api/pull", json={})).status_code == 400
        internal = await client.post("/api/pull", json={"model": "tinyllama"})
        assert internal.json()["code"] == "model_internal"


async def test_only_an_operator_fetches_and_every_key_may_ask_for_what_is_here(
    serve: Serve, ollama_of: OllamaOf, start: StartWorker
):
    fetcher = ScriptedFetcher()
    await start(fetcher=fetcher)
    async with serve(http_keys=KEYS) as client:
        await heard(client, "scripted", Authorization=f"Bearer {SECRET}")
        alice, boss = ollama_of(client, SECRET), ollama_of(client, BOSS_SECRET)
        with pytest.raises(ResponseError, match="Only an operator's API key permits this") as caught:
            await lines_of(alice)
        assert caught.value.status_code == 403
        assert fetcher.begun == []
        assert (await alice.pull("scripted")).status == (await alice.pull("auto")).status == "success"
        fetcher.finish()
        assert (await boss.pull("x")).status == "success"
        assert (await client.post("/api/pull", json={"model": "x"})).status_code == 401
