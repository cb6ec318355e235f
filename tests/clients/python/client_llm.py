"""The command `llm`, with a model of OpenAI's API in its file."""

import json

from cell import (
    CAPITAL,
    HIGH,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    UNKNOWN,
    WEATHER,
    check,
    is_capital,
    lacks,
    run,
    says,
    urgent,
)
from commands import HOME, is_cancelled_by_its_end, output

AT = {"LLM_USER_PATH": str(HOME)}
USUAL = {"api_base": OPENAI, "supports_tools": True, "supports_schema": True}
MODELS = [
    {"model_id": "here", "model_name": "auto", **USUAL},
    {"model_id": "slow", "model_name": "auto", **USUAL, "api_base": SLOW_OPENAI},
    {"model_id": "wrong", "model_name": UNKNOWN, **USUAL},
    {"model_id": "urgent", "model_name": "auto", **USUAL, "headers": HIGH},
]
WEATHER_FUNCTION = """
def get_weather(city: str) -> str:
    "The weather in a city."
    return "sunny, 21 degrees"
"""
(HOME / "extra-openai-models.yaml").write_text(json.dumps(MODELS))


def words(*options, model="here"):
    return "llm", "-m", model, "--key", "unused", *options


@check("chat")
def _():
    says(output(*words("--no-stream", QUESTION), **AT))


@check("stream")
def _():
    says(output(*words(QUESTION), **AT))


@check("tools")
def _():
    says(output(*words("--functions", WEATHER_FUNCTION, "--td", WEATHER), **AT), "get_weather({'city': 'Paris'})")


@check("form")
def _():
    is_capital(output(*words("--schema", json.dumps(CAPITAL), QUESTION), **AT))


@check("errors")
def _():
    says(output(*words(QUESTION, model="wrong"), **AT), UNKNOWN)


@check("cancel")
def _():
    is_cancelled_by_its_end(*words(QUESTION, model="slow"), **AT)


@check("priority")
def _():
    with urgent():
        output(*words(QUESTION, model="urgent"), **AT)


lacks("embeddings", "of other models")
run()
