"""Haystack, with its components of OpenAI's API."""

import openai
from cell import (
    CAPITAL,
    EMBEDDER,
    FUNCTION,
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    UNKNOWN,
    WEATHER,
    answered_once,
    check,
    is_capital,
    is_weather_call,
    lacks,
    raises,
    run,
    says,
    urgent,
)
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret

SECRET = Secret.from_token("unused")


def ask(question=QUESTION, name="auto", base=OPENAI, **options):
    generator = OpenAIChatGenerator(model=name, api_base_url=base, api_key=SECRET, **options)
    return generator.run([ChatMessage.from_user(question)])["replies"][0]


@check("chat")
def _():
    says(ask().text)


@check("stream")
def _():
    parts = []
    ask(streaming_callback=lambda part: parts.append(part.content))
    says("".join(parts))
    assert len(parts) > 1


@check("tools")
def _():
    [call] = ask(WEATHER, tools=[Tool(**FUNCTION, function=lambda city: f"sunny in {city}")]).tool_calls
    is_weather_call(call.tool_name, call.arguments)


@check("form")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL}}
    is_capital(ask(generation_kwargs={"response_format": form}).text)


@check("embeddings")
def _():
    assert OpenAITextEmbedder(SECRET, EMBEDDER, api_base_url=OPENAI).run("a cat")["embedding"]
    with raises(openai.NotFoundError, "headrace-demo"):
        OpenAITextEmbedder(SECRET, "headrace-demo", api_base_url=OPENAI).run("a cat")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        ask(name=UNKNOWN)


lacks("cancel", "a stream is read to its end")


@check("retry")
def _():
    hasty = {"timeout": 1, "max_retries": 9, "generation_kwargs": {"extra_headers": KEY}}
    with answered_once():
        assert ask(base=SLOW_OPENAI, **hasty).text


@check("priority")
def _():
    with urgent():
        ask(generation_kwargs={"extra_headers": HIGH})


run()
