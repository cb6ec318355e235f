"""OpenAI's Agents SDK, with its default, the Responses API."""

import asyncio

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
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

set_tracing_disabled(disabled=True)  # it would send them to OpenAI


def model(name="auto", base=OPENAI, kind=OpenAIResponsesModel, **options):
    return kind(name, openai.AsyncOpenAI(base_url=base, api_key="unused", **options))


def ask(question=QUESTION, name="auto", **options):
    agent = Agent(name="asked", **{"model": model(name), **options})
    return Runner.run_sync(agent, question).final_output


@check("chat")
def _():
    says(ask(model=model(kind=OpenAIChatCompletionsModel)))


@check("responses")
def _():
    says(ask())


@check("stream")
def _():
    async def read():
        events = Runner.run_streamed(Agent(name="asked", model=model()), QUESTION).stream_events()
        raw = [event.data async for event in events if event.type == "raw_response_event"]
        return "".join(event.delta for event in raw if event.type == "response.output_text.delta")

    says(asyncio.run(read()))


@check("tools")
def _():
    calls = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        calls.append(city)
        return "sunny, 21 degrees"

    says(ask(WEATHER, tools=[get_weather]))
    [city] = calls
    is_weather_call("get_weather", {"city": city})


@check("form")
def _():
    assert ask(output_type=Capital).capital


lacks("embeddings", "not what it is for")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        ask(name=UNKNOWN)


@check("cancel")
def _():
    async def leave():
        streamed = Runner.run_streamed(Agent(name="asked", model=model(base=SLOW_OPENAI)), QUESTION)
        async for event in streamed.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                break
        streamed.cancel()

    with cancelled():
        asyncio.run(leave())


@check("retry")
def _():
    with answered_once():
        assert ask(model=model(base=SLOW_OPENAI, timeout=1, max_retries=9, default_headers=KEY))


@check("priority")
def _():
    with urgent():
        ask(model_settings=ModelSettings(extra_headers=HIGH))


run()
