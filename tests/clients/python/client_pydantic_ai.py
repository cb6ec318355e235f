"""Pydantic AI, with its model of OpenAI's chats."""

import asyncio

import openai
from capital import Capital
from cell import (
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    UNKNOWN,
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
from pydantic_ai import Agent, ModelHTTPError, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


def agent(model="auto", base=OPENAI, client=None, **options):
    provider = OpenAIProvider(openai_client=client) if client else OpenAIProvider(base_url=base, api_key="unused")
    return Agent(OpenAIChatModel(model, provider=provider), **options)


@check("chat")
def _():
    says(agent().run_sync(QUESTION).output)


@check("stream")
def _():
    async def read():
        async with agent().run_stream(QUESTION) as stream:
            return "".join([part async for part in stream.stream_text(delta=True)])

    says(asyncio.run(read()))


@check("tools")
def _():
    calls = []

    def get_weather(city: str) -> str:
        """The weather in a city."""
        calls.append(city)
        return "sunny, 21 degrees"

    says(agent(tools=[get_weather]).run_sync(WEATHER).output)
    [city] = calls
    is_weather_call("get_weather", {"city": city})


@check("form")
def _():
    assert agent(output_type=Capital).run_sync(QUESTION).output.capital
    assert agent(output_type=NativeOutput(Capital)).run_sync(QUESTION).output.capital


@check("responses")
def _():
    model = OpenAIResponsesModel("auto", provider=OpenAIProvider(base_url=OPENAI, api_key="unused"))
    says(Agent(model).run_sync(QUESTION).output)


lacks("embeddings", "not tried")


@check("errors")
def _():
    with raises(ModelHTTPError, UNKNOWN):
        agent(UNKNOWN).run_sync(QUESTION)


@check("cancel")
def _():
    async def leave():
        async with agent(base=SLOW_OPENAI).run_stream(QUESTION) as stream:
            async for _ in stream.stream_text(delta=True):
                break

    with cancelled():
        asyncio.run(leave())


@check("retry")
def _():
    hasty = openai.AsyncOpenAI(base_url=SLOW_OPENAI, api_key="unused", timeout=1, max_retries=9, default_headers=KEY)
    with answered_once():
        assert agent(client=hasty).run_sync(QUESTION).output


@check("priority")
def _():
    with urgent():
        agent().run_sync(QUESTION, model_settings={"extra_headers": HIGH})


run()
