"""Ollama's Python client. It makes no retries of its own, so the script repeats the call."""

import httpx
import ollama
from capital import Capital
from cell import (
    ASK,
    ASK_WEATHER,
    EMBEDDER,
    HIGH,
    KEY,
    QUESTION,
    SLOW,
    TOOL,
    UNKNOWN,
    URL,
    answered_once,
    cancelled,
    check,
    is_weather_call,
    raises,
    run,
    says,
    urgent,
)

client = ollama.Client(URL)
slow = ollama.Client(SLOW)


@check("chat")
def _():
    says(client.chat("auto", ASK).message.content)
    says(client.generate("auto", QUESTION).response)
    assert "auto" in [model.model for model in client.list().models]
    assert "tools" in client.show("auto").capabilities


@check("stream")
def _():
    parts = list(client.chat("auto", ASK, stream=True))
    says("".join(part.message.content for part in parts))
    assert parts[-1].done


@check("tools")
def _():
    answer = client.chat("auto", ASK_WEATHER, tools=[TOOL]).message
    [call] = answer.tool_calls
    is_weather_call(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_name": "get_weather", "content": '{"condition": "sunny", "celsius": 21}'}
    says(client.chat("auto", [*ASK_WEATHER, answer, result], tools=[TOOL]).message.content)


@check("form")
def _():
    answer = client.chat("auto", ASK, format=Capital.model_json_schema())
    assert Capital.model_validate_json(answer.message.content).capital


@check("embeddings")
def _():
    assert len(client.embed(EMBEDDER, ["a cat", "a dog"]).embeddings) == 2
    with raises(ollama.ResponseError, "headrace-demo"):
        client.embed("headrace-demo", "a cat")


@check("errors")
def _():
    with raises(ollama.ResponseError, UNKNOWN):
        client.chat(UNKNOWN, ASK)
    with raises(ollama.ResponseError, UNKNOWN):
        list(client.chat(UNKNOWN, ASK, stream=True))
    with raises(ollama.ResponseError, "temperature"):
        client.chat("auto", ASK, options={"temperature": -1})


@check("cancel")
def _():
    with cancelled():
        stream = slow.chat("auto", ASK, stream=True)
        next(stream)
        stream.close()


@check("retry")
def _():
    hasty = ollama.Client(SLOW, timeout=1, headers=KEY)
    with answered_once():
        for _ in range(9):
            try:
                assert hasty.chat("auto", ASK).message.content
                return
            except httpx.ReadTimeout:
                continue
        raise AssertionError("no answer")


@check("priority")
def _():
    with urgent():
        ollama.Client(URL, headers=HIGH).chat("auto", ASK)


run()
