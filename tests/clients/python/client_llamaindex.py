"""LlamaIndex, with its models of OpenAI's and Ollama's API."""

import gc

import openai
from capital import Capital
from cell import (
    EMBEDDER,
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
    raises,
    run,
    says,
    urgent,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

AT = {"api_base": OPENAI, "api_key": "unused"}
USUAL = {"model": "auto", "is_chat_model": True, "is_function_calling_model": True}
of_openai = OpenAILike(**USUAL, **AT)
of_ollama = Ollama(model="auto", base_url=URL)
MODELS = (of_openai, of_ollama)
ASK = [ChatMessage(role="user", content=QUESTION)]


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@check("chat")
def _():
    for model in MODELS:
        says(model.chat(ASK).message.content)


@check("stream")
def _():
    for model in MODELS:
        says("".join(part.delta or "" for part in model.stream_chat(ASK)))


@check("tools")
def _():
    for model in MODELS:
        answer = model.chat_with_tools([FunctionTool.from_defaults(get_weather)], user_msg=WEATHER)
        [call] = model.get_tool_calls_from_response(answer)
        is_weather_call(call.tool_name, call.tool_kwargs)


@check("form")
def _():
    for model in MODELS:
        assert model.as_structured_llm(Capital).chat(ASK).raw.capital


@check("embeddings")
def _():
    embedder = OpenAILikeEmbedding(model_name=EMBEDDER, **AT)
    assert len(embedder.get_text_embedding_batch(["a cat", "a dog"])) == 2
    with raises(openai.NotFoundError, "headrace-demo"):
        OpenAILikeEmbedding(model_name="headrace-demo", **AT).get_text_embedding("a cat")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        OpenAILike(**{**USUAL, "model": UNKNOWN}, **AT).chat(ASK)


@check("cancel")
def _():
    with cancelled():
        stream = OpenAILike(**USUAL, api_base=SLOW_OPENAI, api_key="unused").stream_chat(ASK)
        next(stream)
        stream.close()
        # Its stream leaves the connection open until it is collected.
        del stream
        gc.collect()


@check("retry")
def _():
    hasty = OpenAILike(**USUAL, api_base=SLOW_OPENAI, api_key="unused", timeout=1, max_retries=9, default_headers=KEY)
    with answered_once():
        assert hasty.chat(ASK).message.content


@check("priority")
def _():
    with urgent():
        OpenAILike(**USUAL, default_headers=HIGH, **AT).chat(ASK)


run()
