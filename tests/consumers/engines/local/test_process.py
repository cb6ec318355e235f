"""However the child or one of its requests ends, the other requests are answered as usual."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.demo_model import PATH as DEMO
from consumers.engines.local.process import EngineProcess
from consumers.engines.local.protocol import Facts, Ready, Stats, Step
from pipeline.config import Config
from pipeline.engine import FIRST_SLOTS, Misbehaved
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import Answer, ask, read, until, until_ready, work
from tests.consumers.engines.processes import engine_of
from tests.waiting import eventually

ENGINES = ["mlx", "simulated"]

_ORPHAN_MAKER = """
import asyncio
from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.wire.requests import ChatRequest
from pipeline.engine import Work

async def main():
    config = Config(engine="simulated", simulated_tokens_per_s=1.0, slots=1)
    async with EngineProcess(config, model_path="", served_name="m") as engine:
        request = ChatRequest(prompt="x", max_tokens=1000)
        generation = await engine.submit(Work(id="r", request=request, model="", seed=1))
        await generation.next()
        print(engine.child_pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


class _Child:
    """The parent's side of a child, which is told nothing."""

    pid = 1

    def send(self, frame) -> None:
        """Drop it."""


async def test_the_slots_are_those_that_the_child_found_and_each_change_is_announced():
    engine = EngineProcess(Config(), model_path="", served_name="m")
    announced = []
    engine.on_change(lambda: announced.append(engine.status().slots_total))
    child, facts = _Child(), Facts(context_tokens=1, vocabulary=1, calls_tools=False, kv_bytes_per_token=0)
    engine._handle(child, Ready(facts))
    engine._handle(child, Step([], Stats(slots=12)))
    engine._handle(child, Step([], Stats(slots=12)))
    assert announced == [FIRST_SLOTS, 12]
    # Another child begins anew.
    engine._handle(child, Ready(facts))
    assert engine.status().slots_total == FIRST_SLOTS


def test_the_setting_limits_the_slots_before_any_was_found():
    assert EngineProcess(Config(slots=3), model_path="", served_name="m").status().slots_total == 3


@pytest.fixture(params=ENGINES)
def kind(request):
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="MLX is not installed")
    return request.param


def counting(up_to: int, *, fault: str = "", temperature: float = 0.8) -> ChatRequest:
    return ChatRequest(prompt=f"Count from 1 to {up_to}. {fault}", max_tokens=30, temperature=temperature)


async def neighbours(engine, poison: str) -> tuple[list[Answer], HeadraceError]:
    """Three answers beside a request with a fault, and the error of that request."""
    generations = [await engine.submit(work(counting(20 + i), seed=i)) for i in range(2)]
    poisoned = await engine.submit(work(counting(30, fault=poison), seed=9))
    generations.append(await engine.submit(work(counting(22), seed=2)))
    *answers, error = await asyncio.gather(*map(read, generations), read(poisoned), return_exceptions=True)
    assert isinstance(error, HeadraceError)
    return answers, error


@pytest.mark.parametrize("fault", ["segfault@5", "abort", "raise@3"])
async def test_a_request_that_crashes_the_engine_ends_alone(start, kind, fault):
    async with start(kind) as engine:
        undisturbed = [await ask(engine, counting(20 + i), seed=i) for i in range(3)]
        answers, error = await neighbours(engine, f"[[fault:{fault}]]")
        assert error.code is ErrorCode.ENGINE_FAILED
        assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in undisturbed]
        assert [answer.usage for answer in answers] == [answer.usage for answer in undisturbed]
        assert all(answer.restarted <= 1 for answer in answers)
        assert engine.status().slots_used == 0


async def test_requests_of_one_turn_of_the_loop_are_written_to_the_child_together(start, monkeypatch):
    async with start("simulated") as engine:
        requests = [work(counting(20 + number), request_id=f"r{number}", seed=number) for number in range(5)]
        apart = [(await ask(engine, request.request, seed=request.seed)).text for request in requests]
        stdin, writes = engine._child._stdin, []
        write = stdin.write
        monkeypatch.setattr(stdin, "write", lambda data: (writes.append(data), write(data)))
        generations = [await engine.submit(request) for request in requests]
        assert [(await read(generation)).text for generation in generations] == apart
        assert len(writes) == 2, "the first one at once, and the others together"


async def test_an_exception_costs_no_reload(start):
    async with start("simulated") as engine:
        before = engine.child_pid
        await neighbours(engine, "[[fault:raise]]")
        assert engine.child_pid == before


async def test_a_step_that_never_ends_is_ended(start):
    # The request is alone: on a busy machine a step of an innocent one could last as long.
    async with start("simulated", step_timeout_s=0.2) as engine:
        with pytest.raises(HeadraceError, match="no step completed within") as caught:
            await ask(engine, counting(9, fault="[[fault:hang@2]]"))
        assert caught.value.code is ErrorCode.ENGINE_FAILED


async def counted(engine) -> None:
    await engine.counter.count_tokens(counting(9))


async def refused(engine) -> None:
    await ask(engine, ChatRequest(prompt="x", suffix="y"))


@pytest.mark.parametrize("told", [counted, refused])
async def test_a_step_that_never_ends_is_ended_though_the_child_still_replies(start, told):
    async def again_and_again(engine) -> None:
        while True:
            with contextlib.suppress(HeadraceError):
                await told(engine)
            await asyncio.sleep(0.01)

    async with start("simulated", step_timeout_s=0.5) as engine, asyncio.timeout(90):
        hangs = await engine.submit(work(counting(9, fault="[[fault:hang@2]]")))
        asking = asyncio.create_task(again_and_again(engine))
        with pytest.raises(HeadraceError, match="no step completed within"):
            await read(hangs)
        asking.cancel()


async def test_two_poisons_at_once_end_both_and_no_other_request(start):
    async with start("simulated") as engine:
        requests = [
            counting(9),
            counting(9, fault="[[fault:abort]]"),
            counting(9),
            counting(9, fault="[[fault:raise]]"),
        ]
        answers = await asyncio.gather(*(ask(engine, request) for request in requests), return_exceptions=True)
        assert [isinstance(answer, HeadraceError) for answer in answers] == [False, True, False, True]
        assert all(answer.restarted <= 2 for answer in answers[::2])


async def test_a_child_killed_from_outside_ends_no_request(start, kind):
    async with start(kind) as engine:
        undisturbed = [await ask(engine, counting(20 + i), seed=i) for i in range(3)]
        generations = [await engine.submit(work(counting(20 + i), seed=i)) for i in range(3)]
        begun = [await generation.next() for generation in generations]
        os.kill(engine.child_pid, signal.SIGKILL)
        answers = await asyncio.gather(*map(read, generations))
        assert [piece.text + answer.text for piece, answer in zip(begun, answers, strict=True)] == [
            answer.text for answer in undisturbed
        ]
        assert all(answer.restarted == 1 for answer in answers)


async def test_a_request_alone_survives_a_child_killed_from_outside(start):
    async with start("simulated") as engine:
        generation = await engine.submit(work(counting(20)))
        await generation.next()
        os.kill(engine.child_pid, signal.SIGKILL)
        assert (await read(generation)).restarted == 1


async def killing_the_child_in_company(engine, generation, restarts: list[int]) -> None:
    """Read, and kill the child whenever two requests run: trials are over then, so no request is guilty."""
    while (piece := await generation.next()).finish_reason is None:
        restarts.append(piece.restarted)
        if piece.token_ids and engine.status().slots_used == 2:
            os.kill(engine.child_pid, signal.SIGKILL)


async def test_a_request_in_one_crash_after_the_other_has_used_up_an_attempt(start):
    async with start("simulated", simulated_tokens_per_s=100.0) as engine:
        generation = await engine.submit(work(counting(20)))
        company = await engine.submit(work(counting(20)))
        restarts: list[int] = []
        with pytest.raises(HeadraceError) as caught:
            await killing_the_child_in_company(engine, generation, restarts)
        assert isinstance(caught.value, Misbehaved)
        assert sum(restarts) == 4
        await company.close()


async def test_an_idle_child_that_dies_is_replaced(start):
    async with start("simulated") as engine:
        before = engine.child_pid
        os.kill(before, signal.SIGKILL)
        await until(engine, lambda: engine.status().state == "loading")
        await until_ready(engine)
        assert engine.child_pid != before
        assert (await ask(engine, counting(3))).finish_reason


async def test_no_slot_is_offered_until_the_culprit_is_known(start):
    async with start("simulated", slots=4) as engine:
        offered = []
        engine.on_change(lambda: offered.append(engine.status().slots_used < 4))
        poisoned = await engine.submit(work(counting(9, fault="[[fault:segfault]]")))
        crashed = asyncio.ensure_future(poisoned.next())
        piece = await crashed
        assert piece.restarted == 1
        offered.clear()
        late = await engine.submit(work(counting(9)))
        with pytest.raises(HeadraceError):
            await read(poisoned)
        assert not any(offered[:-1])
        assert (await read(late)).restarted == 0


async def test_a_suspect_that_is_closed_delays_no_other_request(start):
    async with start("simulated") as engine:
        first = await engine.submit(work(counting(9)))
        second = await engine.submit(work(counting(9)))
        await first.next()
        os.kill(engine.child_pid, signal.SIGKILL)
        while not (await second.next()).restarted:
            pass
        await second.close()
        assert (await read(first)).restarted == 1


async def test_a_model_that_is_not_there_is_reported_and_requests_are_passed_on(tmp_path):
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    async with engine_of(Config(engine="mlx", model=str(tmp_path / "nowhere"))) as engine:
        waiting = await engine.submit(work("x"))
        with pytest.raises(HeadraceError) as caught:
            await read(waiting)
        assert caught.value.code is ErrorCode.UNAVAILABLE
        await until(engine, lambda: engine.status().state == "down")
        assert "nowhere" in engine.status().reason
        with pytest.raises(HeadraceError) as refused:
            await engine.submit(work("x"))
        assert refused.value.code is ErrorCode.UNAVAILABLE


async def test_a_search_for_a_blas_library_that_fails_is_begun_again():
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    tries = []

    async def select(wanted: str, _: int) -> None:
        tries.append(wanted)
        if len(tries) == 1:
            raise OSError("Resource temporarily unavailable")

    async with EngineProcess(Config(), model_path=str(DEMO), served_name="m", select=select) as engine:
        reasons = []
        engine.on_change(lambda: reasons.append(engine.reason))
        await until(engine, lambda: engine.state == "ready")
        assert len(tries) == 2
        assert "OSError: Resource temporarily unavailable" in reasons


async def test_loading_is_reported(start):
    notes = []
    async with engine_of(Config(engine="simulated", simulated_load_s=0.1)) as engine:
        engine.on_change(lambda: notes.append((engine.status().state, engine.status().reason)))
        await until_ready(engine)
    assert ("loading", "simulating a model that loads") in notes


async def test_an_engine_that_is_stopped_hands_its_requests_back():
    config = Config(engine="simulated", simulated_tokens_per_s=10.0)
    async with engine_of(config) as engine:
        await until_ready(engine)
        running = await engine.submit(work("x"))
        await running.next()
        child = engine.child_pid
    with pytest.raises(HeadraceError) as caught:
        await read(running)
    assert caught.value.code is ErrorCode.UNAVAILABLE
    assert not is_alive(child)


async def test_an_engine_stopped_while_it_loads_ends_at_once():
    async with engine_of(Config(engine="simulated", simulated_load_s=3600.0)) as engine:
        await until(engine, lambda: engine.status().reason.startswith("simulating"))
        child = engine.child_pid
    assert not is_alive(child)


async def test_a_child_ends_with_its_parent():
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", _ORPHAN_MAKER, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not is_alive(child), what="the end of the child")


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that ended and is not reaped yet does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


def niceness_of_threads(pid: int) -> dict[int, int]:
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
async def test_a_model_on_a_cpu_yields_to_the_threads_that_carry_requests(start):
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    if mx.default_device() != mx.cpu:
        pytest.skip("the model runs on a GPU")
    async with start("mlx") as engine:
        await ask(engine, counting(20))
        nice = niceness_of_threads(engine.child_pid)
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert nice.pop(engine.child_pid) > own
        assert own in nice.values(), "the thread that reads requests"


async def test_a_count_is_refused_as_a_request_is_and_made_again_after_a_crash():
    config = Config(engine="simulated", slots=1)
    async with engine_of(config) as engine:
        await until_ready(engine)
        with pytest.raises(HeadraceError) as refused:
            await engine.counter.count_tokens(ChatRequest(prompt="x", suffix="y"))
        assert refused.value.code is ErrorCode.UNSUPPORTED_PARAMETER
        first = engine.child_pid
        os.kill(first, signal.SIGKILL)
        await until(engine, lambda: engine.child_pid not in (None, first))
        await until_ready(engine)
        assert await engine.counter.count_tokens(ChatRequest(prompt="x" * 40)) == 10


async def test_a_model_that_cannot_be_loaded_again_is_told_with_the_reason_until_it_can(tmp_path):
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    whole = (folder / "config.json").read_text()
    async with EngineProcess(Config(), model_path=str(folder), served_name="m") as engine:
        await until_ready(engine)
        assert engine.status().cannot_load == {}
        (folder / "config.json").write_text(whole.replace('"llama"', '"quux"'))
        os.kill(engine.child_pid, signal.SIGKILL)
        await until(engine, lambda: engine.status().cannot_load)
        assert engine.status().cannot_load == {"m": "ValueError: Model type quux not supported."}
        assert engine.status().models == ["m"], "its requests wait"
        (folder / "config.json").write_text(whole)
        await until(engine, lambda: engine.status().state == "ready")
        assert engine.status().cannot_load == {}
