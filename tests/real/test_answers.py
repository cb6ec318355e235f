"""What a real chat model answers through the pipeline, as OpenAI's client and as a NATS client see it."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.e2e.conftest import chat, child_of, joined, text_of
from tests.real.ties import first_difference, gap_at
from tests.waiting import eventually

pytestmark = pytest.mark.real

EASY = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "Who wrote Hamlet?": "Shakespeare",
    "What is 2 plus 3?": "5",
}
WORDS = ("bread", "rain", "stone", "glass", "salt", "iron", "wool", "milk")
# Texts of the same request may differ where the two likeliest tokens are this close: a batch rounds differently.
NEAR_TIE = 0.001
PARAGRAPH = (
    "The old mill stands at the bend of the river. Its wheel turns slowly, and the miller counts the sacks of flour "
    "that the farmers bring each morning. "
)


@pytest.mark.parametrize("question", EASY)
def test_a_real_model_answers_easy_questions(client, question, figure):
    began_at = time.monotonic()
    answer = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=40
    )
    figure(f"{time.monotonic() - began_at:.1f} s: {answer.choices[0].message.content!r}")
    assert EASY[question].lower() in answer.choices[0].message.content.lower()
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.headrace["engine"] == "mlx"


def test_a_stream_joins_to_the_answer_that_comes_whole(client):
    asked = {
        "model": "auto",
        "messages": [{"role": "user", "content": "Tell me a short story about a fox."}],
        "temperature": 0.8,
        "seed": 7,
        "max_tokens": 48,
    }
    whole = client.chat.completions.create(**asked)
    chunks = [chunk for chunk in client.chat.completions.create(**asked, stream=True) if chunk.choices]
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


async def test_eight_at_once_equal_each_alone_or_differ_at_a_near_tie(asker, smollm2, figure):
    prompts = [f"Write one sentence about {word}." for word in WORDS]
    bodies = [chat(prompt, temperature=0, max_tokens=16) for prompt in prompts]
    alone = [text_of(await asker.answer(await asker.ask("llm.request.high.complex", body))) for body in bodies]
    began_at = time.monotonic()
    ids = [await asker.ask("llm.request.high.complex", body) for body in bodies]
    answers = await asker.answers(ids)
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    figure(f"eight at once: {tokens / (time.monotonic() - began_at):.1f} tokens/s")
    together = [text_of(answer) for answer in answers]
    for prompt, one, eight in zip(prompts, alone, together, strict=True):
        if one != eight:
            gap = await asyncio.to_thread(gap_at, smollm2.path, prompt, one, eight)
            figure(f"{prompt!r} differs at character {first_difference(one, eight)}; the gap there is {gap:.6f}")
            assert gap <= NEAR_TIE, (one, eight)


async def test_an_answer_goes_on_after_its_engine_was_killed(real, asker, figure):
    body = chat("Tell me a long story about a mill.", temperature=0.8, seed=7, max_tokens=40, stream=True)
    request_id = await asker.ask("llm.request.high.complex", body)
    await asker.until(lambda: sum(m["object"] == "chat.completion.chunk" for m in asker.messages[request_id]) >= 10)
    said = joined(asker.messages[request_id])
    os.kill(child_of(real.pid("pipeline.cli run mlx"), "consumers.engines.local.child"), signal.SIGKILL)
    answer = await asker.answer(request_id, timeout_s=100)
    text = text_of(answer)
    assert text.startswith(said)
    assert len(text) > len(said)
    assert answer["headrace"]["attempts"] == 2
    assert asker.lasts(request_id) == 1
    again = text_of(await asker.answer(await asker.ask("llm.request.high.complex", body), timeout_s=100))
    figure("the same text to the letter" if text == again else f"differs at character {first_difference(text, again)}")


async def test_an_exact_text_is_the_same_alone_in_a_full_batch_and_over_a_crash(real, asker):
    story = chat("Tell me a story about a mill.", temperature=0.8, seed=7, max_tokens=24, stream=True, exact=True)
    alone = text_of(await asker.answer(await asker.ask("llm.request.high", story), timeout_s=100))
    beside = [
        await asker.ask("llm.request.low.complex", chat(f"Tell me about {word}.", temperature=0.8, max_tokens=24))
        for word in WORDS[:7]
    ]
    request_id = await asker.ask("llm.request.low.complex", story)
    await asker.until(lambda: sum(m["object"] == "chat.completion.chunk" for m in asker.messages[request_id]) >= 6)
    os.kill(child_of(real.pid("pipeline.cli run mlx"), "consumers.engines.local.child"), signal.SIGKILL)
    answer = await asker.answer(request_id, timeout_s=100)
    assert text_of(answer) == alone
    assert answer["headrace"]["attempts"] == 2
    await asker.answers(beside)


def test_several_turns_and_a_system_prompt_reach_the_model(client):
    turns = [
        {"role": "user", "content": "My name is Marigold and my dog is called Biscuit."},
        {"role": "assistant", "content": "Nice to meet you, Marigold! Biscuit is a lovely name for a dog."},
        {"role": "user", "content": "What is the name of my dog?"},
    ]
    asked = {"model": "auto", "temperature": 0, "max_tokens": 40}
    plain = client.chat.completions.create(messages=turns, **asked)
    assert "Biscuit" in plain.choices[0].message.content
    system = {"role": "system", "content": "You are a patient teacher who explains things in simple words."}
    taught = client.chat.completions.create(messages=[system, *turns], **asked)
    assert taught.usage.prompt_tokens != plain.usage.prompt_tokens
    assert taught.choices[0].message.content


@pytest.mark.parametrize("text", ["Привет! Расскажи о реке.", "Repeat after me: naïve café 🌍 日本語"])
def test_no_character_is_torn_in_a_stream(client, text):
    asked = {"model": "auto", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60}
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
    ]
    assert "".join(parts).strip()
    assert not any("\ufffd" in part for part in parts[:-1])


def test_an_answer_ends_before_a_stop_string_that_spans_tokens(client):
    asked = {
        "model": "auto",
        "messages": [{"role": "user", "content": "Write two sentences about the sea."}],
        "temperature": 0,
        "max_tokens": 40,
    }
    text = client.chat.completions.create(**asked).choices[0].message.content
    # From within a word, over a space, into the next word.
    space = text.index(" ", 12)
    stop = text[space - 3 : space + 3]
    stopped = client.chat.completions.create(**asked, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(stop)]


def test_a_prompt_of_1500_tokens_is_read(client, figure):
    prompt = PARAGRAPH * 45 + "\nWhat stands at the bend of the river?"
    began_at = time.monotonic()
    answer = client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=24
    )
    figure(f"{answer.usage.prompt_tokens} tokens of prompt, answered after {time.monotonic() - began_at:.1f} s")
    assert answer.usage.prompt_tokens >= 1500
    assert "mill" in answer.choices[0].message.content.lower()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_prompt_that_fills_the_context_is_read(client, figure):
    prompt = PARAGRAPH * 235 + "\nWhat stands at the bend of the river?"
    began_at = time.monotonic()
    answer = client.with_options(timeout=800).chat.completions.create(
        model="auto", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=16
    )
    figure(f"{answer.usage.prompt_tokens} tokens of prompt, answered after {time.monotonic() - began_at:.1f} s")
    assert answer.usage.prompt_tokens >= 7500
    assert answer.choices[0].message.content


async def test_a_request_that_is_cancelled_while_its_prompt_is_read_frees_the_engine(asker):
    asked = chat(PARAGRAPH * 45 + "\nWhat stands at the bend of the river?", max_tokens=100)
    request_id = await asker.ask("llm.request.high.complex", asked)
    await eventually(lambda: request_id in asker.started, what="the request has started")
    assert (await asker.request(f"llm.cancel.{request_id}"))["state"] == "cancelled"
    answer = await asker.answer(request_id)
    assert answer["error"]["code"] == "cancelled"
    next_id = await asker.ask("llm.request.high.complex", chat("Hello!", temperature=0, max_tokens=8))
    assert text_of(await asker.answer(next_id))
    assert asker.lasts(request_id) == 1
