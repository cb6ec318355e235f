"""A thousand malformed and hostile messages among good ones: each gets its error, and nothing falls."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.e2e.conftest import Asker, Pipeline, chat, text_of

GOOD = b'{"prompt": "What is the capital of Spain?", "max_tokens": 20}'
TWO_MB = json.dumps(chat("x" * (2 << 20))).encode()

# (body, headers, the error's code)
HOSTILE: list[tuple[bytes, dict[str, str], str]] = [
    (b'{"messages": [', {}, "invalid_request"),
    (b"{}", {}, "invalid_request"),
    (b'{"messages": []}', {}, "invalid_request"),
    (b'{"messages": "hello"}', {}, "invalid_request"),
    (b'{"messages": [{"role": "wizard", "content": "x"}]}', {}, "invalid_request"),
    (b'{"prompt": "x", "max_tokens": "many"}', {}, "invalid_request"),
    (b'{"prompt": "x", "max_tokens": 5.5}', {}, "invalid_request"),
    (b'{"prompt": "x", "top_k": 99999999999999999999999}', {}, "invalid_request"),
    (b'{"prompt": "x", "temperature": 1e999}', {}, "invalid_request"),
    (b'{"prompt": "x", "temperature": NaN}', {}, "invalid_request"),
    (b'{"prompt": "x", "top_p": 7}', {}, "invalid_request"),
    (b'{"prompt": "x", "seed": 1e40}', {}, "invalid_request"),
    (b'{"prompt": "x", "stop": [1, 2]}', {}, "invalid_request"),
    (b'{"prompt": "x", "top_k": 900000000}', {}, "invalid_request"),
    (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b', "prompt": "x"}', {}, "invalid_request"),
    (b'{"prompt": "\xff\xfe"}', {}, "invalid_request"),
    (b"\xff\xfe\xfd", {}, "invalid_request"),
    (b"", {}, "invalid_request"),
    (b"   \n", {}, "invalid_request"),
    (TWO_MB, {}, "request_too_large"),
    (b'{"prompt": "' + b"long " * 100_000 + b'"}', {}, "context_length_exceeded"),
    (b'{"prompt": "x", "n": 3}', {}, "unsupported_parameter"),
    (b'{"prompt": "x", "logit_bias": {"999999": 100}}', {}, "invalid_request"),
    (b'{"prompt": "x", "guided_regex": "("}', {}, "invalid_request"),
    (b'{"prompt": "x", "guided_json": {"$ref": "#/a"}}', {}, "invalid_request"),
    (b'{"prompt": "x", "guided_json": {"type": "array", "uniqueItems": true}}', {}, "invalid_request"),
    (b'{"prompt": "x", "structured_outputs": {"grammar": "start: ("}}', {}, "invalid_request"),
    (b'{"prompt": "x", "structured_outputs": {"structural_tag": {}}}', {}, "unsupported_parameter"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', {}, "unsupported_parameter"),
    (b'{"prompt": "x", "model": "gpt-17"}', {}, "model_not_found"),
    (b'{"prompt": "x", "model": "../../etc/passwd"}', {}, "model_not_found"),
    (b'{"prompt": "x", "model": "tinyllama"}', {}, "model_internal"),
    (b'{"prompt": "x", "model": "TinyLlama:1.1b-chat"}', {}, "model_internal"),
    (GOOD, {"Reply-To": "llm.request.high"}, "reply_subject_denied"),
    (GOOD, {"Reply-To": "$JS.API.STREAM.DELETE.LLM"}, "reply_subject_denied"),
    (GOOD, {"Reply-To": "_INBOX.*"}, "reply_subject_denied"),
    (GOOD, {"Reply-To": "llm.reply.>"}, "reply_subject_denied"),
    (GOOD, {"Reply-To": "llm.out.someone"}, "reply_subject_denied"),
    (GOOD, {"Reply-To": "_INBOX.a b"}, "reply_subject_denied"),
    (GOOD, {"Llm-Timeout": "soon"}, "invalid_request"),
    (GOOD, {"Llm-Timeout": "-1"}, "invalid_request"),
    (GOOD, {"Llm-Timeout": "nan"}, "invalid_request"),
    (GOOD, {"Llm-Task": "impossible"}, "invalid_request"),
]
EVIL_IDS = ["a.b", "*", ">", "x y", "ид", "../..", "a" * 129, "id:complex:x", "$SYS"]


async def test_each_of_a_thousand_bad_messages_gets_its_code_and_every_good_one_its_answer(
    embedded: Pipeline, asker: Asker
):
    rng = random.Random(4)
    screen = embedded.screen
    expected: dict[str, str] = {}
    good: list[str] = []
    # The few heavy ones come a few times, the others as often as it takes.
    light = [case for case in HOSTILE if len(case[0]) < 200_000]
    heavy = [case for case in HOSTILE if len(case[0]) >= 200_000]
    cases = [rng.choice(light) for _ in range(985)] + heavy * 3
    rng.shuffle(cases)
    for number, (body, headers, code) in enumerate(cases):
        subject = f"llm.request.{rng.choice(('high', 'medium', 'low'))}"
        request_id = await _ask(asker, subject, body, headers)
        expected[request_id] = code
        if number % 10 == 0:
            good.append(await asker.ask(subject, GOOD))
    for evil in EVIL_IDS:
        expected[await _ask(asker, "llm.request.high", GOOD, {"Nats-Msg-Id": evil})] = "invalid_request"
    assert len(expected) >= 1000

    await asker.answers([*expected, *good], timeout_s=110)
    wrong = {i: (code, asker.last(i)) for i, code in expected.items() if _code(asker.last(i)) != code}
    assert not wrong
    assert all("Madrid" in text_of(asker.last(i)) for i in good)
    assert all(asker.lasts(i) == 1 for i in [*expected, *good])
    assert embedded.screen == screen, "no process ended and none was started again"


async def _ask(asker: Asker, subject: str, body: bytes, headers: dict[str, str]) -> str:
    """Publish what the client's own checks may not let through; returns the id that the answer has."""
    ack = await asker.js.publish(subject, body, headers=headers or None, timeout=20)
    return f"LLM-{ack.seq}"


def _code(last: dict[str, Any]) -> str:
    return last["error"]["code"] if last["object"] == "error" else "answered"


async def test_nothing_lists_or_answers_with_an_internal_model(asker: Asker):
    assert "tinyllama" not in json.dumps(await asker.request("llm.models")).lower()
    assert "tinyllama" not in json.dumps(await asker.request("llm.queue.stats")).lower()
    for name in (
        "tinyllama",
        "tinyllama:latest",
        "TinyLlama",
        "library/tinyllama",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ):
        for subject in ("llm.request.high", "llm.request.low.simple", "llm.request.medium.complex"):
            answer = await asker.answer(await asker.ask(subject, chat("Hello", model=name, stream=True)))
            assert answer["error"]["code"] == "model_internal"
