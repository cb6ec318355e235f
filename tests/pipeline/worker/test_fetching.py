"""A worker that fetches models: once for all callers, as long as one is left, beside its requests."""

from __future__ import annotations

from contextlib import aclosing

import msgspec
import pytest

from pipeline.broker import fetching
from pipeline.broker.connection import NoResponders, Unreachable
from pipeline.broker.fetching import WorkerFetch
from pipeline.core import fetches
from pipeline.core.fetches import LEASE_S
from pipeline.wire.answers import ErrorAnswer
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchReport, FetchStep
from tests.pipeline.worker.conftest import Client, Running, ScriptedFetcher, StartWorker
from tests.waiting import eventually


@pytest.fixture
def long_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch whose caller says nothing is not given up."""
    monkeypatch.setattr(fetches, "LEASE_S", 1e9)


def fetch_of(client: Client, running: Running, model: str = "x") -> WorkerFetch:
    return WorkerFetch(client.bus, running.worker.me.name, model)


async def ended(fetch: WorkerFetch) -> FetchReport:
    async with aclosing(fetch.reports()) as reports:
        async for report in reports:
            last = report
    return last


async def steps_of(fetch: WorkerFetch) -> list[FetchStep]:
    """The next steps."""
    async with aclosing(fetch.reports()) as reports:
        async for report in reports:
            if report.steps:
                break
    return report.steps


async def begun(fetch: WorkerFetch) -> None:
    assert isinstance(await asked(fetch), FetchReport)


async def asked(fetch: WorkerFetch) -> FetchReport | ErrorAnswer:
    """The first reply, once the worker listens."""

    async def said() -> FetchReport | ErrorAnswer | None:
        try:
            return await fetch.ask()
        except NoResponders:
            return None

    return await eventually(said, what="the worker listens")


async def test_two_callers_share_a_fetch_and_both_are_told_its_steps(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher(served="x")
    running = await start(fetcher=fetcher)
    one, two = fetch_of(client, running), fetch_of(client, running, "x:latest")
    await begun(one)
    await begun(two)
    fetcher.say("pulling", 3, 10)
    steps = await steps_of(one) + await steps_of(two)
    assert steps == [FetchStep("pulling", "sha256:pulling", 10, 3)] * 2
    fetcher.finish()
    for fetch in (one, two):
        last = await ended(fetch)
        assert (last.ended, last.served, last.error) == (True, "x", None)
    assert fetcher.begun == ["x"]


@pytest.mark.usefixtures("long_lease")
async def test_a_fetch_goes_on_for_the_caller_that_is_left_and_ends_with_the_last(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher()
    running = await start(fetcher=fetcher)
    one, two = fetch_of(client, running), fetch_of(client, running)
    await begun(one)
    await begun(two)
    async with one:
        pass
    fetcher.say("still")
    async with two:
        assert await steps_of(two) == [FetchStep("still")]
        assert fetcher.cancelled == []
    await eventually(lambda: fetcher.cancelled == ["x"], what="the fetch is given up")
    three = fetch_of(client, running)
    await begun(three)
    fetcher.finish()
    assert (await ended(three)).error is None
    assert fetcher.begun == ["x", "x"]


async def test_a_fetch_whose_caller_has_died_ends(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher()
    running = await start(fetcher=fetcher)
    await begun(fetch_of(client, running))
    running.skip(LEASE_S + 1)
    await eventually(lambda: fetcher.cancelled == ["x"], what="the fetch is given up")


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (HeadraceError(ErrorCode.ENGINE_FAILED, "The index does not answer."), "engine_failed", "The index does not"),
        (ZeroDivisionError(), "engine_failed", "The fetch failed"),
    ],
)
async def test_why_a_fetch_has_failed_is_told(
    start: StartWorker, client: Client, failure: Exception, code: str, said: str
):
    fetcher = ScriptedFetcher()
    fetch = fetch_of(client, await start(fetcher=fetcher))
    await begun(fetch)
    fetcher.fail(failure)
    last = await ended(fetch)
    assert last.error is not None
    assert (last.error.code, last.error.message[: len(said)]) == (code, said)


async def test_requests_are_answered_while_a_model_is_fetched(start: StartWorker, client: Client):
    running = await start(fetcher=ScriptedFetcher())
    await begun(fetch_of(client, running))
    await client.ask("r")
    (await running.engine.generation("r")).finish("done")
    assert (await client.answer("r")).choices[0].message.content == "done"


async def test_a_worker_that_drains_ends_its_fetches_and_says_so(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher()
    running = await start(fetcher=fetcher)
    await client.ask("r")
    generation = await running.engine.generation("r")
    fetch = fetch_of(client, running)
    await begun(fetch)
    running.lifecycle.stop(drain_s=30)
    last = await ended(fetch)
    assert last.error is not None
    assert (last.error.code, fetcher.cancelled) == (ErrorCode.UNAVAILABLE, ["x"])
    late = await fetch_of(client, running).ask()
    assert isinstance(late, FetchReport)
    assert late.error is not None
    generation.finish("done")
    await running.drain()


async def test_a_worker_that_dies_is_named_in_the_error(start: StartWorker, client: Client, monkeypatch):
    monkeypatch.setattr(fetching, "_SILENCE_S", 0.5)
    running = await start(fetcher=ScriptedFetcher())
    fetch = fetch_of(client, running)
    await begun(fetch)
    await running.kill()
    with pytest.raises(HeadraceError, match=f"Worker {running.worker.me.name}, which fetched") as caught:
        await ended(fetch)
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_what_a_worker_does_not_fetch_is_refused_with_its_reason(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher()
    running = await start(fetcher=fetcher)
    said = await asked(fetch_of(client, running, "other"))
    assert isinstance(said, ErrorAnswer)
    assert said.error.code is ErrorCode.MODEL_NOT_FOUND
    for body in (b"{", '{"model": "é"}'.encode("latin-1")):
        malformed = await client.bus.request(f"llm.fetch.{running.worker.me.name}", body)
        assert msgspec.json.decode(malformed.data)["error"]["code"] == "invalid_request"
    assert fetcher.begun == []


async def test_offline_nothing_is_fetched_and_an_unknown_name_may_be_anothers(start: StartWorker, client: Client):
    fetcher = ScriptedFetcher()
    running = await start(fetcher=fetcher, offline=True)
    said = await asked(fetch_of(client, running))
    assert isinstance(said, ErrorAnswer)
    assert (said.error.code, said.error.param) == (ErrorCode.INVALID_REQUEST, "model")
    assert said.error.message == (
        'Model "x" is not stored here, and --offline forbids fetching it. Start headrace without --offline.'
    )
    other = await asked(fetch_of(client, running, "other"))
    assert isinstance(other, ErrorAnswer)
    assert other.error.code is ErrorCode.MODEL_NOT_FOUND
    assert fetcher.begun == []


async def test_an_engine_without_models_of_its_own_hears_no_call(start: StartWorker, client: Client):
    running = await start()
    await client.ask("r")
    await running.engine.generation("r")  # it listens
    with pytest.raises(NoResponders):
        await fetch_of(client, running).ask()


async def test_a_reply_that_is_none_counts_as_no_answer(client: Client):
    await client.bus.subscribe("llm.fetch.odd", lambda message: client.bus.publish(message.reply, b"{}"))
    with pytest.raises(Unreachable, match="odd sent no report"):
        await WorkerFetch(client.bus, "odd", "x").ask()
