"""curl, as a shell script uses it."""

import json

from cell import (
    ASK,
    ASK_WEATHER,
    CAPITAL,
    EMBEDDER,
    HIGH,
    KEY,
    OPENAI,
    SLOW_OPENAI,
    TOOL,
    UNKNOWN,
    answered_once,
    check,
    is_capital,
    is_weather_call,
    run,
    says,
    urgent,
)
from commands import is_cancelled_by_its_end, output


def words(path, body, base=OPENAI, *options, headers=()):
    lines = [word for name, value in dict(headers).items() for word in ("-H", f"{name}: {value}")]
    return "curl", "-sS", *options, *lines, f"{base}{path}", "-d", json.dumps(body)


def asked(body, path="/chat/completions", *options, base=OPENAI, headers=()):
    return json.loads(output(*words(path, body, base, *options, headers=headers)))


@check("chat")
def _():
    says(asked({"messages": ASK})["choices"][0]["message"]["content"])


@check("stream")
def _():
    lines = output(*words("/chat/completions", {"messages": ASK, "stream": True}, OPENAI, "-N")).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    says("".join(json.loads(part)["choices"][0]["delta"].get("content") or "" for part in data))


@check("tools")
def _():
    [call] = asked({"messages": ASK_WEATHER, "tools": [TOOL]})["choices"][0]["message"]["tool_calls"]
    is_weather_call(call["function"]["name"], call["function"]["arguments"])


@check("form")
def _():
    form = {"type": "json_schema", "json_schema": {"name": "capital", "schema": CAPITAL}}
    is_capital(asked({"messages": ASK, "response_format": form})["choices"][0]["message"]["content"])


@check("responses")
def _():
    says(asked({"input": ASK}, "/responses")["output"][0]["content"][0]["text"])


@check("embeddings")
def _():
    assert asked({"model": EMBEDDER, "input": "a cat"}, "/embeddings")["data"][0]["embedding"]
    assert asked({"model": "headrace-demo", "input": "a cat"}, "/embeddings")["error"]["code"] == "model_not_found"


@check("errors")
def _():
    assert asked({"model": UNKNOWN, "messages": ASK})["error"]["code"] == "model_not_found"
    answer = output(*words("/chat/completions", {"messages": ASK, "temperature": -1}, OPENAI, "--fail"))
    assert "error: 400" in answer, answer


@check("cancel")
def _():
    is_cancelled_by_its_end(*words("/chat/completions", {"messages": ASK}, SLOW_OPENAI))


@check("retry")
def _():
    patience = ("--max-time", "1", "--retry", "9", "--retry-all-errors", "--no-show-error")
    with answered_once():
        assert asked({"messages": ASK}, "/chat/completions", *patience, base=SLOW_OPENAI, headers=KEY)["choices"]


@check("priority")
def _():
    with urgent():
        asked({"messages": ASK}, headers=HIGH)


run()
