"""OpenAI's dialect against recorded shapes: what its API answers, field by field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types import Completion as TextCompletion
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pipeline.gateway.dialects import openai
from pipeline.gateway.dialects.shapes import as_chunk
from pipeline.wire.answers import ErrorBody
from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import ErrorCode, HeadraceError
from tests.pipeline.gateway.answers import (
    CALL_PARTS,
    CHUNKS,
    COMPLETION,
    EMBEDDINGS,
    SCORED_CHOICE,
    SCORED_CHUNK,
    THOUGHTFUL,
    THOUGHTFUL_CHUNKS,
    TOOL_CHUNK,
    TOOL_COMPLETION,
)

LIMIT = 1 << 20
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hello"}], **fields}).encode()


def events(data: bytes) -> list[Any]:
    lines = [block.removeprefix("data: ") for block in data.decode().split("\n\n") if block]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_chat_goes_on_as_it_came():
    given = body(user="me", metadata={"a": "b"})
    asked = openai.read_chat(given, LIMIT)
    assert asked.body == given
    assert not asked.stream
    assert openai.read_chat(b" \n" + given, LIMIT).body == given


def test_a_completion_has_openais_shape():
    data = openai.OpenAIChat().whole(COMPLETION)
    read = ChatCompletion.model_validate_json(data, strict=True)
    assert read.choices[0].message.content == "Hello there"
    assert json.loads(data) == {
        "id": "req-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "headrace-demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there", "tool_calls": None},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "headrace": json.loads(msgspec.json.encode(COMPLETION.headrace)),
    }


def test_a_stream_has_openais_shape_and_nothing_of_the_records():
    shape = openai.read_chat(body(stream=True), LIMIT).shape
    data = b"".join(shape.part(chunk) for chunk in CHUNKS) + shape.end(COMPLETION)
    *parts, done = events(data)
    assert done == "[DONE]"
    assert parts == [
        {
            "id": "req-1",
            "object": "chat.completion.chunk",
            "created": 1700000000,
            "model": "headrace-demo",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}],
        }
        for delta, finish in [({"role": "assistant", "content": "Hello"}, None), ({"content": " there"}, "stop")]
    ]
    for part in parts:
        ChatCompletionChunk.model_validate_json(json.dumps(part), strict=True)


def test_a_stream_that_includes_usage_says_null_until_it_does():
    shape = openai.read_chat(body(stream=True, stream_options={"include_usage": True}), LIMIT).shape
    *parts, last, done = events(b"".join(shape.part(chunk) for chunk in CHUNKS) + shape.end(COMPLETION))
    assert done == "[DONE]"
    assert [part["usage"] for part in parts] == [None, None]
    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert last["headrace"]["engine"] == "mlx"


def test_tool_calls_come_in_openais_shape():
    read = ChatCompletion.model_validate_json(openai.OpenAIChat().whole(TOOL_COMPLETION), strict=True)
    assert read.choices[0].finish_reason == "tool_calls"
    assert read.choices[0].message.tool_calls[0].function.name == "get_weather"
    [part] = events(openai.OpenAIChat().part(TOOL_CHUNK))
    chunk = ChatCompletionChunk.model_validate_json(json.dumps(part), strict=True)
    assert chunk.choices[0].delta.tool_calls[0].function.arguments == '{"city":"Paris"}'


def test_the_parts_of_a_call_come_in_openais_shape():
    shape = openai.OpenAIChat()
    parts = [event for chunk in CALL_PARTS for event in events(shape.part(chunk))]
    calls = [part["choices"][0]["delta"]["tool_calls"] for part in parts]
    begun = {"index": 0, "id": "call_1", "function": {"name": "get_weather", "arguments": ""}, "type": "function"}
    other = {"index": 1, "id": "call_2", "function": {"name": "get_weather", "arguments": "["}, "type": "function"}
    assert calls == [
        [begun],
        [{"index": 0, "function": {"arguments": '{"city":'}}],
        [{"index": 0, "function": {"arguments": '"Paris"}'}}, other],
        [{"index": 1, "function": {"arguments": "1]"}}],
    ]
    for part in parts:
        ChatCompletionChunk.model_validate_json(json.dumps(part), strict=True)


def test_a_text_completion_is_a_raw_prompt():
    given = json.dumps({"model": "auto", "prompt": ["Say hello"], "max_tokens": 5, "logprobs": 2, "echo": False})
    asked = openai.read_text(given.encode(), LIMIT)
    assert json.loads(asked.body) == {
        "model": "auto",
        "messages": [{"role": "user", "content": "Say hello"}],
        "max_tokens": 5,
        "logprobs": 2,
        "echo": False,
        "raw": True,
    }
    assert asked.request.alternatives == 2
    read = TextCompletion.model_validate_json(asked.shape.whole(COMPLETION), strict=True)
    assert (read.object, read.choices[0].text, read.usage.total_tokens) == ("text_completion", "Hello there", 5)
    parts = events(b"".join(asked.shape.part(chunk) for chunk in CHUNKS) + asked.shape.end(COMPLETION))
    assert [part["choices"][0]["text"] for part in parts[:-1]] == ["Hello", " there"]


@pytest.mark.parametrize(
    ("given", "reading", "raw"),
    [
        ({}, {}, True),
        ({"raw": None}, {}, True),
        ({"raw": False}, {}, False),
        ({"suffix": "end"}, {}, False),
        ({}, {"raw": False}, False),
        ({"raw": True}, {"raw": False}, True),
    ],
)
def test_a_text_completion_is_raw_unless_it_or_the_setting_says_otherwise(given, reading, raw):
    asked = openai.read_text(json.dumps({"prompt": "x", **given}).encode(), LIMIT, **reading)
    assert asked.request.is_raw == raw


def test_a_text_stream_that_includes_usage_ends_with_it():
    given = json.dumps({"prompt": "x", "stream": True, "stream_options": {"include_usage": True}})
    shape = openai.read_text(given.encode(), LIMIT).shape
    last, done = events(shape.end(COMPLETION))
    assert (last["choices"], last["usage"]["total_tokens"], done) == ([], 5, "[DONE]")


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        (b"", ErrorCode.INVALID_REQUEST, None),
        (b"plain text", ErrorCode.INVALID_REQUEST, None),
        (b"[]", ErrorCode.INVALID_REQUEST, None),
        (b"{", ErrorCode.INVALID_REQUEST, None),
        (b'{"prompt": "x"}', ErrorCode.INVALID_REQUEST, "messages"),
        (body(n=33), ErrorCode.INVALID_REQUEST, "n"),
        (body(temperature=900), ErrorCode.INVALID_REQUEST, "temperature"),
        (body(stream_options={"include_usage": "yes"}), ErrorCode.INVALID_REQUEST, "stream_options"),
    ],
    ids=["empty", "text", "list", "broken", "no-messages", "several", "hot", "bad-option"],
)
def test_what_is_no_chat_is_refused(data: bytes, code: ErrorCode, param: str | None):
    with pytest.raises(HeadraceError) as caught:
        openai.read_chat(data, LIMIT)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("wanted", [0, 33, -1, 1.5, "2", True])
def test_a_number_of_choices_out_of_range_is_refused_with_the_range(wanted: Any):
    with pytest.raises(HeadraceError) as caught:
        openai.read_chat(body(n=wanted), LIMIT)
    assert (caught.value.code, caught.value.param) == (ErrorCode.INVALID_REQUEST, "n")
    assert caught.value.message == f"`n` must be an integer from 1 to 32, not {json.dumps(wanted)}."


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]], []], ids=["tokens", "lists", "none"])
def test_prompts_that_are_not_one_text_are_refused(prompt: Any):
    with pytest.raises(HeadraceError) as caught:
        openai.read_text(json.dumps({"prompt": prompt}).encode(), LIMIT)
    assert caught.value.code is ErrorCode.UNSUPPORTED_PARAMETER


def test_an_error_has_openais_envelope():
    error = ErrorBody.of(HeadraceError(ErrorCode.MODEL_NOT_FOUND, "no such model", param="model"))
    expected = {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert json.loads(openai.OpenAIChat().error(error)) == expected
    assert events(openai.OpenAIChat().error_part(error)) == [expected]


def test_models_are_listed_as_openai_lists_them():
    assert openai.models(["a"]) == {
        "object": "list",
        "data": [{"id": "a", "object": "model", "created": 0, "owned_by": "headrace"}],
    }


# ---- embeddings


@pytest.mark.parametrize("more", [{}, {"user": "me"}, {"prompt": "p"}, {"messages": []}])
def test_texts_to_embed_go_on_and_nothing_besides_makes_them_a_chat(more: dict[str, Any]):
    fields = {"model": "e", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8}
    asked = openai.read_embeddings(json.dumps(fields | more).encode(), LIMIT)
    assert decode_request(asked.body, max_body_bytes=LIMIT) == asked.request
    assert not asked.stream


def test_however_the_input_is_spelled_it_is_read_by_the_worker():
    asked = openai.read_embeddings(rb'{"\u0069nput": "a"}', LIMIT)
    assert decode_request(asked.body, max_body_bytes=LIMIT) == asked.request


def test_embeddings_have_openais_shape():
    data = openai.OpenAIEmbeddings().whole(EMBEDDINGS)
    read = CreateEmbeddingResponse.model_validate_json(data, strict=True)
    assert [item.embedding for item in read.data] == [[0.5, -0.25], [1.0, 0.0]]
    assert json.loads(data) == {
        "id": "req-1",
        "object": "list",
        "created": 1700000000,
        "model": "nomic-embed-text:latest",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.5, -0.25]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
        "headrace": json.loads(msgspec.json.encode(EMBEDDINGS.headrace)),
    }


@pytest.mark.parametrize(
    ("shape", "answer"),
    [(openai.OpenAIEmbeddings(), COMPLETION), (openai.OpenAIChat(), EMBEDDINGS), (openai.OpenAIText(), EMBEDDINGS)],
)
def test_the_answer_to_something_else_that_was_asked_under_the_same_id_is_not_given(shape, answer):
    with pytest.raises(HeadraceError, match="req-1") as refusal:
        shape.whole(answer)
    assert refusal.value.code is ErrorCode.INVALID_REQUEST


def test_half_a_character_and_a_byte_order_mark_spoil_no_body():
    given = b'\xef\xbb\xbf{"prompt": "\\ud83d", "stream": true, "stream_options": {"include_usage": true}}'
    assert openai.read_text(given, LIMIT).request.chat[0].content == "\ufffd"
    given = given.replace(b'"prompt": "\\ud83d"', b'"messages": [{"role": "user", "content": "\\ud83d"}]')
    assert openai.read_chat(given, LIMIT).request.chat[0].content == "\ufffd"


def test_scores_and_thoughts_have_openais_shape():
    completion = msgspec.structs.replace(COMPLETION, choices=[SCORED_CHOICE])
    whole = ChatCompletion.model_validate_json(openai.OpenAIChat().whole(completion), strict=True)
    (score,) = whole.choices[0].logprobs.content
    assert (score.token, score.logprob, score.bytes, score.top_logprobs[0].token) == ("Hi", -0.5, [72, 105], "Ho")
    assert whole.choices[0].message.reasoning_content == "Hm."
    (part,) = events(openai.OpenAIChat().part(SCORED_CHUNK))
    chunk = ChatCompletionChunk.model_validate(part, strict=True)
    assert chunk.choices[0].logprobs.content[0].token == "Hi"
    assert chunk.choices[0].delta.reasoning_content == "Hm."


def test_reasoning_has_both_of_its_names_and_is_counted():
    whole = ChatCompletion.model_validate_json(openai.OpenAIChat().whole(THOUGHTFUL), strict=True)
    message = whole.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("Hm. Two", "Hm. Two", "Four")
    assert whole.usage.completion_tokens_details.reasoning_tokens == 7
    parts = [event for chunk in THOUGHTFUL_CHUNKS for event in events(openai.OpenAIChat().part(chunk))]
    deltas = [ChatCompletionChunk.model_validate(part, strict=True).choices[0].delta for part in parts]
    for name in ("reasoning_content", "reasoning"):
        assert "".join(getattr(delta, name, None) or "" for delta in deltas) == "Hm. Two"
    assert "".join(delta.content or "" for delta in deltas) == "Four"


def test_reasoning_of_an_answer_that_was_sent_whole_is_in_the_one_chunk_of_its_stream():
    delta = as_chunk(THOUGHTFUL).choices[0].delta
    assert (delta.reasoning_content, delta.reasoning, delta.content) == ("Hm. Two", "Hm. Two", "Four")


def test_reasoning_of_several_choices_is_counted_together():
    usage = openai.joined([COMPLETION, THOUGHTFUL, THOUGHTFUL]).usage
    assert usage.completion_tokens_details
    assert usage.completion_tokens_details.reasoning_tokens == 14
    assert not openai.joined([COMPLETION, COMPLETION]).usage.completion_tokens_details


def test_the_scores_of_a_text_completion_are_lists_with_the_place_of_each_token():
    shape = openai.OpenAIText()
    completion = msgspec.structs.replace(COMPLETION, choices=[SCORED_CHOICE])
    logprobs = TextCompletion.model_validate_json(shape.whole(completion), strict=True).choices[0].logprobs
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["Hi"], [-0.5], [0])
    assert logprobs.top_logprobs == [{"Ho": -1.5}]
    shape.part(CHUNKS[0])
    (part,) = events(shape.part(SCORED_CHUNK))
    assert part["choices"][0]["logprobs"]["text_offset"] == [len("Hello")]


def test_each_choice_is_a_request_with_a_seed_of_its_own():
    asked = openai.read_chat(body(n=3.0, seed=5), LIMIT)
    requests = [each.request for each in (asked, *asked.others)]
    assert [request.seed for request in requests] == [5, 6, 7]
    assert [json.loads(each.body).get("seed") for each in (asked, *asked.others)] == [5, 6, 7]
    assert all("n" not in json.loads(each.body) for each in (asked, *asked.others))
    text = openai.read_text(json.dumps({"prompt": ["a", "b"], "n": 2}).encode(), LIMIT)
    assert [each.request.chat[0].text() for each in (text, *text.others)] == ["a", "a", "b", "b"]
    (second,) = events(text.others[1].shape.part(CHUNKS[0]))
    assert second["choices"][0]["index"] == 2


def test_the_answers_of_a_call_are_joined_under_the_first_ones_id():
    one = openai.joined([COMPLETION, msgspec.structs.replace(TOOL_COMPLETION, id="req-1-1")])
    assert (one.id, [choice.index for choice in one.choices]) == (COMPLETION.id, [0, 1])
    assert one.usage.total_tokens == COMPLETION.usage.total_tokens + TOOL_COMPLETION.usage.total_tokens
    assert one.usage.prompt_tokens_details.cached_tokens == 2
