"""Requests as they come in, however malformed."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.wire.answers import ErrorBody, FunctionCall, ToolCall
from pipeline.wire.decoding import MAX_NESTING, decode_chat, decode_embedding, decode_request
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.requests import MAX_INPUTS, MAX_STOPS, MAX_TOOLS, ChatRequest, EmbeddingRequest, FunctionSpec, Tool

INVALID, UNSUPPORTED = ErrorCode.INVALID_REQUEST, ErrorCode.UNSUPPORTED_PARAMETER
MAX_BYTES = 1 << 20
ASKED = [{"role": "user", "content": "Why?"}]
OPTIONAL = [info.name for info in msgspec.structs.fields(ChatRequest) if info.name not in ("messages", "prompt")]


def decode(body):
    return decode_request(body, max_body_bytes=MAX_BYTES)


def ask(**fields):
    return decode(json.dumps({"prompt": "Why?", **fields}).encode())


def refused(body):
    """The code and the field at fault. The answer that says so is small, whatever was sent."""
    with pytest.raises(HeadraceError) as caught:
        decode(body)
    assert len(encode(ErrorBody.of(caught.value))) < 4000
    return caught.value.code, caught.value.param


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


# ---- requests that are read


def test_a_tool_has_its_members_in_the_order_that_models_know():
    assert msgspec.json.encode(Tool(function=FunctionSpec("f"))).startswith(
        b'{"type":"function","function":{"name":"f"'
    )


def test_a_body_that_is_no_object_is_the_prompt_itself():
    request = decode("Почему небо синее?\n".encode())
    assert request.prompt == "Почему небо синее?\n"
    assert [(m.role, m.text()) for m in request.chat] == [("user", "Почему небо синее?\n")]


@pytest.mark.parametrize("body", [b"[1, 2]", b'"text"', b"null", b' {"prompt": "a"}', b"\x00"])
def test_only_a_brace_in_front_makes_json_of_a_body(body):
    assert decode(body).prompt == body.decode()


def test_a_conversation_is_read_as_openai_writes_it():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "developer", "content": "x", "name": "me"},
    ]
    request = decode(json.dumps({"messages": messages, "stream_options": {"include_usage": True}}).encode())
    assert [m.text() for m in request.chat] == ["Be brief.", "ab", "", "42", "x"]
    assert request.chat[2].tool_calls == [ToolCall(FunctionCall("f"), "c1")]


def test_a_field_nobody_knows_is_ignored_whatever_it_holds():
    for value in (b"1", b"null", b'"x"', b'[{"a": [1e5]}]', b"1" * 5000, nested(200)):
        assert decode(b'{"prompt": "a", "x_unknown": ' + value + b"}") == ChatRequest(prompt="a")


def test_null_is_the_same_as_absent_in_every_optional_field():
    assert ask(**dict.fromkeys(OPTIONAL)) == ask()
    for name in OPTIONAL:
        assert ask(**{name: None}) == ask()


def test_of_a_field_given_twice_the_later_counts():
    assert decode(b'{"prompt": "a", "prompt": "b"}').prompt == "b"
    assert decode(b'{"messages": [], "messages": null, "prompt": "b"}'.replace(b"[]", b"null")).prompt == "b"


def test_limits_are_where_the_words_say():
    assert ask(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert ask(max_tokens=5).token_limit == 5
    assert ask().token_limit is None


def test_stops_are_a_list_however_they_were_given():
    assert (ask().stops, ask(stop="a").stops, ask(stop=["a", "b"]).stops, ask(stop=[]).stops) == (
        [],
        ["a"],
        ["a", "b"],
        [],
    )


def test_a_body_without_a_conversation_is_told_what_is_missing():
    """Over HTTP a chat has no `prompt`, so the error does not suggest one."""
    for body in (b"{}", b'{"messages": null, "model": "m"}'):
        with pytest.raises(HeadraceError, match=r"^`messages` is required\.$"):
            decode(body)
    with pytest.raises(HeadraceError, match="not both"):
        decode(b'{"messages": [{"role": "user", "content": "a"}], "prompt": "a"}')


@pytest.mark.parametrize(("model", "wanted"), [(None, None), ("", None), ("auto", None), ("m", "m"), ("Auto", "Auto")])
def test_no_model_an_empty_one_and_auto_mean_any(model, wanted):
    assert ask(model=model).wanted_model == wanted


def test_streaming_is_off_unless_asked_for():
    assert (ask().streams, ask(stream=False).streams, ask(stream=None).streams, ask(stream=True).streams) == (
        False,
        False,
        False,
        True,
    )


# ---- requests that are refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b" \n\t ", None),
        (b"\xff\xfe", None),
        (b"{", None),
        (b"{}", "messages"),
        (b"{hello}", None),
        (b'{"prompt": "a"} trailing', None),
        (b'{"prompt": "a"', None),
        (b"{'prompt': 'a'}", None),
        (b'{"prompt": "\xff"}', None),
        (b'{"prompt": "a\nb"}', None),
        (b'{"prompt": "a", "temperature": NaN}', None),
        (b'{"prompt": "a", "temperature": Infinity}', None),
        (b'{"prompt": "a", "x_unknown": ' + b"[" * 100_000, None),
        (b'{"prompt": "a", "x_unknown": ' + nested(50_000) + b"}", None),
        (b'{"a": ' * 100_000, None),
        (b'{"prompt": ""}', "prompt"),
        (b'{"prompt": ["a"]}', "prompt"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": {}}', "messages"),
        (b'{"messages": null}', "messages"),
        (b'{"messages": [null]}', "messages"),
        (b'{"messages": [{"content": "a"}]}', "messages"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', "messages"),
        (b'{"messages": [{"role": "`$.model`", "content": "a"}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": "a"}], "prompt": "a"}', "messages"),
        (b'{"messages": [{"role": "' + b"\\u0001" * 100_000 + b'"}]}', "messages"),
        (b'{"prompt": "a", "tool_choice": "' + b"x" * 900_000 + b'"}', "tool_choice"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_a_malformed_body_is_an_invalid_request(body, param):
    assert refused(body) == (INVALID, param)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", [5, ["m"], "m" * 257]),
        ("max_tokens", [1.5, "5", True, []]),
        ("max_completion_tokens", [0.5, {}]),
        ("temperature", [-0.1, 100.1, "1", True, [], 10**400]),
        ("top_p", [1.1, -1, "0"]),
        ("top_k", [1.5, 10**7, "-1"]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [-1, 11]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("stop", [5, [5], ["a"] * (MAX_STOPS + 1), "a" * 257, {}]),
        ("seed", [1.5, "1", 2**63, -(2**63) - 1, 10**4999]),
        ("stream", ["yes", 1]),
        (
            "tools",
            [
                {},
                [5],
                [{}],
                [{"function": {}}],
                [{"function": {"name": ""}}],
                [{"type": "code", "function": {"name": "f"}}],
                [{"function": {"name": "f", "parameters": []}}],
                [{"function": {"name": "f"}}] * (MAX_TOOLS + 1),
            ],
        ),
        ("tool_choice", ["maybe", 5, {"function": {}}]),
        ("response_format", ["json", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "x": 1}]),
        ("n", ["1", 1.5, True, 10**4999]),
        ("logprobs", ["yes"]),
        ("logit_bias", [[], {"a": "b"}, {"a": 10**400}]),
        ("functions", [5]),
        ("modalities", ["text", [5]]),
        ("parallel_tool_calls", ["no"]),
        ("function_call", [10**4999]),
    ],
)
def test_a_field_of_the_wrong_kind_or_size_is_named(field, values):
    for value in values:
        # Written by hand, since Python refuses to write numbers of so many digits.
        text = "1" + "0" * 4999 if value == 10**4999 and not isinstance(value, float) else json.dumps(value)
        assert refused(f'{{"prompt": "a", "{field}": {text}}}'.encode()) == (INVALID, field), value


@pytest.mark.parametrize(
    ("field", "values", "neutral"),
    [
        ("n", [2, 0, -1], [1]),
        ("best_of", [2], [1]),
        ("functions", [[{"name": "f"}]], [[]]),
        ("function_call", [{"name": "f"}, "f"], ["none", "auto"]),
        ("modalities", [["audio"], ["text", "audio"], []], [["text"]]),
        ("audio", [{"voice": "alloy"}], []),
        ("echo", [True], [False]),
        ("web_search_options", [{}, {"search_context_size": "low"}], []),
    ],
)
def test_what_would_change_the_answer_and_cannot_be_had_is_refused_and_never_dropped(field, values, neutral):
    for value in values:
        assert refused(json.dumps({"prompt": "a", field: value}).encode()) == (UNSUPPORTED, field), value
    for value in neutral:
        ask(**{field: value})


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "", "x" * 1000])
def test_content_that_is_not_text_is_not_supported(kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "x"}}]
    body = json.dumps({"messages": [*ASKED, {"role": "user", "content": parts}]}).encode()
    assert refused(body) == (UNSUPPORTED, "messages")


def test_a_body_above_the_bound_is_too_large_and_one_at_the_bound_is_not():
    body = b'{"prompt": "' + b"a" * 100 + b'"}'
    with pytest.raises(HeadraceError) as caught:
        decode_request(body, max_body_bytes=len(body) - 1)
    assert caught.value.code is ErrorCode.REQUEST_TOO_LARGE
    assert str(len(body)) in caught.value.message
    assert decode_request(body, max_body_bytes=len(body)).prompt == "a" * 100


@pytest.mark.parametrize("depth", [MAX_NESTING, 400])
def test_a_schema_that_would_exhaust_the_stack_of_whoever_passes_it_on_is_refused(depth):
    tools = b'{"prompt": "a", "tools": [{"function": {"name": "f", "parameters": {"p": ' + nested(depth) + b"}}}]}"
    assert refused(tools) == (INVALID, "tools")
    form = b'{"type": "json_schema", "json_schema": {"schema": {"p": ' + nested(depth) + b"}}}"
    assert refused(b'{"prompt": "a", "response_format": ' + form + b"}") == (INVALID, "response_format")


def test_a_schema_as_deep_as_people_write_them_is_read():
    body = b'{"prompt": "a", "tools": [{"function": {"name": "f", "parameters": ' + nested(MAX_NESTING - 1) + b"}}]}"
    request = decode(body)
    # Notes are on the body as it was written.
    assert msgspec.structs.replace(decode(encode(request)), notes=request.notes) == request


# ---- whatever anybody sends


def outcome(body):
    """Decoding ends in a request that can be passed on, or in a small error of the contract, and in nothing else."""
    error = None
    try:
        request = decode(body)
    except HeadraceError as refusal:
        error = refusal
    if error is not None:
        assert error.code in (INVALID, UNSUPPORTED)
        assert error.param is None or error.param in {*OPTIONAL, "messages", "prompt"}
        assert len(encode(ErrorBody.of(error))) < 4000
        return
    assert all(isinstance(message.text(), str) for message in request.chat)
    assert decode(encode(request)) == request


numbers = st.one_of(
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "parameters", "json_schema", "id"])
            | st.text(max_size=5),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "king"])},
        optional={"content": values, "tool_calls": values, "name": values, "tool_call_id": values},
    ),
    max_size=3,
)
bodies = st.fixed_dictionaries(
    {},
    optional={"messages": messages | values, "prompt": st.text(max_size=20) | values} | dict.fromkeys(OPTIONAL, values),
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_end_in_a_request_or_an_error_of_the_contract(data, braced):
    outcome(b"{" + data if braced else data)


@settings(max_examples=120, deadline=None)
@given(bodies)
def test_any_json_ends_in_a_request_or_an_error_of_the_contract(body):
    outcome(json.dumps(body).encode())


GOOD = json.dumps(
    {
        "messages": [*ASKED, {"role": "user", "content": [{"type": "text", "text": "ы\ud83d\ude42"}]}],
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["a"],
        "stream": True,
        "seed": 1,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "logit_bias": {},
    }
).encode()


def test_the_body_that_is_mutated_below_is_good():
    assert decode(GOOD).max_tokens == 5


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_body_with_bytes_changed_ends_in_a_request_or_an_error_of_the_contract(data):
    body = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        length = data.draw(st.integers(0, 5))
        put = data.draw(
            st.sampled_from([b"", b"null", b'"', b"{", b"[" * 50, b"9" * 30, b"\\ud800", b"\xff", b"-", b"e9"])
        )
        body[at : at + length] = put
        body = body or bytearray(b"{")
    outcome(bytes(body))


# ---- requests for embeddings


@pytest.mark.parametrize(("given", "texts"), [('"one"', ["one"]), ('["one", "two"]', ["one", "two"])])
def test_a_body_with_an_input_asks_for_embeddings(given, texts):
    request = decode(b'{"input": %s, "model": "auto", "user": "me"}' % given.encode())
    assert isinstance(request, EmbeddingRequest)
    assert (request.texts, request.wanted_model) == (texts, None)


@pytest.mark.parametrize(
    "body", [b'{"input": "x", "prompt": "y"}', b'{"messages": [{"role":"user","content":"\\"input\\""}]}']
)
def test_a_body_with_a_prompt_or_messages_asks_for_an_answer(body):
    assert isinstance(decode(body), ChatRequest)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"input": []}', "input"),
        (b'{"input": null}', "input"),
        (b'{"input": "x", "dimensions": 0}', "dimensions"),
        (b'{"input": "x", "encoding_format": "hex"}', "encoding_format"),
        (b'{"input": "x", "model": 3}', "model"),
    ],
)
def test_what_cannot_be_embedded_is_named(body, param):
    with pytest.raises(HeadraceError) as refusal:
        decode(body)
    assert (refusal.value.code, refusal.value.param) == (ErrorCode.INVALID_REQUEST, param)


@pytest.mark.parametrize("body", [b'{"input": [1, 2, 3]}', b'{"input": [[1, 2], [3]]}'])
def test_tokens_are_refused_for_what_they_are(body):
    with pytest.raises(HeadraceError, match="must be text") as refusal:
        decode(body)
    assert (refusal.value.code, refusal.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "input")


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [('"echo": true', "`false`"), ('"modalities": []', '`["text"]`')],
)
def test_a_refusal_names_what_is_accepted_as_json_has_it(fields, allowed):
    with pytest.raises(HeadraceError) as refusal:
        decode(f'{{"prompt": "x", {fields}}}'.encode())
    assert refusal.value.message.endswith(f"or set it to {allowed}.")


def test_there_are_no_more_texts_in_a_request_than_at_openai():
    texts = ["x"] * MAX_INPUTS
    assert len(decode_embedding(msgspec.json.encode({"input": texts}), max_body_bytes=MAX_BYTES).texts) == MAX_INPUTS
    with pytest.raises(HeadraceError, match="input"):
        decode_embedding(msgspec.json.encode({"input": [*texts, "x"]}), max_body_bytes=MAX_BYTES)


def test_either_kind_can_be_insisted_on():
    with pytest.raises(HeadraceError, match="messages"):
        decode_chat(b'{"input": "x"}', max_body_bytes=MAX_BYTES)
    with pytest.raises(HeadraceError, match="input"):
        decode_embedding(b'{"prompt": "x"}', max_body_bytes=MAX_BYTES)
    with pytest.raises(HeadraceError) as refusal:
        decode_embedding(b'{"input": "xxxxxxxx"}', max_body_bytes=10)
    assert refusal.value.code is ErrorCode.REQUEST_TOO_LARGE


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"prompt": "x", "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
@pytest.mark.parametrize("raw", [{"raw": True}, {"ollama": {"raw": True}}])
def test_only_one_prompt_can_be_raw(fields, raw):
    with pytest.raises(HeadraceError) as refused:
        decode_chat(json.dumps(fields | raw).encode(), max_body_bytes=1 << 20)
    assert (refused.value.code, refused.value.param) == (ErrorCode.INVALID_REQUEST, "raw")
    assert not decode_chat(json.dumps(fields).encode(), max_body_bytes=1 << 20).is_raw
