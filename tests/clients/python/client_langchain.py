"""LangChain, with its models of OpenAI's and Ollama's API."""

import openai
from capital import Capital
from cell import (
    ASK_WEATHER,
    EMBEDDER,
    HIGH,
    KEY,
    OPENAI,
    QUESTION,
    SLOW_OPENAI,
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
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

AT = {"base_url": OPENAI, "api_key": "unused"}
of_openai = ChatOpenAI(model="auto", **AT)
of_ollama = ChatOllama(model="auto", base_url=URL)
MODELS = (of_openai, of_ollama)


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@check("chat")
def _():
    for model in MODELS:
        says(model.invoke(QUESTION).content)


@check("stream")
def _():
    for model in MODELS:
        says("".join(part.content for part in model.stream(QUESTION)))


@check("tools")
def _():
    for model in MODELS:
        [call] = model.bind_tools([get_weather]).invoke(ASK_WEATHER).tool_calls
        is_weather_call(call["name"], call["args"])


@check("form")
def _():
    for model in MODELS:
        assert model.with_structured_output(Capital).invoke(QUESTION).capital
    assert of_openai.with_structured_output(Capital, method="function_calling").invoke(QUESTION).capital


@check("responses")
def _():
    says(ChatOpenAI(model="auto", use_responses_api=True, **AT).invoke(QUESTION).text)


@check("embeddings")
def _():
    assert len(OllamaEmbeddings(model=EMBEDDER, base_url=URL).embed_documents(["a cat", "a dog"])) == 2
    texts = {"check_embedding_ctx_length": False, **AT}
    assert len(OpenAIEmbeddings(model=EMBEDDER, **texts).embed_documents(["a cat", "a dog"])) == 2
    with raises(openai.NotFoundError, "headrace-demo"):
        OpenAIEmbeddings(model="headrace-demo", **texts).embed_query("a cat")


@check("errors")
def _():
    with raises(openai.NotFoundError, UNKNOWN):
        ChatOpenAI(model=UNKNOWN, **AT).invoke(QUESTION)
    with raises(Exception, UNKNOWN):
        ChatOllama(model=UNKNOWN, base_url=URL).invoke(QUESTION)


@check("cancel")
def _():
    with cancelled():
        stream = ChatOpenAI(model="auto", base_url=SLOW_OPENAI, api_key="unused").stream(QUESTION)
        next(stream)
        stream.close()


@check("retry")
def _():
    hasty = ChatOpenAI(model="auto", base_url=SLOW_OPENAI, api_key="unused", timeout=1, max_retries=9)
    with answered_once():
        assert hasty.invoke(QUESTION, extra_headers=KEY).content


@check("priority")
def _():
    with urgent():
        ChatOpenAI(model="auto", default_headers=HIGH, **AT).invoke(QUESTION)


run()
