"""OpenAI's Python client."""

import openai
from capital import Capital
from cell import (
    ASK,
    ASK_WEATHER,
    EMBEDDER,
    FUNCTION,
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
    TOOL,
    UNKNOWN,
    WEATHER,
    answered_once,
    cancelled,
    check,
    is_weather_call,
    raises,
    run,
    says,
    urgent,
)

client = openai.OpenAI(base_url=OPENAI, api_key="unused")
slow = openai.OpenAI(base_url=SLOW_OPENAI, api_key="unused")


@check("chat")
def _():
    answer = client.chat.completions.create(model="auto", messages=ASK)
    says(answer.choices[0].message.content)
    assert answer.usage.completion_tokens > 0


@check("stream")
def _():
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="auto", messages=ASK, stream=True, stream_options=options))
    says("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    assert chunks[-1].usage.completion_tokens > 0


@check("tools")
def _():
    message = client.chat.completions.create(model="auto", messages=ASK_WEATHER, tools=[TOOL]).choices[0].message
    [call] = message.tool_calls
    is_weather_call(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"condition": "sunny", "celsius": 21}'}
    history = [*ASK_WEATHER, message, result]
    says(client.chat.completions.create(model="auto", messages=history, tools=[TOOL]).choices[0].message.content)


@check("form")
def _():
    answer = client.chat.completions.parse(model="auto", messages=ASK, response_format=Capital)
    assert answer.choices[0].message.parsed.capital


@check("responses")
def _():
    says(client.responses.create(model="auto", input=QUESTION).output_text)
    with client.responses.stream(model="auto", input=QUESTION) as stream:
        says("".join(event.delta for event in stream if event.type == "response.output_text.delta"))
    assert client.responses.parse(model="auto", input=QUESTION, text_format=Capital).output_parsed.capital
    tool = {"type": "function", **FUNCTION}
    [call] = client.responses.create(model="auto", input=WEATHER, tools=[tool]).output
    is_weather_call(call.name, call.arguments)


@check("embeddings")
def _():
    made = client.embeddings.create(model=EMBEDDER, input=["a cat", "a dog"])
    assert len(made.data) == 2
    assert made.data[0].embedding
    with raises(openai.NotFoundError, "headrace-demo"):
        client.embeddings.create(model="headrace-demo", input="a cat")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        client.chat.completions.create(model=UNKNOWN, messages=ASK)
    with raises(openai.BadRequestError, "temperature"):
        client.chat.completions.create(model="auto", messages=ASK, temperature=-1)


@check("cancel")
def _():
    with cancelled(), slow.chat.completions.create(model="auto", messages=ASK, stream=True) as stream:
        next(iter(stream))


@check("retry")
def _():
    hasty = slow.with_options(timeout=1, max_retries=9)
    with answered_once():
        answer = hasty.chat.completions.create(model="auto", messages=ASK, extra_headers=KEY)
    assert answer.choices[0].message.content


@check("priority")
def _():
    with urgent():
        client.chat.completions.create(model="auto", messages=ASK, extra_headers=HIGH)


run()
