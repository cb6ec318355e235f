"""What every engine must do. Subclass `Conformance` in a module that has a fixture `engine`, and run it in the
fixture's event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import pytest

from pipeline.engine import Engine, Generation, Piece, Work
from pipeline.wire.answers import FinishReason, TokenScore, ToolCall, Usage, add_call
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority

PATIENCE_S = 110.0


class Answer(msgspec.Struct):
    """All pieces of an answer, joined."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)
    call_parts: list[ToolCall] = msgspec.field(default_factory=list)
    restarted: int = 0
    pieces: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    scores: list[TokenScore] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)

    def add(self, piece: Piece) -> None:
        self.pieces += 1
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
        self.call_parts += piece.tool_calls
        for part in piece.tool_calls:
            add_call(self.tool_calls, part)
        self.restarted += piece.restarted
        self.scores += piece.scores
        self.notes += piece.notes
        self.finish_reason, self.usage = piece.finish_reason, piece.usage


def work(request: ChatRequest | str, *, seed: int = 1, request_id: str = "r1", **more: Any) -> Work:
    request = ChatRequest(prompt=request) if isinstance(request, str) else request
    return Work(id=request_id, request=request, model="", seed=seed, **more)


async def read(generation: Generation) -> Answer:
    """The complete answer; raises the error with which it ends."""
    answer = Answer()
    async with asyncio.timeout(PATIENCE_S):
        while answer.finish_reason is None:
            answer.add(await generation.next())
    await generation.close()
    return answer


async def ask(engine: Engine, request: ChatRequest | str, **options: Any) -> Answer:
    return await read(await engine.submit(work(request, **options)))


async def refusal(engine: Engine, request: ChatRequest | str, **options: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        await ask(engine, request, **options)
    return caught.value


async def until(engine: Engine, condition: Callable[[], bool]) -> None:
    """Wait for a condition on the engine's status. It is checked at every change."""
    changed = asyncio.Event()
    engine.on_change(changed.set)
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            changed.clear()
            await changed.wait()


async def until_ready(engine: Engine) -> None:
    """Wait until the engine is ready. Fails at once if the engine is down."""
    await until(engine, lambda: engine.status().state in ("ready", "down"))
    assert engine.status().state == "ready", engine.status().reason


class Conformance:
    """Facts about any engine. `prompts` get answers of some length, `unending` one of a few hundred tokens."""

    prompts: ClassVar = [
        "What is the capital of France?",
        "What is 3 + 4?",
        "What is the capital of Japan?",
        "Count from 3 to 12.",
    ]
    unending = ChatRequest(prompt="Count from 1 to 40.", max_tokens=300)

    async def test_an_answer_ends_once_with_a_reason_and_exact_counts(self, engine):
        answer = await ask(engine, ChatRequest(prompt=self.prompts[0], max_tokens=64))
        assert answer.finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 0
        assert 0 < answer.usage.completion_tokens <= 64
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.text

    async def test_tokens_are_counted_as_an_answer_counts_them(self, engine):
        request = ChatRequest(prompt=self.prompts[0], max_tokens=1)
        if engine.counter is not None:
            answer = await ask(engine, request)
            assert answer.usage is not None
            assert await engine.counter.count_tokens(request) == answer.usage.prompt_tokens

    async def test_token_ids_where_given_are_as_many_as_the_counts_say(self, engine):
        answer = await ask(engine, ChatRequest(prompt=self.prompts[0], max_tokens=64))
        assert answer.usage is not None
        assert len(answer.token_ids) in (0, answer.usage.completion_tokens)

    async def test_the_token_limit_ends_an_answer_with_length(self, engine):
        answer = await ask(engine, ChatRequest(prompt=self.unending.prompt, max_tokens=3))
        assert answer.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3

    async def test_a_stop_string_ends_the_answer_and_is_not_in_it(self, engine):
        whole = await ask(engine, ChatRequest(prompt=self.unending.prompt, max_tokens=24, temperature=0))
        stop = whole.text[len(whole.text) // 2 :][:3]
        cut = await ask(engine, ChatRequest(prompt=self.unending.prompt, max_tokens=24, temperature=0, stop=[stop]))
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]

    async def test_the_same_seed_gives_the_same_answer(self, engine):
        request = ChatRequest(prompt=self.prompts[0], max_tokens=24, temperature=1)
        first = await ask(engine, request, seed=7)
        assert (await ask(engine, request, seed=7)).text == first.text

    async def test_the_scores_of_the_tokens_come_where_they_are_asked_for(self, engine):
        request = ChatRequest(prompt=self.prompts[0], max_tokens=8, temperature=0)
        assert (await ask(engine, request)).scores == []
        answer = await ask(engine, msgspec.structs.replace(request, logprobs=True, top_logprobs=2))
        assert "".join(score.token for score in answer.scores).strip() == answer.text.strip()
        assert all(score.logprob <= 0 and len(score.top_logprobs) in (1, 2) for score in answer.scores)

    async def test_every_slot_can_be_used_at_once(self, engine):
        total = engine.status().slots_total
        answers = await asyncio.gather(
            *(ask(engine, ChatRequest(prompt=self.prompts[i % 4], max_tokens=16)) for i in range(total))
        )
        assert all(answer.finish_reason for answer in answers)
        assert engine.status().slots_used == 0

    async def test_a_closed_request_frees_its_slot_and_closing_twice_is_harmless(self, engine):
        generation = await engine.submit(work(self.unending))
        await generation.next()
        assert engine.status().slots_used == 1
        await generation.close()
        await generation.close()
        assert engine.status().slots_used == 0
        assert (await ask(engine, ChatRequest(prompt=self.prompts[0], max_tokens=8))).finish_reason

    async def test_an_answer_can_be_closed_after_its_end(self, engine):
        generation = await engine.submit(work(ChatRequest(prompt=self.prompts[0], max_tokens=4)))
        await read(generation)
        await generation.close()
        assert engine.status().slots_used == 0

    async def test_cancelling_a_wait_loses_nothing(self, engine):
        request = ChatRequest(prompt=self.prompts[3], max_tokens=48, temperature=0)
        undisturbed = await ask(engine, request)
        generation = await engine.submit(work(request))
        answer = Answer()
        async with asyncio.timeout(PATIENCE_S):
            while answer.finish_reason is None:
                waiting = asyncio.ensure_future(generation.next())
                await asyncio.sleep(0)
                if waiting.cancel():
                    await asyncio.wait([waiting])
                if not waiting.cancelled():
                    answer.add(waiting.result())
                    continue
                answer.add(await generation.next())
        assert answer.text == undisturbed.text

    async def test_a_request_without_a_model_gets_any(self, engine):
        assert engine.resolve(None) in engine.status().models

    async def test_its_own_models_are_found_by_name(self, engine):
        for name in engine.status().models:
            assert engine.resolve(name) == name

    async def test_an_unknown_model_is_not_found(self, engine):
        with pytest.raises(HeadraceError) as caught:
            engine.resolve("no-such-model-anywhere")
        assert caught.value.code is ErrorCode.MODEL_NOT_FOUND

    @pytest.mark.parametrize("name", ["tinyllama", "tinyllama:latest", "tinyllama:1.1b", "TinyLlama-1.1B-Chat"])
    async def test_an_internal_model_answers_no_request(self, engine, name):
        with pytest.raises(HeadraceError) as caught:
            engine.resolve(name)
        assert caught.value.code is ErrorCode.MODEL_INTERNAL

    async def test_a_change_of_slots_is_told(self, engine):
        seen = []
        engine.on_change(lambda: seen.append(engine.status().slots_used))
        await ask(engine, ChatRequest(prompt=self.prompts[0], max_tokens=4))
        assert 1 in seen
        assert seen[-1] == 0

    async def test_rates_are_measured(self, engine):
        await ask(engine, ChatRequest(prompt=self.prompts[0], max_tokens=16))
        status = engine.status()
        assert status.tokens_per_s > 0
        assert status.tokens_per_request > 0
        assert status.pending_tokens == 0


class ExactConformance(Conformance):
    """Facts about the engines of a child process, which can resume any answer at any token."""

    async def test_a_request_in_company_gets_what_it_gets_alone(self, engine):
        requests = [
            ChatRequest(prompt=prompt, max_tokens=40, temperature=temperature)
            for prompt in self.prompts
            for temperature in (0, 1)
        ]
        alone = [await ask(engine, request, seed=i) for i, request in enumerate(requests)]
        together = await asyncio.gather(*(ask(engine, request, seed=i) for i, request in enumerate(requests)))
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        assert [answer.text for answer in together] == [answer.text for answer in alone]

    async def test_a_more_urgent_request_takes_a_place_and_the_others_go_on_exactly(self, engine):
        assert engine.status().suspends
        total = engine.status().slots_total
        request = ChatRequest(prompt=self.unending.prompt, max_tokens=60, temperature=1)
        alone = [await ask(engine, request, seed=seed) for seed in range(total)]
        running = [
            await engine.submit(work(request, seed=seed, request_id=f"low-{seed}", priority=Priority.LOW))
            for seed in range(total)
        ]
        begun = [await generation.next() for generation in running]
        short = ChatRequest(prompt=self.prompts[0], max_tokens=4, temperature=0)
        await asyncio.gather(*(ask(engine, short, request_id=f"high-{n}", priority=Priority.HIGH) for n in range(3)))
        assert engine.status().slots_used == total, "the answers of LOW are not done"
        rests = await asyncio.gather(*map(read, running))
        for whole, first, rest in zip(alone, begun, rests, strict=True):
            assert first.token_ids + rest.token_ids == whole.token_ids
            assert first.text + rest.text == whole.text
            assert (
                msgspec.structs.replace(rest.usage, prompt_tokens_details=whole.usage.prompt_tokens_details)
                == whole.usage
            )

    @pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
    async def test_a_resumed_answer_equals_an_undisturbed_one(self, engine, part):
        request = ChatRequest(prompt=self.unending.prompt, max_tokens=40, temperature=1)
        generation = await engine.submit(work(request, seed=11))
        whole, cuts = Answer(), []
        while whole.finish_reason is None:
            cuts.append((len(whole.token_ids), len(whole.text)))
            whole.add(await generation.next())
        tokens, chars = cuts[round(part * (len(cuts) - 1))]
        rest = await ask(
            engine, request, seed=11, resume_tokens=whole.token_ids[:tokens], resume_text=whole.text[:chars]
        )
        assert rest.text == whole.text[chars:]
        assert rest.token_ids == whole.token_ids[tokens:]
        assert (
            msgspec.structs.replace(rest.usage, prompt_tokens_details=whole.usage.prompt_tokens_details) == whole.usage
        )
        assert rest.finish_reason == whole.finish_reason

    async def test_an_answer_goes_on_from_text_without_tokens(self, engine):
        request = ChatRequest(prompt=self.prompts[0], max_tokens=60, temperature=0)
        rest = await ask(engine, request, resume_text="Well")
        assert rest.text
        assert rest.finish_reason is not None

    async def test_a_complete_answer_that_is_resumed_only_ends(self, engine):
        request = ChatRequest(prompt=self.prompts[0], max_tokens=20, temperature=0)
        whole = await ask(engine, request)
        rest = await ask(engine, request, resume_tokens=whole.token_ids, resume_text=whole.text)
        assert (rest.text, rest.token_ids) == ("", [])
        assert (
            msgspec.structs.replace(rest.usage, prompt_tokens_details=whole.usage.prompt_tokens_details) == whole.usage
        )
        assert rest.finish_reason == whole.finish_reason

    async def test_a_slow_reader_gets_the_answer_in_one_piece(self, engine):
        request = ChatRequest(prompt=self.unending.prompt, max_tokens=30, temperature=0)
        generation = await engine.submit(work(request))
        await until(engine, lambda: engine.status().slots_used == 0)
        answer = await read(generation)
        assert answer.pieces == 1
        assert answer.usage is not None
        assert len(answer.token_ids) == answer.usage.completion_tokens

    async def test_an_answer_read_to_its_end_has_nothing_more(self, engine):
        generation = await engine.submit(work(ChatRequest(prompt="x", max_tokens=1)))
        await read(generation)
        with pytest.raises(RuntimeError):
            await generation.next()

    async def test_a_prompt_longer_than_the_context_is_refused(self, engine):
        error = await refusal(engine, "word " * 200_000)
        assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert error.param == "messages"

    async def test_a_limit_beyond_the_context_is_cut_to_what_fits(self, engine):
        generation = await engine.submit(work(ChatRequest(prompt="x", max_tokens=10_000_000)))
        assert (await generation.next()).text
        await generation.close()

    async def test_an_answer_has_the_form_that_the_request_asks_for(self, engine):
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["red", "green"]}}}
        request = msgspec.convert({"prompt": "x", "response_format": form}, ChatRequest)
        answer = await ask(engine, request)
        assert json.loads(answer.text) in ("red", "green")
        assert answer.finish_reason == "stop"

    async def test_a_form_that_cannot_be_compiled_is_refused_with_its_reason(self, engine):
        form = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}
        request = msgspec.convert({"prompt": "x", "response_format": form}, ChatRequest)
        error = await refusal(engine, request)
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "response_format")
        assert "uniqueItems" in error.message

    async def test_integers_beyond_64_bits_in_a_tool_end_that_request_only(self, engine):
        tool = {"function": {"name": "f", "parameters": {"maximum": 10**30}}}
        request = msgspec.convert({"prompt": "x", "tools": [tool]}, ChatRequest)
        error = await refusal(engine, request)
        assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED_PARAMETER)
        assert (await ask(engine, ChatRequest(prompt="x", max_tokens=1))).finish_reason
