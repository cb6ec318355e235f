"""smolagents, with its model of OpenAI's chats."""

import openai
from cell import (
    ASK,
    ASK_WEATHER,
    CAPITAL,
    HIGH,
    KEY,
    OPENAI,
    SLOW_OPENAI,
    UNKNOWN,
    answered_once,
    cancelled,
    check,
    is_capital,
    is_weather_call,
    lacks,
    raises,
    run,
    says,
    urgent,
)
from smolagents import OpenAIModel, tool


def model(name="auto", base=OPENAI, **options):
    return OpenAIModel(name, api_base=base, api_key="unused", client_kwargs=options)


@tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


@check("chat")
def _():
    says(model()(ASK).content)


@check("stream")
def _():
    says("".join(part.content or "" for part in model().generate_stream(ASK)))


@check("tools")
def _():
    # Its ToolCallingAgent passes tool_choice "required" in the same way.
    call = model()(ASK_WEATHER, tools_to_call_from=[get_weather]).tool_calls[0]
    is_weather_call(call.function.name, call.function.arguments)


@check("form")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL}}
    is_capital(model()(ASK, response_format=form).content)


lacks("embeddings", "not what it is for")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        model(UNKNOWN)(ASK)


@check("cancel")
def _():
    with cancelled():
        stream = model(base=SLOW_OPENAI).generate_stream(ASK)
        next(stream)
        stream.close()


@check("retry")
def _():
    with answered_once():
        assert model(base=SLOW_OPENAI, timeout=1, max_retries=9, default_headers=KEY)(ASK).content


@check("priority")
def _():
    with urgent():
        model(default_headers=HIGH)(ASK)


run()
