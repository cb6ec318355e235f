"""Workers of one engine with different models: a request goes to one that has its model, whichever pulls it."""

from __future__ import annotations

import asyncio
from collections import Counter

import msgspec

from pipeline.broker.connection import Message
from pipeline.config import Config
from pipeline.core.models import CannotLoad
from pipeline.engine import Generation, NotLoaded, Work
from pipeline.wire.answers import Completion
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.subjects import STREAM_REQUESTS, Lane, Priority, Task
from tests.lanes import listed
from tests.pipeline.worker.conftest import Client, Running, ScriptedEngine, StartWorker
from tests.waiting import eventually

# A lease that runs out on a busy machine is an attempt.
LEASE_S = 30.0


class Prompt(ScriptedEngine):
    """Answers at once."""

    async def submit(self, work: Work) -> Generation:
        generation = await super().submit(work)
        generation.finish("done")
        return generation


async def all_are_known(*workers: Running) -> None:
    """Each of these workers has heard the others, and hears no more of any that has left."""

    def heard() -> bool:
        return all(len(one.worker.me.peers.workers("mlx")) == len(workers) for one in workers)

    await eventually(heard, what="the workers know each other")


async def deliveries(client: Client, consumer: str) -> int:
    return (await client.bus.js.consumer_info(STREAM_REQUESTS, consumer)).delivered.consumer_seq


class Returns:
    """The attempts of requests that workers return, as the broker's own events tell them.

    nats-server 2.14.6, 2.15.0 and 2.15.1 count a request's first delivery even if its pull was cancelled at that moment
    and no worker received it. It then counts as an attempt, and nothing that a worker sees tells it from one.
    """

    def __init__(self) -> None:
        self._returned: Counter[int] = Counter()
        self._began_at: dict[str, int] = {}

    @classmethod
    async def of(cls, client: Client) -> Returns:
        returns = cls()
        await client.bus.subscribe(f"$JS.EVENT.ADVISORY.CONSUMER.MSG_NAKED.{STREAM_REQUESTS}.*", returns._on_nak)
        await client.bus.subscribe("llm.event.>", returns._on_event)
        await client.bus.nc.flush()
        return returns

    async def _on_nak(self, message: Message) -> None:
        self._returned[msgspec.json.decode(message.data)["stream_seq"]] += 1

    async def _on_event(self, message: Message) -> None:
        event = msgspec.json.decode(message.data, type=RequestEvent)
        if event.kind == "started":
            self._began_at[event.id] = event.deliveries

    async def used_no_attempt(self, name: str, sequence: int, answer: Completion) -> None:
        """Assert that each return was taken off. name, sequence: the request's, and of its message in the stream."""

        def agrees() -> bool:
            begun = self._began_at.get(name, 0) - self._returned[sequence]
            return begun == answer.headrace.attempts and begun in (1, 2)

        await eventually(agrees, what=f"{answer.headrace.attempts} attempts of {name}: its deliveries less its returns")


def naming(model: str) -> bytes:
    return b'{"prompt":"x","model":"%s"}' % model.encode()


async def test_two_hundred_requests_for_two_models_are_answered_by_their_own(start: StartWorker, client: Client):
    engines = {model: Prompt(model=model) for model in ("alpha", "beta")}
    await all_are_known(*[await start(engine, lease_s=LEASE_S) for engine in engines.values()])
    returns = await Returns.of(client)
    ids = {f"{model}-{number}": model for number in range(100) for model in engines}
    sequences = {name: await client.ask(name, naming(model), lane="medium") for name, model in ids.items()}
    answers = {request_id: await client.answer(request_id) for request_id in ids}
    assert {request_id: answer.model for request_id, answer in answers.items()} == ids
    for request_id, answer in answers.items():
        await returns.used_no_attempt(request_id, sequences[request_id], answer)
    served = {model: Counter(run.work.request.model for run in engine.submitted) for model, engine in engines.items()}
    assert served == {"alpha": {"alpha": 100}, "beta": {"beta": 100}}
    await client.none_waits()


async def test_a_request_waits_for_a_busy_worker_that_has_its_model_without_going_round(
    start: StartWorker, client: Client
):
    busy = ScriptedEngine(model="beta", slots=1)
    await all_are_known(await start(Prompt(model="alpha"), lease_s=LEASE_S), await start(busy, lease_s=LEASE_S))
    await client.ask("first", naming("beta"))
    running = await busy.generation("first")
    returns = await Returns.of(client)
    sequences = [await client.ask(f"r{number}", naming("beta")) for number in range(10)]
    before = await deliveries(client, "high")
    began_at = asyncio.get_running_loop().time()
    # An idle worker has them all in hand again and again, for as long as the other one is busy.
    await eventually(lambda: deliveries_exceed(client, before + 20), what="requests that were given back come again")
    took_s = asyncio.get_running_loop().time() - began_at
    assert await deliveries(client, "high") - before < 60 + 40 * took_s
    running.finish("done")
    for number in range(10):  # in any order
        await eventually(lambda runs=number + 2: len(busy.submitted) == runs, what="the next one runs")
        busy.submitted[-1].finish("done")
    for number, sequence in enumerate(sequences):
        answer = await client.answer(f"r{number}")
        assert answer.model == "beta"
        await returns.used_no_attempt(f"r{number}", sequence, answer)
    await client.none_waits()


async def test_the_same_for_tenants_whose_lanes_no_pull_stands_open_on(
    start: StartWorker, client: Client, config: Config
):
    engines = {model: Prompt(model=model) for model in ("alpha", "beta")}
    lanes = [Lane(Priority.MEDIUM, Task.UNTRIAGED, tenant) for tenant in ("ann", "bob")]
    await listed(client.bus, config, *lanes)
    await all_are_known(*[await start(engine, lease_s=LEASE_S) for engine in engines.values()])
    returns, sequences = await Returns.of(client), {}
    names = {f"t.{lane.tenant}.{model}-{n}": (model, lane) for n in range(20) for model in engines for lane in lanes}
    for name, (model, lane) in names.items():
        sequences[name] = await client.ask(name, naming(model), lane=lane.subject.removeprefix("llm.request."))
        if name.endswith(("7", "3")):
            await client.answer(name)  # the workers are idle
    answers = {name: await client.answer(name) for name in names}
    assert {name: answer.model for name, answer in answers.items()} == {n: model for n, (model, _) in names.items()}
    for name, answer in answers.items():
        await returns.used_no_attempt(name, sequences[name], answer)
    served = {model: Counter(run.work.request.model for run in engine.submitted) for model, engine in engines.items()}
    assert served == {"alpha": {"alpha": 40}, "beta": {"beta": 40}}
    await client.none_waits()


async def test_a_request_of_a_tenant_waits_for_a_busy_worker_without_going_round(
    start: StartWorker, client: Client, config: Config
):
    busy = ScriptedEngine(model="beta", slots=1)
    lane = Lane(Priority.HIGH, Task.UNTRIAGED, "ann")
    await listed(client.bus, config, lane)
    await all_are_known(await start(Prompt(model="alpha"), lease_s=LEASE_S), await start(busy, lease_s=LEASE_S))
    await client.ask("first", naming("beta"))
    running = await busy.generation("first")
    returns = await Returns.of(client)
    sequence = await client.ask("t.ann.r", naming("beta"), lane="high.t.ann")
    began_at = asyncio.get_running_loop().time()

    async def goes_round() -> bool:
        return await deliveries(client, lane.consumer) > 4

    await eventually(goes_round, what="it is given back again and again")
    took_s = asyncio.get_running_loop().time() - began_at
    assert await deliveries(client, lane.consumer) < 10 + 40 * took_s
    running.finish("done")
    (await busy.generation("t.ann.r")).finish("done")
    await returns.used_no_attempt("t.ann.r", sequence, await client.answer("t.ann.r"))


async def test_a_request_of_a_tenant_that_the_only_worker_hands_back_comes_again(
    start: StartWorker, client: Client, config: Config
):
    engine = Prompt(model="alpha", refusal=NotLoaded("Many requests wait for model alpha."))
    lane = Lane(Priority.HIGH, Task.UNTRIAGED, "ann")
    await listed(client.bus, config, lane)
    await start(engine, lease_s=LEASE_S)
    returns = await Returns.of(client)
    sequence = await client.ask("t.ann.r", naming("alpha"), lane="high.t.ann")

    async def comes_again() -> bool:
        return await deliveries(client, lane.consumer) > 3

    await eventually(comes_again, what="it is handed back again and again")
    engine.refusal = None
    await returns.used_no_attempt("t.ann.r", sequence, await client.answer("t.ann.r"))
    await client.none_waits()


async def deliveries_exceed(client: Client, number: int) -> bool:
    return await deliveries(client, "high") > number


async def test_a_worker_that_is_not_heard_for_a_while_is_waited_for(start: StartWorker, client: Client):
    alpha, beta = await start(Prompt(model="alpha")), await start(Prompt(model="beta"))
    await all_are_known(alpha, beta)
    await beta.drain()
    await all_are_known(alpha)
    alpha.skip(5.0)  # longer than a status counts, shorter than a worker is remembered
    await client.ask("r", naming("beta"))
    await eventually(lambda: deliveries_exceed(client, 2), what="the request is given back")
    assert await client.record("r") == []
    await start(Prompt(model="beta"))
    assert (await client.answer("r")).model == "beta"


async def test_a_worker_that_has_just_begun_lets_the_others_say_what_they_have(start: StartWorker, client: Client):
    alpha = await start(Prompt(model="alpha"))
    # It has just begun for as long as the test takes.
    alpha.worker._context.patience_s = alpha.worker._context._began_at = float("inf")
    ollama = WorkerStatus("o", "ollama", "ready", ["small"], Slots(0, 1), PerPriorityCount(), 0, 0, 0, 0, 0, at=0.0)

    async def heard() -> bool:
        await client.bus.publish("llm.worker.o", encode(ollama))
        return bool(alpha.worker.me.peers.workers("ollama"))

    await eventually(heard, what="Ollama's worker is heard")
    await client.ask("r", naming("beta"))
    await eventually(lambda: deliveries_exceed(client, 1), what="the request is given back")
    assert await client.record("r") == []
    await start(Prompt(model="beta"))
    assert (await client.answer("r")).model == "beta"


async def test_a_model_whose_last_worker_has_left_for_good_is_not_found(start: StartWorker, client: Client):
    alpha, beta = await start(Prompt(model="alpha")), await start(Prompt(model="beta"))
    await all_are_known(alpha, beta)
    await beta.drain()
    await all_are_known(alpha)
    alpha.skip(60.0)
    await client.ask("r", naming("beta"))
    assert await client.code("r") == ErrorCode.MODEL_NOT_FOUND


async def test_a_request_whose_model_is_not_in_memory_comes_again_and_no_attempt_is_used(
    start: StartWorker, client: Client
):
    engine = Prompt(model="alpha", refusal=NotLoaded("Many requests wait for model alpha."))
    await start(engine, lease_s=LEASE_S)
    returns = await Returns.of(client)
    sequence = await client.ask("r", naming("alpha"))
    await eventually(lambda: deliveries_exceed(client, 4), what="it is handed back again and again")
    assert await client.record("r") == []
    engine.refusal = None
    answer = await client.answer("r")
    assert answer.model == "alpha"
    await returns.used_no_attempt("r", sequence, answer)
    await client.none_waits()


async def test_requests_for_any_model_end_with_the_reason_where_the_only_one_cannot_be_loaded(
    start: StartWorker, client: Client
):
    why = "its file is incomplete."

    class Broken(Prompt):
        def resolve(self, model: str | None) -> str:
            raise CannotLoad("broken", why)

    await start(Broken(model="broken", reports={"cannot_load": {"broken": why}}), lease_s=LEASE_S)
    await client.ask("any", naming("auto"))
    answer = await client.answer("any")
    assert (answer.error.code, answer.error.message) == (
        ErrorCode.UNAVAILABLE,
        f'Model "broken" cannot be loaded: {why}',
    )
    await client.none_waits()


async def test_a_model_that_no_worker_can_load_ends_its_requests_with_the_reason(start: StartWorker, client: Client):
    why = "its file is incomplete."

    class Broken(Prompt):
        def resolve(self, model: str | None) -> str:
            if model == "broken":
                raise CannotLoad("broken", why)
            return super().resolve(model)

    one = await start(Broken(reports={"cannot_load": {"broken": why}}), lease_s=LEASE_S)
    await client.ask("first", naming("broken"))
    answer = await client.answer("first")
    assert (answer.error.code, answer.error.message) == (
        ErrorCode.UNAVAILABLE,
        f'Model "broken" cannot be loaded: {why}',
    )
    other = await start(Prompt(model="broken"), lease_s=LEASE_S)
    await all_are_known(one, other)
    await client.ask("second", naming("broken"))
    assert (await client.answer("second")).model == "broken"
    await client.none_waits()
