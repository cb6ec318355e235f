"""The requests of one engine, without a process: what goes to the child, and what a crash does to each of them."""

from __future__ import annotations

import msgspec
import pytest

from consumers.engines.local.inflight import MOST_CRASHES, InFlight
from consumers.engines.local.protocol import Cancel, Submit, encode
from pipeline.engine import Misbehaved, Piece
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, Tool
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import read, work


class Scene:
    """Requests, and a child that only notes the frames it is sent."""

    def __init__(self, *, requests: int = 0, ready: bool = True) -> None:
        self.sent = []
        self.closed = 0
        self.flight = InFlight(self._on_close)
        self.runs = [self.flight.submit(work(f"prompt {i}", request_id=f"r{i}")) for i in range(requests)]
        if ready:
            self.flight.connect(self.sent.append)
        self.flight.dispatch()

    def _on_close(self):
        self.closed += 1
        self.flight.dispatch()

    def begun(self) -> list[str]:
        """The ids of the requests that went to the child since the last call."""
        ids = [frame.work.id for frame in self.sent if isinstance(frame, Submit)]
        self.sent.clear()
        return ids

    def produce(self, run, *tokens: int, finish_reason=None) -> None:
        self.flight.produced(
            run.number, Piece(text="x" * len(tokens), token_ids=[*tokens], finish_reason=finish_reason)
        )
        self.flight.dispatch()

    def crash(self, cause="SIGSEGV") -> None:
        """The child dies and another one takes its place."""
        self.flight.disconnect()
        self.flight.crashed(cause)
        self.flight.connect(self.sent.append)
        self.flight.dispatch()


async def error_of(run) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        await read(run)
    return caught.value


def test_requests_wait_for_a_child():
    scene = Scene(requests=2, ready=False)
    assert (scene.begun(), scene.flight.busy, len(scene.flight)) == ([], False, 2)
    scene.flight.connect(scene.sent.append)
    scene.flight.dispatch()
    assert (scene.begun(), scene.flight.busy) == (["r0", "r1"], True)


async def test_after_a_crash_suspects_run_alone_from_their_tokens_the_last_one_first():
    scene = Scene(requests=2)
    first, second = scene.runs
    scene.produce(first, 1, 2)
    scene.begun()
    scene.crash()
    assert scene.flight.on_probation
    assert scene.begun() == ["r1"]
    scene.produce(second, 7)
    (cancel, submit) = scene.sent
    assert isinstance(cancel, Cancel), "the cleared request waits for the end of the trials"
    assert (submit.work.id, submit.work.resume_tokens, submit.work.resume_text) == ("r0", [1, 2], "xx")
    scene.sent.clear()
    scene.produce(first, 3)
    assert scene.begun() == ["r1"]
    assert not scene.flight.on_probation
    assert (await second.next()).restarted == 1


@pytest.mark.parametrize("had", [{"resume_text": "ab"}, {"resume_reasoning": "ab"}])
@pytest.mark.parametrize("parked", [False, True])
def test_after_the_text_of_another_engine_a_request_goes_on_from_its_text(had, parked):
    """The tokens of that text are not known: those that follow it are not the whole answer."""
    scene = Scene()
    run = scene.flight.submit(work("x", **had))
    scene.flight.dispatch()
    scene.produce(run, 7)
    scene.sent.clear()
    if parked:
        scene.flight.park()
        scene.flight.connect(scene.sent.append)
        scene.flight.dispatch()
    else:
        scene.crash()
    (again,) = [frame.work for frame in scene.sent]
    assert again.resume_text == had.get("resume_text", "") + "x"
    assert again.resume_reasoning == had.get("resume_reasoning", "")
    assert again.resume_tokens == []


def test_a_request_that_runs_again_awaits_no_others():
    scene = Scene()
    scene.flight.submit(msgspec.structs.replace(work("x"), coming=3))
    scene.flight.dispatch()
    scene.crash()
    assert [frame.work.coming for frame in scene.sent] == [3, 0]


async def test_a_suspended_request_is_so_for_its_reader_until_it_is_resumed_or_restarted():
    scene = Scene(requests=2)
    first, second = scene.runs
    scene.produce(first, 1)
    scene.flight.moved(suspended=[first.number, 99], resumed=[])
    piece = await first.next()
    assert (piece.token_ids, piece.suspended, piece.preempted) == ([1], True, 1)
    scene.flight.moved(suspended=[second.number], resumed=[first.number])
    scene.produce(first, 2)
    piece = await first.next()
    assert (piece.token_ids, piece.suspended, piece.preempted) == ([2], False, 0)
    scene.crash()
    piece = await second.next()
    assert (piece.suspended, piece.preempted, piece.restarted) == (None, 1, 1)


async def test_a_request_that_crashes_the_engine_alone_ends_and_the_error_names_the_cause():
    scene = Scene(requests=2)
    scene.crash()
    scene.crash("SIGABRT")
    innocent, guilty = scene.runs
    error = await error_of(guilty)
    assert error.code is ErrorCode.ENGINE_FAILED
    assert error.message.startswith("This request crashed the engine twice (SIGABRT).")
    scene.produce(innocent, 1)
    assert (await innocent.next()).restarted == 1


async def test_a_request_in_too_many_crashes_has_used_up_an_attempt():
    scene = Scene(requests=2)
    for _ in range(MOST_CRASHES + 1):
        scene.crash()
        for run in scene.runs[::-1]:
            scene.produce(run, 1)
    for run in scene.runs:
        error = await error_of(run)
        assert isinstance(error, Misbehaved)
        assert "crashed 5 times" in error.message
    assert len(scene.flight) == 0


def test_a_new_child_begins_at_the_first_epoch():
    scene = Scene(requests=1)
    scene.flight.reset(3, "RuntimeError")
    scene.flight.dispatch()
    assert [frame.epoch for frame in scene.sent] == [0, 3]
    scene.sent.clear()
    scene.crash()
    scene.flight.submit(work("x"))
    scene.flight.dispatch()
    assert [frame.epoch for frame in scene.sent] == [0]


async def test_a_frame_about_an_earlier_try_is_ignored():
    scene = Scene(requests=1)
    (run,) = scene.runs
    before = run.number
    scene.crash()
    scene.flight.produced(before, Piece(text="late", token_ids=[9]))
    scene.flight.rejected(before, HeadraceError(ErrorCode.INVALID_REQUEST, "late"))
    scene.produce(run, 1, finish_reason="stop")
    assert (await run.next()).text == "x"


async def test_a_closed_request_leaves_the_child_and_its_owner_is_told_once():
    scene = Scene(requests=1)
    (run,) = scene.runs
    number = run.number
    await run.close()
    await run.close()
    assert scene.sent[-1] == Cancel(number)
    assert (scene.closed, len(scene.flight), scene.flight.busy) == (1, 0, False)


async def test_a_suspect_that_is_closed_ends_its_trial():
    scene = Scene(requests=2)
    scene.crash()
    scene.begun()
    await scene.runs[1].close()
    assert scene.begun() == ["r0"]


async def test_giving_up_ends_all_requests():
    scene = Scene(requests=2)
    scene.flight.give_up("The engine was stopped.")
    assert [(await error_of(run)).message for run in scene.runs] == ["The engine was stopped."] * 2


async def test_a_request_that_no_frame_can_carry_ends_alone():
    scene = Scene(ready=False)
    beyond_64_bits = Tool(function={"name": "f", "parameters": {"maximum": 10**30}})
    unsendable = scene.flight.submit(work(ChatRequest(prompt="x", tools=[beyond_64_bits])))
    other = scene.flight.submit(work("x"))

    def send(frame):
        encode(frame)
        scene.sent.append(frame)

    scene.flight.connect(send)
    scene.flight.dispatch()
    assert (await error_of(unsendable)).code is ErrorCode.INVALID_REQUEST
    assert [frame.key for frame in scene.sent] == [other.number]


async def test_requests_of_a_model_that_leaves_are_suspended_and_go_on_in_the_next_child():
    scene = Scene(requests=2)
    first, second = scene.runs
    scene.begun()
    scene.produce(first, 1, 2)
    scene.flight.park()
    assert not scene.flight.busy
    assert len(scene.flight) == 2
    piece = await first.next()
    assert (piece.token_ids, piece.suspended, piece.preempted, piece.restarted) == ([1, 2], True, 1, 0)
    await second.close()
    scene.flight.connect(scene.sent.append)
    scene.flight.dispatch()
    (resumed,) = (frame.work for frame in scene.sent if isinstance(frame, Submit))
    assert (resumed.id, resumed.resume_tokens, resumed.coming) == ("r0", [1, 2], 0)
    assert (await first.next()).suspended is False
    scene.produce(first, 3, finish_reason="stop")
    assert (await first.next()).token_ids == [3]


def test_how_many_requests_are_as_urgent_and_which_is_the_most_urgent():
    scene = Scene()
    assert scene.flight.most_urgent is None
    for priority in (Priority.LOW, Priority.MEDIUM, Priority.LOW):
        scene.flight.submit(work("x", priority=priority))
    assert scene.flight.most_urgent is Priority.MEDIUM
    assert [scene.flight.count(priority) for priority in Priority] == [0, 1, 3]
