"""AutoGen's model clients of OpenAI's and Ollama's API."""

import asyncio

import openai
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.ollama import OllamaChatCompletionClient
from autogen_ext.models.openai import OpenAIChatCompletionClient
from capital import Capital
from cell import (
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    UNKNOWN,
    URL,
    WEATHER,
    answered_once,
    cancelled,
    check,
    is_weather_call,
    lacks,
    raises,
    run,
    says,
    urgent,
)

ABILITIES = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
}


def of_openai(name="auto", base=OPENAI, **options):
    return OpenAIChatCompletionClient(model=name, base_url=base, api_key="unused", model_info=ABILITIES, **options)


def of_ollama():
    return OllamaChatCompletionClient(model="auto", host=URL, model_info=ABILITIES)


def ask(client, question=QUESTION, **options):
    return asyncio.run(client.create([UserMessage(content=question, source="user")], **options)).content


@check("chat")
def _():
    says(ask(of_openai()))
    says(ask(of_ollama()))


@check("stream")
def _():
    async def read(client):
        parts = client.create_stream([UserMessage(content=QUESTION, source="user")])
        return "".join([part async for part in parts if isinstance(part, str)])

    says(asyncio.run(read(of_openai())))
    says(asyncio.run(read(of_ollama())))


@check("tools")
def _():
    async def get_weather(city: str) -> str:
        return f"sunny in {city}"

    tool = FunctionTool(get_weather, description="The weather in a city.")
    for client in (of_openai(), of_ollama()):
        [call] = ask(client, WEATHER, tools=[tool])
        is_weather_call(call.name, call.arguments)


@check("form")
def _():
    for client in (of_openai(), of_ollama()):
        assert Capital.model_validate_json(ask(client, json_output=Capital)).capital


lacks("embeddings", "not what it is for")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        ask(of_openai(UNKNOWN))


@check("cancel")
def _():
    async def leave():
        parts = of_openai(base=SLOW_OPENAI).create_stream([UserMessage(content=QUESTION, source="user")])
        await anext(parts)
        await parts.aclose()

    with cancelled():
        asyncio.run(leave())


@check("retry")
def _():
    with answered_once():
        assert ask(of_openai(base=SLOW_OPENAI, timeout=1, max_retries=9, default_headers=KEY))


@check("priority")
def _():
    with urgent():
        ask(of_openai(default_headers=HIGH))


run()
