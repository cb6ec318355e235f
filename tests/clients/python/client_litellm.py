"""LiteLLM: OpenAI's, Anthropic's and Ollama's API by one function."""

import litellm
from capital import Capital
from cell import (
    ASK,
    ASK_WEATHER,
    EMBEDDER,
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
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

AT = {"api_base": OPENAI, "api_key": "unused"}
SLOWLY = {"api_base": SLOW_OPENAI, "api_key": "unused"}


@check("chat")
def _():
    for model, base in (("openai/auto", OPENAI), ("ollama_chat/auto", URL), ("anthropic/auto", URL)):
        answer = litellm.completion(model, ASK, api_base=base, api_key="unused")
        says(answer.choices[0].message.content)


@check("stream")
def _():
    for model, base in (("openai/auto", OPENAI), ("ollama_chat/auto", URL), ("anthropic/auto", URL)):
        parts = litellm.completion(model, ASK, stream=True, api_base=base, api_key="unused")
        says("".join(part.choices[0].delta.content or "" for part in parts))


@check("tools")
def _():
    for model, base in (("openai/auto", OPENAI), ("ollama_chat/auto", URL), ("anthropic/auto", URL)):
        answer = litellm.completion(model, ASK_WEATHER, tools=[TOOL], api_base=base, api_key="unused")
        [call] = answer.choices[0].message.tool_calls
        is_weather_call(call.function.name, call.function.arguments)


@check("form")
def _():
    answer = litellm.completion("openai/auto", ASK, response_format=Capital, **AT)
    assert Capital.model_validate_json(answer.choices[0].message.content).capital


@check("responses")
def _():
    answer = litellm.responses(model="openai/auto", input=QUESTION, **AT)
    says(answer.output[0].content[0].text)


@check("embeddings")
def _():
    assert len(litellm.embedding(f"openai/{EMBEDDER}", ["a cat", "a dog"], encoding_format="float", **AT).data) == 2
    with raises(litellm.NotFoundError, "headrace-demo"):
        litellm.embedding("openai/headrace-demo", ["a cat"], encoding_format="float", **AT)


@check("errors")
def _():
    with raises(litellm.NotFoundError, UNKNOWN):
        litellm.completion(f"openai/{UNKNOWN}", ASK, **AT)
    with raises(litellm.BadRequestError, "temperature"):
        litellm.completion("openai/auto", ASK, temperature=-1, **AT)


@check("cancel")
def _():
    with cancelled():
        stream = litellm.completion("openai/auto", ASK, stream=True, **SLOWLY)
        next(stream)
        stream.completion_stream.close()


@check("retry")
def _():
    with answered_once():
        answer = litellm.completion("openai/auto", ASK, timeout=1, max_retries=9, extra_headers=KEY, **SLOWLY)
    assert answer.choices[0].message.content


@check("priority")
def _():
    with urgent():
        litellm.completion("openai/auto", ASK, extra_headers=HIGH, **AT)


run()
