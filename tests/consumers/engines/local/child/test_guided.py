"""Answers of a given form, by the demo model on MLX."""

import asyncio
import json
import os
import re
import signal

import jsonschema_rs
import msgspec
import pytest
import pytest_asyncio

from bench.shapes import listed, record, shapes
from pipeline.engine import Engine
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import Answer, ask, read, refusal, work

pytest.importorskip("mlx_lm", reason="MLX is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS = listed({"type": "string", "minLength": 3, "maxLength": 8}, minItems=4)
WEATHER = record(city={"type": "string", "maxLength": 12}, days={"type": "integer", "minimum": 1, "maximum": 7})
CAPITAL = "What is the capital of France?"


def asking(prompt: str = CAPITAL, *, schema=None, **fields) -> ChatRequest:
    if schema is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 500, **fields}
    return decode_chat(json.dumps(body).encode(), max_body_bytes=1 << 20)


def tool(name: str, parameters=None, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}, **more}}


def named(name: str):
    return {"type": "function", "function": {"name": name}}


async def rest_of(generation, first) -> Answer:
    """What follows the first piece. On a busy machine that can be the whole answer."""
    return Answer() if first.finish_reason is not None else await read(generation)


def joined(*parts: Answer) -> tuple[str, list[int]]:
    return "".join(part.text for part in parts), [token for part in parts for token in part.token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start):
    async with start("mlx") as process:
        as_seen_by_workers: Engine = process
        yield as_seen_by_workers


async def test_every_answer_is_an_instance_of_its_schema(engine):
    kinds = shapes()
    answers = await asyncio.gather(
        *(ask(engine, asking(schema=schema, temperature=1), seed=seed) for seed, schema in enumerate(kinds))
    )
    for schema, answer in zip(kinds, answers, strict=True):
        assert answer.finish_reason == "stop", (schema, answer.text)
        assert jsonschema_rs.is_valid(schema, json.loads(answer.text)), (schema, answer.text)


async def test_an_answer_beside_free_ones_is_what_it_is_alone_and_so_are_they(engine):
    requests = [
        asking("Count from 3 to 12."),
        asking(schema=WORDS, temperature=1),
        asking(CAPITAL, temperature=1),
        asking(structured_outputs={"choice": ["Rome", "Paris"]}),
        asking(schema=WEATHER, temperature=1),
    ]
    alone = [await ask(engine, request, seed=seed) for seed, request in enumerate(requests)]
    together = await asyncio.gather(*(ask(engine, request, seed=seed) for seed, request in enumerate(requests)))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9])
async def test_an_answer_goes_on_in_its_form(engine, part):
    request = asking(schema=record(a=WORDS, b=WEATHER), temperature=1)
    whole = await ask(engine, request, seed=5)
    at = int(len(whole.token_ids) * part)
    rest = await ask(engine, request, seed=5, resume_tokens=whole.token_ids[:at])
    assert rest.token_ids == whole.token_ids[at:]
    assert rest.text == whole.text


async def test_an_answer_goes_on_in_its_form_after_a_crash(engine):
    request = asking(schema=record(a=WORDS, b=WORDS), temperature=1)
    undisturbed = [await ask(engine, request, seed=seed) for seed in range(3)]
    running = [await engine.submit(work(request, seed=seed, request_id=f"crash-{seed}")) for seed in range(3)]
    begun = [await generation.next() for generation in running]
    os.kill(engine.child_pid, signal.SIGKILL)
    rests = await asyncio.gather(*map(rest_of, running, begun))
    for whole, first, rest in zip(undisturbed, begun, rests, strict=True):
        assert joined(first, rest) == joined(whole)
    assert all(rest.restarted or first.finish_reason for first, rest in zip(begun, rests, strict=True))


async def test_a_suspended_answer_goes_on_in_its_form(engine):
    request = asking(schema=record(a=WORDS, b=WORDS), temperature=1)
    total = engine.status().slots_total
    undisturbed = [await ask(engine, request, seed=seed) for seed in range(total)]
    running = [
        await engine.submit(work(request, seed=seed, request_id=f"low-{seed}", priority=Priority.LOW))
        for seed in range(total)
    ]
    begun = [await generation.next() for generation in running]
    short = asking(schema={"enum": ["yes", "no"]})
    highs = (ask(engine, short, request_id=f"high-{n}", priority=Priority.HIGH) for n in range(3))
    assert {answer.text for answer in await asyncio.gather(*highs)} <= {'"yes"', '"no"'}
    rests = await asyncio.gather(*map(rest_of, running, begun))
    for whole, first, rest in zip(undisturbed, begun, rests, strict=True):
        assert joined(first, rest) == joined(whole)


async def test_an_answer_that_is_cut_off_says_so(engine):
    answer = await ask(engine, asking(schema=WORDS, max_tokens=3))
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 3)
    assert answer.text.startswith("[")


async def test_a_stop_string_ends_an_answer_of_a_form(engine):
    answer = await ask(engine, asking(schema={"const": ["one", "two"]}, stop=["two"]))
    assert answer.finish_reason == "stop"
    assert "two" not in answer.text


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[A-Z]{3}-\d{4}/[a-f]{2}"}, r"[A-Z]{3}-\d{4}/[a-f]{2}"),
        ({"choice": ["Paris", "London", 'a "quoted" one']}, 'Paris|London|a "quoted" one'),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{3,5}/'}, "<[a-z]{3,5}>"),
    ],
)
async def test_other_forms(engine, form, pattern):
    for seed in range(3):
        answer = await ask(engine, asking(structured_outputs=form, temperature=1), seed=seed)
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.finish_reason == "stop"


async def test_a_json_object_is_one(engine):
    answer = await ask(engine, asking(response_format={"type": "json_object"}, temperature=0))
    assert isinstance(json.loads(answer.text), dict)


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_a_required_call_comes_with_valid_arguments(engine, seed):
    tools = [tool("get_weather", WEATHER), tool("say", record(words=WORDS)), tool("now")]
    request = asking(tools=tools, tool_choice="required", parallel_tool_calls=False, temperature=1)
    answer = await ask(engine, request, seed=seed)
    (call,) = answer.tool_calls
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    assert jsonschema_rs.is_valid(schemas[call.function.name], json.loads(call.function.arguments))


async def test_a_named_function_is_called(engine):
    for name, schema in {"get_weather": WEATHER, "lookup": record(key={"enum": ["a", "b"]})}.items():
        tools = [tool("get_weather", WEATHER), tool("lookup", record(key={"enum": ["a", "b"]}))]
        answer = await ask(engine, asking("Hello.", tools=tools, tool_choice=named(name), temperature=0))
        (call,) = answer.tool_calls
        assert call.function.name == name
        assert jsonschema_rs.is_valid(schema, json.loads(call.function.arguments))


async def test_a_function_without_parameters_is_called_with_none(engine):
    answer = await ask(engine, asking(tools=[tool("now")], tool_choice=named("now")))
    assert [(call.function.name, call.function.arguments) for call in answer.tool_calls] == [("now", "{}")]


async def test_strict_tools_leave_the_model_its_choice_and_hold_its_calls_to_their_schema(engine):
    # The demo model calls a weather tool with the city alone.
    strict = [tool("get_weather", WEATHER, strict=True)]
    answer = await ask(engine, asking("What is the weather in Paris?", tools=strict, temperature=0))
    (call,) = answer.tool_calls
    assert jsonschema_rs.is_valid(WEATHER, json.loads(call.function.arguments))
    assert (await ask(engine, asking(CAPITAL, tools=strict, temperature=0))).tool_calls == []


async def test_the_answer_ends_with_its_first_call_where_calls_are_not_to_be_parallel(engine):
    lenient = asking("What is the weather in Paris?", tools=[tool("get_weather", WEATHER)], parallel_tool_calls=False)
    answer = await ask(engine, msgspec.structs.replace(lenient, temperature=0))
    assert (len(answer.tool_calls), answer.finish_reason) == (1, "tool_calls")


async def test_a_form_beside_tools_is_that_of_the_text(engine):
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
    for seed in range(3):
        request = asking(CAPITAL, tools=[tool("now")], response_format=form, temperature=1)
        answer = await ask(engine, request, seed=seed)
        assert answer.tool_calls or json.loads(answer.text) in ("yes", "no")


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"schema": {"type": "array", "uniqueItems": True}}, "response_format", "uniqueItems"),
        ({"schema": {"$ref": "https://example.org/s"}}, "response_format", "refers to another document"),
        ({"guided_regex": "(?=a)"}, "structured_outputs", "look-around"),
        ({"guided_grammar": "start: foo"}, "structured_outputs", "foo"),
        ({"tools": [tool("f", {"not": {}})], "tool_choice": "required"}, "tools", "not"),
        ({"tools": [tool("f")], "tool_choice": "auto", "guided_regex": "a"}, "structured_outputs", "`tools`"),
    ],
)
async def test_a_form_that_cannot_be_compiled_is_refused_with_its_reason(engine, fields, param, words):
    error = await refusal(engine, asking(**fields))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert words in error.message


async def test_an_answer_that_another_engine_began_in_another_form_is_not_continued(engine):
    error = await refusal(engine, asking(schema=WORDS), resume_text="Well, ")
    assert error.code is ErrorCode.ENGINE_FAILED
    assert "does not have the form" in error.message
