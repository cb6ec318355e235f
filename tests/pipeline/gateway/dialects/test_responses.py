"""OpenAI's Responses API against recorded shapes: what is asked as a chat, and what its API answers, field by field."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pipeline.gateway.dialects.response_items import answer_turn
from pipeline.gateway.dialects.responses import Continued, ResponseShape, read_response
from pipeline.gateway.dialects.shapes import Asked
from pipeline.wire.answers import Chunk, Completion, Delta, ErrorBody, ToolCallDelta
from pipeline.wire.errors import ErrorCode, HeadraceError
from tests.pipeline.gateway.answers import (
    CALL,
    CALL_PARTS,
    CHUNKS,
    COMPLETION,
    CUT_IN_THOUGHT,
    CUT_OFF,
    EMBEDDINGS,
    LAST_CHUNK,
    PARTS_COMPLETION,
    SCORED_CHOICE,
    SCORED_CHUNK,
    THOUGHTFUL,
    THOUGHTFUL_CHUNKS,
    TOOL_CHUNK,
    TOOL_COMPLETION,
)

LIMIT = 1 << 20
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "get_weather", "description": "now", "parameters": {"type": "object"}}
USER = {"role": "user", "content": "hello"}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "input": "hello", **fields}).encode()


def asked(**fields: Any) -> Asked:
    read = read_response(body(**fields), LIMIT)
    assert isinstance(read, Asked)
    return read


def chat(**fields: Any) -> dict[str, Any]:
    """The chat that is published for a call."""
    return json.loads(asked(**fields).body)


def refused(**fields: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        read_response(body(**fields), LIMIT)
    return caught.value


def shape(**fields: Any) -> ResponseShape:
    made = asked(**fields).shape
    assert isinstance(made, ResponseShape)
    made.request_id = "req-1"
    return made


def whole(completion: Completion, **fields: Any) -> Response:
    return Response.model_validate_json(shape(**fields).whole(completion), strict=True)


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each of a documented type and with its name, numbered from 0."""
    found = []
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, text = block.partition("\ndata: ")
        event = json.loads(text)
        assert name == f"event: {event['type']}"
        # OpenAI lists its own codes; those of the pipeline are others.
        EVENT.validate_json(text.replace("engine_failed", "server_error"))
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in found]


# ---- what is asked


def test_a_text_is_the_users_turn_and_the_instructions_come_first():
    assert chat(instructions="Be brief.", temperature=0, seed=3) == {
        "model": "auto",
        "temperature": 0,
        "seed": 3,
        "messages": [{"role": "system", "content": "Be brief."}, USER],
    }


def test_items_become_turns_with_the_calls_of_one_answer_together():
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Paris"}, {"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "c1",
            "name": "get_weather",
            "arguments": '{"city":"Paris"}',
        },
        {"type": "function_call", "call_id": "c2", "name": "close", "namespace": "agents", "arguments": None},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "closed"}]},
        {"type": "function_call", "call_id": "c3", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c3", "output": {"sky": "blue"}},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]

    def call(name: str, call_id: str, arguments: str | None) -> dict[str, Any]:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

    calls = [call("get_weather", "c1", '{"city":"Paris"}'), call("agents__close", "c2", None)]
    assert chat(input=items)["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "closed"},
        {"role": "assistant", "content": "", "tool_calls": [call("get_weather", "c3", "{}")]},
        {"role": "tool", "tool_call_id": "c3", "content": '{"sky":"blue"}'},
        {"role": "assistant", "content": "No."},
    ]


def test_parameters_are_carried_under_the_names_of_a_chat():
    published = chat(
        max_output_tokens=5,
        tools=[{**WEATHER, "strict": True}, {"type": "function", "name": "bare", "parameters": None}],
        tool_choice="auto",
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        top_p=0.5,
        stream=True,
        # Without an effect here.
        metadata={"a": "b"},
        include=["reasoning.encrypted_content"],
        truncation="auto",
        service_tier="flex",
        user="me",
        stream_options={"include_obfuscation": False},
    )
    assert published == {
        "model": "auto",
        "messages": [USER],
        "max_completion_tokens": 5,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "now",
                    "parameters": {"type": "object"},
                    "strict": True,
                },
            },
            {"type": "function", "function": {"name": "bare"}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "top_p": 0.5,
        "stream": True,
    }
    assert chat(text={"format": {"type": "text"}, "verbosity": "medium"})["verbosity"] == "medium"


def test_a_choice_of_allowed_tools_leaves_only_these():
    other = {"type": "function", "name": "other"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    published = chat(tools=[WEATHER, other], tool_choice=choice)
    assert [tool["function"]["name"] for tool in published["tools"]] == ["other"]
    assert published["tool_choice"] == "auto"


def test_a_hosted_tool_is_refused_alone_and_left_out_with_a_note_beside_functions():
    error = refused(tools=[{"type": "web_search", "external_web_access": False}])
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "tools")
    assert error.message == 'Tool "web_search" is not supported. Send function tools only.'
    tools = [WEATHER, {"type": "web_search"}]
    assert [tool["function"]["name"] for tool in chat(tools=tools)["tools"]] == ["get_weather"]
    answer = json.loads(shape(tools=tools).whole(COMPLETION))
    assert answer["headrace"]["notes"] == ['Tool "web_search" is left out: only function tools are supported.']
    assert '"custom"' in refused(tools=[WEATHER, {"type": "custom", "name": "patch"}]).message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "`input` is required"),
        ({"input": []}, "input", "`input` is required"),
        ({"input": 5}, "input", "`input` must be"),
        ({"input": [{"type": "function_call", "arguments": "{}"}]}, "input", "`input[0].name` is required"),
        ({"input": [USER, {"role": "robot", "content": "x"}]}, "input", "`input[1].role` must be"),
        ({"input": [{"text": "x"}]}, "input", "`input[0]` must have a `type`"),
        ({"max_output_tokens": "many"}, "max_output_tokens", "`max_output_tokens` must be an integer"),
        ({"temperature": "hot"}, "temperature", "`temperature` must be"),
        ({"tools": [{"type": "function"}]}, "tools", "Each function tool must have a `name`."),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "`text.format.schema` is required"),
        ({"tool_choice": "sometimes"}, "tool_choice", "`tool_choice` must be"),
    ],
)
def test_what_is_not_valid_is_refused_under_the_names_of_this_api(fields: dict[str, Any], param: str, words: str):
    error = refused(**fields)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert words in error.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": [{"type": "web_search_call"}]}, "input", '"web_search_call"'),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input", "fetched"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input", '"input_file"'),
        ({"background": True}, "background", "respond-async"),
        ({"conversation": "conv_1"}, "conversation", "`input`"),
        ({"prompt": {"id": "p"}}, "prompt", "`input`"),
        ({"response_format": {"type": "text"}}, "response_format", "`text.format`"),
        ({"max_tokens": 5}, "max_tokens", "`max_output_tokens`"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", '"file_search"'),
        ({"n": 2}, "n", "`n`"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_its_name(fields: dict[str, Any], param: str, words: str):
    error = refused(**fields)
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, param)
    assert words in error.message


def test_what_needs_no_server_with_a_memory_is_taken():
    assert chat(background=False, conversation=None, prompt=None, store=True, top_logprobs=0)["messages"] == [USER]


def test_halved_characters_are_replaced():
    assert chat(input="\ud83d")["messages"][0]["content"] == "\ufffd"


# ---- a conversation that goes on


def test_a_conversation_goes_on_after_the_earlier_answer():
    first = asked(instructions="Be brief.", tools=[WEATHER])
    assert json.loads(first.conversation) == [USER]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    call = read_response(body(previous_response_id="req-1", input=[output], instructions="Be long."), LIMIT)
    assert isinstance(call, Continued)
    assert call.previous == "req-1"
    second = call.after([*json.loads(first.conversation), answer_turn(TOOL_COMPLETION)], {})
    made = [{"id": "call_1", "type": "function", "function": msgspec.to_builtins(CALL)}]
    conversation = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": made},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert json.loads(second.body)["messages"] == [{"role": "system", "content": "Be long."}, *conversation]
    assert json.loads(second.conversation) == conversation
    assert json.loads(second.shape.whole(COMPLETION))["previous_response_id"] == "req-1"
    assert answer_turn(COMPLETION) == {"role": "assistant", "content": "Hello there"}


def test_a_reference_stands_for_an_item_of_an_earlier_answer():
    names = ["msg_req-1_0", "msg_req-1_1", "fc_req-2_0"]
    items = [USER, *({"type": "item_reference", "id": name} for name in names)]
    call = read_response(body(input=items), LIMIT)
    assert isinstance(call, Continued)
    assert (call.previous, call.referred) == ("", ["req-1", "req-2"])
    made = json.loads(call.after([], {"req-1": COMPLETION, "req-2": TOOL_COMPLETION}).body)["messages"]
    calls = [{"id": "call_1", "type": "function", "function": msgspec.to_builtins(CALL)}]
    assert made == [USER, {"role": "assistant", "content": "Hello there", "tool_calls": calls}]
    with pytest.raises(HeadraceError, match='Item "fc_req-2_0" is not kept'):
        call.after([], {"req-1": COMPLETION})


def test_a_reference_to_an_item_of_another_server_is_refused():
    error = refused(input=[{"type": "item_reference", "id": "rs_68af4030baa48193b0b43b4c2a176a1a"}])
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "input")
    assert "Send the item itself" in error.message


def test_references_to_too_many_responses_are_refused():
    items = [{"type": "item_reference", "id": f"msg_r{number}_0"} for number in range(129)]
    assert "The limit is 128" in refused(input=items).message
    assert isinstance(read_response(body(input=items[:128]), LIMIT), Continued)


def test_a_call_that_is_not_to_be_stored_keeps_no_conversation():
    assert asked(store=False).conversation == b""
    assert whole(COMPLETION, store=False).to_dict()["store"] is False


# ---- what is answered


def test_a_number_of_tool_calls_may_be_written_as_a_float():
    assert json.loads(asked(max_tool_calls=3.0).shape.whole(COMPLETION))["max_tool_calls"] == 3


def test_a_response_has_openais_shape_and_repeats_what_was_asked():
    given = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "tools": [{**WEATHER, "strict": False}],
        "text": {"verbosity": "medium"},
        "reasoning": {"effort": "none"},
        "temperature": 0.5,
        "parallel_tool_calls": False,
    }
    read = whole(COMPLETION, **given)
    assert (read.id, read.object, read.status, read.model) == ("req-1", "response", "completed", "headrace-demo")
    assert read.output_text == "Hello there"
    assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (3, 2, 5)
    assert (read.usage.input_tokens_details.cached_tokens, read.usage.output_tokens_details.reasoning_tokens) == (1, 0)
    repeated = read.to_dict()
    assert {name: repeated[name] for name in given if name not in ("text", "reasoning")} == {
        name: value for name, value in given.items() if name not in ("text", "reasoning")
    }
    assert repeated["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert repeated["reasoning"] == {"effort": "none", "summary": None}
    assert repeated["headrace"]["engine"] == "mlx"


def test_an_answer_that_was_cut_off_is_incomplete():
    read = whole(CUT_OFF)
    assert (read.status, read.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert read.output[0].status == "incomplete"


def test_a_call_is_an_item_and_an_empty_answer_is_an_empty_message():
    [call] = whole(TOOL_COMPLETION, tools=[WEATHER]).output
    assert (call.type, call.call_id, call.name, call.arguments) == (
        "function_call",
        "call_1",
        "get_weather",
        '{"city":"Paris"}',
    )
    empty = msgspec.json.decode(msgspec.json.encode(COMPLETION).replace(b"Hello there", b""), type=Completion)
    assert whole(empty).output_text == ""
    assert len(whole(empty).output) == 1


def test_a_function_of_a_namespace_is_called_by_its_own_name():
    tools = [
        {"type": "namespace", "name": "agents", "description": "d", "tools": [{"type": "function", "name": "end"}]}
    ]
    assert chat(tools=tools)["tools"] == [{"type": "function", "function": {"name": "agents__end"}}]
    data = msgspec.json.encode(TOOL_COMPLETION).replace(b"get_weather", b"agents__end")
    answer = json.loads(shape(tools=tools).whole(msgspec.json.decode(data, type=Completion)))
    assert (answer["output"][0]["namespace"], answer["output"][0]["name"]) == ("agents", "end")


def test_notes_and_errors_name_the_parameters_of_this_api():
    notes = ["`max_completion_tokens` -1 means no limit.", "The context was full: `max_tokens` is 5."]
    account = msgspec.structs.replace(COMPLETION.headrace, notes=notes)
    answer = json.loads(shape().whole(msgspec.structs.replace(COMPLETION, headrace=account)))
    assert answer["headrace"]["notes"] == [
        "`max_output_tokens` -1 means no limit.",
        "The context was full: `max_output_tokens` is 5.",
    ]
    message = 'This engine does not support response_format "json_object".'
    error = HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="response_format")
    assert json.loads(shape().error(ErrorBody.of(error)))["error"] == {
        "message": 'This engine does not support text.format "json_object".',
        "type": "invalid_request_error",
        "param": "text.format",
        "code": "unsupported_parameter",
    }


def test_another_kind_of_answer_under_the_same_id_is_refused():
    with pytest.raises(HeadraceError, match="different request"):
        shape().whole(EMBEDDINGS)


# ---- a stream


def test_a_stream_of_text_has_openais_events():
    writing = shape(stream=True)
    found = events(b"".join(writing.part(chunk) for chunk in CHUNKS) + writing.end(COMPLETION))
    assert kinds(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["delta"] for event in found if "delta" in event] == ["Hello", " there"]
    assert {event["item_id"] for event in found if "item_id" in event} == {"msg_req-1_0"}
    assert (found[0]["response"]["status"], found[0]["response"]["output"]) == ("in_progress", [])
    assert (found[2]["item"]["status"], found[2]["item"]["content"]) == ("in_progress", [])
    last = found[-1]["response"]
    assert last == json.loads(shape(stream=True).whole(COMPLETION))
    assert found[-2]["item"] == last["output"][0]


def test_a_stream_that_is_cut_off_is_incomplete():
    writing = shape(stream=True)
    found = events(b"".join(writing.part(chunk) for chunk in CHUNKS) + writing.end(CUT_OFF))
    assert kinds(found)[-1] == "incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found[-2]["item"]["status"] == "incomplete"


def test_a_stream_of_calls_has_openais_events():
    writing = shape(stream=True, tools=[WEATHER])
    found = events(writing.part(TOOL_CHUNK) + writing.part(LAST_CHUNK) + writing.end(TOOL_COMPLETION))
    assert kinds(found)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added, delta, _, done, last = found[2:]
    assert (added["item"]["arguments"], added["item"]["status"]) == ("", "in_progress")
    assert delta["delta"] == done["item"]["arguments"] == '{"city":"Paris"}'
    assert last["response"]["output"] == [done["item"]]
    assert last["response"]["output"] == json.loads(shape(tools=[WEATHER]).whole(TOOL_COMPLETION))["output"]


def test_the_parts_of_a_call_are_deltas_of_its_item():
    writing = shape(stream=True, tools=[WEATHER])
    found = events(b"".join(writing.part(chunk) for chunk in CALL_PARTS) + writing.end(PARTS_COMPLETION))
    one = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"]
    done = ["function_call_arguments.done", "output_item.done"]
    assert kinds(found)[2:] == [*one, *done, *one, *done, "completed"]
    deltas = [event["delta"] for event in found if event["type"].endswith("arguments.delta")]
    assert deltas == ['{"city":', '"Paris"}', "[", "1]"]
    assert [item["arguments"] for item in found[-1]["response"]["output"]] == ['{"city":"Paris"}', "[1]"]
    assert found[-1]["response"]["output"] == json.loads(shape(tools=[WEATHER]).whole(PARTS_COMPLETION))["output"]


def test_text_calls_and_text_are_items_in_their_order():
    def chunk(seq: int, delta: Delta) -> Chunk:
        whole_chunk = CHUNKS[0]
        choice = msgspec.structs.replace(whole_chunk.choices[0], delta=delta)
        return msgspec.structs.replace(whole_chunk, seq=seq, choices=[choice])

    calls = [ToolCallDelta(0, "c1", CALL), ToolCallDelta(1, "", CALL)]
    deltas = [Delta("assistant", "I look."), Delta(tool_calls=calls), Delta(content="Done"), Delta(content=".")]
    writing = shape(stream=True, tools=[WEATHER])
    parts = b"".join(writing.part(chunk(seq, delta)) for seq, delta in enumerate(deltas))
    found = events(parts + writing.end(COMPLETION))
    output = found[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call", "message"]
    assert [item["id"] for item in output] == ["msg_req-1_0", "fc_req-1_0", "fc_req-1_1", "msg_req-1_1"]
    assert [item["call_id"] for item in output[1:3]] == ["c1", "call_req-1_1"]
    assert [output[index]["content"][0]["text"] for index in (0, 3)] == ["I look.", "Done."]
    assert {item["status"] for item in output} == {"completed"}
    added = [(event["output_index"], event["item"]["id"]) for event in found if "output_item.added" in event["type"]]
    assert added == list(enumerate(item["id"] for item in output))
    for event in found:
        if "item_id" in event:
            assert output[event["output_index"]]["id"] == event["item_id"]


def test_an_empty_stream_has_an_empty_message():
    writing = shape(stream=True)
    found = events(writing.part(LAST_CHUNK) + writing.end(COMPLETION))
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_stream_that_waits_is_in_progress_until_it_begins():
    writing = shape(stream=True, model="some")
    found = events(writing.keep_alive + writing.keep_alive + writing.part(CHUNKS[0]) + writing.end(COMPLETION))
    assert kinds(found)[:4] == ["created", "in_progress", "in_progress", "output_item.added"]
    assert [event["response"]["id"] for event in found[:3]] == ["req-1"] * 3
    assert found[0]["response"]["model"] == "some"
    assert found[-1]["response"]["model"] == "headrace-demo"
    assert found[0]["response"]["created_at"] == found[-1]["response"]["created_at"] > 0


def test_an_error_in_the_middle_is_told_twice_as_clients_read_it():
    writing = shape(stream=True)
    error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "It failed."))
    found = events(writing.part(CHUNKS[0]) + writing.error_part(error))
    assert kinds(found)[-2:] == ["error", "failed"]
    assert (found[-2]["code"], found[-2]["message"]) == ("engine_failed", "It failed.")
    assert found[-2]["error"]["type"] == "server_error"
    failed = found[-1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": "engine_failed", "message": "It failed."})
    assert failed["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}])
def test_scores_are_asked_for_and_are_beside_the_text(fields: dict[str, Any]):
    asked = read_response(json.dumps({"input": "x", **fields}).encode(), LIMIT)
    assert isinstance(asked, Asked)
    assert asked.request.alternatives == fields.get("top_logprobs", 0)
    completion = msgspec.structs.replace(COMPLETION, choices=[SCORED_CHOICE])
    whole = json.loads(asked.shape.whole(completion))
    assert whole["output"][-1]["content"][0]["logprobs"][0]["token"] == "Hi"
    spoken = msgspec.structs.replace(SCORED_CHUNK.choices[0], delta=Delta(content="Hi"))
    found = events(asked.shape.part(msgspec.structs.replace(SCORED_CHUNK, choices=[spoken])))
    (delta,) = [event for event in found if event["type"] == "response.output_text.delta"]
    assert delta["logprobs"][0]["bytes"] == [72, 105]


def test_an_image_of_an_input_is_carried():
    content = [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "data:image/png;base64,aGk="}]
    body = {"input": [{"role": "user", "content": content}]}
    asked = read_response(json.dumps(body).encode(), LIMIT)
    assert isinstance(asked, Asked)
    assert asked.request.needs_ollama == "images"


# ---- reasoning


def test_reasoning_is_an_item_before_the_message_and_is_counted():
    response = whole(THOUGHTFUL)
    thought, said = response.output
    assert (thought.type, thought.id, thought.content[0].text) == ("reasoning", "rs_req-1_0", "Hm. Two")
    assert said.content[0].text == "Four"
    assert response.usage.output_tokens_details.reasoning_tokens == 7


def test_reasoning_is_streamed_as_an_item_of_its_own():
    shape_ = shape()
    data = b"".join(shape_.part(chunk) for chunk in THOUGHTFUL_CHUNKS) + shape_.end(THOUGHTFUL)
    found = events(data)
    assert kinds(found)[2:9] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert "".join(e["delta"] for e in found if e["type"] == "response.reasoning_text.delta") == "Hm. Two"
    assert "".join(e["delta"] for e in found if e["type"] == "response.output_text.delta") == "Four"
    assert [item["type"] for item in found[-1]["response"]["output"]] == ["reasoning", "message"]
    assert {e.get("output_index") for e in found[2:9]} == {0}


def test_an_answer_cut_off_in_its_reasoning_has_an_empty_message():
    shape_ = shape()
    found = events(shape_.part(THOUGHTFUL_CHUNKS[0]) + shape_.end(CUT_IN_THOUGHT))
    last = found[-1]["response"]
    assert (last["status"], [item["type"] for item in last["output"]]) == ("incomplete", ["reasoning", "message"])
    response = whole(CUT_IN_THOUGHT)
    assert [item.type for item in response.output] == ["reasoning", "message"]


def test_reasoning_belongs_to_the_answer_that_follows_it():
    def thought(text: str | None, **more: Any) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": text}] if text else None
        return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content} | more

    items = [
        {"role": "user", "content": "Hi"},
        thought("A"),
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        thought(None, summary=[{"type": "summary_text", "text": "B"}]),
        {"role": "assistant", "content": "One."},
        thought("C"),
        {"role": "user", "content": "Thanks"},
        thought("D"),
    ]
    made = chat(input=items)["messages"]
    assert [(turn["role"], turn.get("reasoning_content")) for turn in made] == [
        ("user", None),
        ("assistant", "A"),
        ("tool", None),
        ("assistant", "B"),
        ("user", None),
    ]
