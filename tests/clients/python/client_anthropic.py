"""Anthropic's Python client."""

import anthropic
from cell import (
    ASK,
    ASK_WEATHER,
    CAPITAL,
    HIGH,
    KEY,
    PLACE,
    SLOW,
    UNKNOWN,
    URL,
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

client = anthropic.Anthropic(base_url=URL, api_key="unused")
slow = anthropic.Anthropic(base_url=SLOW, api_key="unused")
USUAL = {"model": "auto", "max_tokens": 200}
TOOL = {"name": "get_weather", "description": "The weather in a city.", "input_schema": PLACE}


@check("chat")
def _():
    answer = client.messages.create(**USUAL, messages=ASK)
    says(answer.content[0].text)
    assert client.messages.count_tokens(model="auto", messages=ASK).input_tokens == answer.usage.input_tokens


@check("stream")
def _():
    with client.messages.stream(**USUAL, messages=ASK) as stream:
        says("".join(stream.text_stream))
        assert stream.get_final_message().usage.output_tokens > 0


@check("tools")
def _():
    answer = client.messages.create(**USUAL, messages=ASK_WEATHER, tools=[TOOL])
    call = answer.content[-1]
    assert answer.stop_reason == "tool_use"
    is_weather_call(call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"condition": "sunny", "celsius": 21}'}
    history = [*ASK_WEATHER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    says(client.messages.create(**USUAL, messages=history, tools=[TOOL]).content[0].text)


@check("form")
def _():
    form = {"format": {"type": "json_schema", "schema": CAPITAL}}
    is_capital(client.messages.create(**USUAL, messages=ASK, output_config=form).content[0].text)


lacks("embeddings", "Anthropic's API has none")


@check("errors")
def _():
    with raises(anthropic.NotFoundError, UNKNOWN):
        client.messages.create(model=UNKNOWN, max_tokens=9, messages=ASK)
    with raises(anthropic.BadRequestError, "temperature"):
        client.messages.create(**USUAL, messages=ASK, extra_body={"temperature": -1})


@check("cancel")
def _():
    with cancelled(), slow.messages.stream(**USUAL, messages=ASK) as stream:
        next(iter(stream.text_stream))


@check("retry")
def _():
    hasty = slow.with_options(timeout=1, max_retries=9)
    with answered_once():
        answer = hasty.messages.create(**USUAL, messages=ASK, extra_headers=KEY)
    assert answer.content[0].text


@check("priority")
def _():
    with urgent():
        client.messages.create(**USUAL, messages=ASK, extra_headers=HIGH)


run()
