"""Ollama's options and tool calls, in both directions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pipeline.wire.answers import FunctionCall
from pipeline.wire.constraints import JsonSchemaFormat, ResponseFormat
from pipeline.wire.ollama import (
    OPTIONS,
    BadOptionError,
    OllamaCall,
    OllamaFunction,
    format_of,
    read_call,
    read_options,
    response_format,
    write_call,
    write_options,
)
from pipeline.wire.requests import NO_LIMIT, ChatRequest

EVERY_OPTION = {
    "num_predict": 9,
    "seed": 7,
    "stop": ["\n"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repeat_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
}


def test_what_is_written_is_what_is_read():
    assert set(EVERY_OPTION) == set(OPTIONS)
    request = msgspec.convert({"prompt": "x", **read_options(EVERY_OPTION)}, ChatRequest)
    assert write_options(request) == EVERY_OPTION


def test_no_limit_is_written_as_ollama_has_it():
    assert write_options(ChatRequest(prompt="x", max_tokens=NO_LIMIT)) == {"num_predict": -1}


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"num_predict": -1}, {"max_tokens": NO_LIMIT}),
        ({"num_predict": -2}, {"max_tokens": NO_LIMIT}),
        ({"num_predict": 0}, {"max_tokens": NO_LIMIT}),
        ({"num_predict": 5.0}, {"max_tokens": 5}),
        ({"seed": -1}, {}),
        ({"seed": -7}, {"seed": -7}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": ["", "a"]}, {"stop": ["a"]}),
        ({"temperature": None, "num_ctx": 99, "mirostat": 2}, {}),
    ],
)
def test_options_mean_what_they_mean_at_ollama(options: dict[str, Any], fields: dict[str, Any]):
    assert read_options(options) == fields


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("seed", True, "integer"),
        ("num_predict", "9", "integer"),
        ("num_predict", float("inf"), "integer"),
        ("temperature", "hot", "float32"),
        ("stop", "x", "array"),
        ("stop", [1], "array"),
    ],
)
def test_an_option_of_the_wrong_type_is_named_as_ollama_names_it(name: str, value: object, kind: str):
    with pytest.raises(BadOptionError) as caught:
        read_options({name: value})
    assert str(caught.value) == f'option "{name}" must be of type {kind}'
    assert caught.value.field == OPTIONS[name].field


def test_a_call_is_the_same_after_both_translations():
    call = write_call(2, "c1", FunctionCall("get", '{"city":"Paris"}'))
    assert msgspec.to_builtins(call) == {
        "id": "c1",
        "function": {"name": "get", "arguments": {"city": "Paris"}, "index": 2},
    }
    assert read_call(call, "other").function == FunctionCall("get", '{"city":"Paris"}')
    assert read_call(call, "other").id == "c1"


def test_a_call_without_an_id_gets_one():
    assert read_call(OllamaCall(OllamaFunction("get")), "call_0").id == "call_0"


@pytest.mark.parametrize("arguments", ["[]", "{", "3", '"x"'])
def test_arguments_that_are_no_object_are_kept_as_one_string(arguments: str):
    assert write_call(0, "c1", FunctionCall("get", arguments)).function.arguments == {"arguments": arguments}


@pytest.mark.parametrize("form", [None, "json", {"type": "object"}])
def test_a_format_is_the_same_after_both_translations(form: Any):
    fields = response_format(form)
    assert format_of(None if fields is None else msgspec.convert(fields, ResponseFormat)) == form


def test_a_schema_without_content_is_any_json():
    assert format_of(ResponseFormat("json_schema", JsonSchemaFormat())) == "json"
    assert format_of(ResponseFormat("text")) is None
    with pytest.raises(ValueError, match="JSON schema"):
        response_format(7)
