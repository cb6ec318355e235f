"""The HTTP gateway of `headrace up` as its clients use it: OpenAI's and Ollama's own, unchanged, and plain HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest

from consumers.standin.embedding import EMBEDDER, embedding
from tests.e2e.conftest import Asker, Pipeline, asking, chat, joined, running, text_of
from tests.waiting import eventually, flushed

PRIORITIES = ("high", "medium", "low")
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "long " * 100_000}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
MODEL = "headrace-demo"
ALONE = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")


@pytest.fixture
async def gpt(embedded: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{embedded.http}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
async def llama(embedded: Pipeline) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=embedded.http)
    async with client._client:
        yield client


@pytest.fixture
async def web(embedded: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=embedded.http, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """An engine that takes as long as one wants, and says nothing of its own."""
    options = ("--engine", "simulated", "--simulated-answer-tokens", "40", "--simulated-tokens-per-s", "400")
    with running(tmp_path_factory.mktemp("simulated"), *options, *ALONE) as pipeline:
        yield pipeline


def events_of(text: str) -> list[tuple[int, dict[str, Any]]]:
    """The events of a stream as (id, data)."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("id: ")]
    return [(int(number.removeprefix("id: ")), json.loads(data.removeprefix("data: "))) for number, data in blocks]


# ---- OpenAI's batches


async def test_openai_runs_a_batch_whose_role_dies(simulated: Pipeline):
    lines = [
        {"custom_id": f"n{number}", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": FRANCE}}
        for number in range(40)
    ]
    lines[7]["body"] = {"messages": FRANCE, "model": "no-such-model"}
    content = "\n".join(map(json.dumps, lines)).encode()
    async with openai.AsyncOpenAI(base_url=f"{simulated.http}/v1", api_key="any", max_retries=3) as gpt:
        file = await gpt.files.create(file=("input.jsonl", content), purpose="batch")
        assert (await gpt.files.content(file.id)).content == content
        batch = await gpt.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )

        async def answered() -> bool:
            return (await gpt.batches.retrieve(batch.id)).request_counts.completed > 0

        await eventually(answered, every_s=0.1)
        simulated.kill("batches")

        async def ended() -> Any:
            found = await gpt.batches.retrieve(batch.id)
            return found if found.status == "completed" else None

        batch = await eventually(ended, every_s=0.2)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (39, 1)
        output, error = [await gpt.files.content(each) for each in (batch.output_file_id, batch.error_file_id)]
        assert (await gpt.batches.list()).data[0].id == batch.id
    rows = [json.loads(row) for row in output.text.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted({f"n{number}" for number in range(40)} - {"n7"})
    assert {row["response"]["body"]["headrace"]["priority"] for row in rows} == {"low"}
    (failed,) = map(json.loads, error.text.splitlines())
    assert (failed["custom_id"], failed["response"]["body"]["error"]["code"]) == ("n7", "model_not_found")


# ---- OpenAI's client


@pytest.mark.parametrize("priority", PRIORITIES)
async def test_openai_chats_at_each_priority_through_to_mlx(gpt: openai.AsyncOpenAI, priority: str):
    answer = await gpt.chat.completions.create(
        model="auto", messages=FRANCE, temperature=0, extra_headers={"X-Priority": priority}
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.headrace["priority"] == priority
    assert answer.headrace["engine"] == "mlx"
    assert answer._request_id == answer.id


@pytest.mark.parametrize("priority", PRIORITIES)
async def test_openai_streams_what_it_would_have_got_whole(gpt: openai.AsyncOpenAI, priority: str):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Count from 1 to 20."}], "temperature": 0}
    whole = await gpt.chat.completions.create(**asked)
    stream = await gpt.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_headers={"X-Priority": priority}
    )
    chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert parts
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.headrace["priority"] == priority
    assert {chunk.id for chunk in chunks} == {last.id}


async def test_openai_streams_no_usage_that_was_not_asked_for(gpt: openai.AsyncOpenAI):
    stream = await gpt.chat.completions.create(model="auto", messages=FRANCE, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_is_given_tool_calls(gpt: openai.AsyncOpenAI, stream: bool):
    asked = {"model": "auto", "messages": ASK_WEATHER, "tools": [WEATHER], "temperature": 0}
    if stream:
        # Its client joins the parts of the calls.
        async with gpt.chat.completions.stream(**asked) as events:
            choice = (await events.get_final_completion()).choices[0]
    else:
        choice = (await gpt.chat.completions.create(**asked)).choices[0]
    calls, finish = choice.message.tool_calls or (), choice.finish_reason
    assert [(call.function.name, list(json.loads(call.function.arguments))) for call in calls] == [
        ("get_weather", ["city"])
    ]
    assert finish == "tool_calls"


async def test_openai_completes_text(gpt: openai.AsyncOpenAI):
    # The prompt is raw: what the model's chat template would write, and the beginning of the answer.
    prompt = f"<|im_start|>user\n{FRANCE[0]['content']}<|im_end|>\n<|im_start|>assistant\nThe capital of France"
    asked = {"model": "auto", "prompt": prompt, "temperature": 0}
    whole = await gpt.completions.create(**asked)
    assert whole.choices[0].text == " is Paris."
    parts = [part async for part in await gpt.completions.create(**asked, stream=True)]
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


async def test_openai_parameters_are_honoured(gpt: openai.AsyncOpenAI):
    messages = [{"role": "user", "content": "Count from 1 to 20."}]
    stopped = await gpt.chat.completions.create(model="auto", messages=messages, stop=[" 7"], temperature=0)
    assert stopped.choices[0].message.content.startswith("1, 2, 3, 4, 5, 6")
    assert "7" not in stopped.choices[0].message.content
    short = await gpt.chat.completions.create(model="auto", messages=messages, max_completion_tokens=5)
    assert short.usage.completion_tokens == 5
    assert short.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"model": "tinyllama"}, openai.NotFoundError, "model_internal"),
        ({"model": "gpt-17"}, openai.NotFoundError, "model_not_found"),
        ({"modalities": ["audio"]}, openai.BadRequestError, "unsupported_parameter"),
        ({"temperature": 700}, openai.BadRequestError, "invalid_request"),
        ({"messages": []}, openai.BadRequestError, "invalid_request"),
        ({"extra_body": {"guided_regex": "(?=a)"}}, openai.BadRequestError, "invalid_request"),
        ({"messages": LONG}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * (2 << 20)}]}, openai.APIStatusError, "request_too_large"),
        ({"extra_headers": {"X-Priority": "urgent"}}, openai.BadRequestError, "invalid_request"),
        ({"extra_headers": {"X-Request-Timeout": "soon"}}, openai.BadRequestError, "invalid_request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_openai_raises_its_own_exceptions(
    gpt: openai.AsyncOpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, stream: bool
):
    with pytest.raises(kind) as caught:
        await gpt.chat.completions.create(**{"model": "auto", "messages": FRANCE, "stream": stream, **fields})
    assert caught.value.code == code
    assert caught.value.body["message"]


async def test_openai_lists_models_and_no_internal_one(gpt: openai.AsyncOpenAI):
    names = [model.id async for model in gpt.models.list()]
    assert MODEL in names
    assert not any("tinyllama" in name for name in names)
    assert (await gpt.models.retrieve(MODEL)).id == MODEL
    for name in ("tinyllama", "TinyLlama:1.1b", "nobody"):
        with pytest.raises(openai.NotFoundError):
            await gpt.models.retrieve(name)


@pytest.mark.parametrize("priority", PRIORITIES)
async def test_openai_embeds_at_each_priority_through_to_ollama(gpt: openai.AsyncOpenAI, priority: str):
    texts = ["one text", "another"]
    asked = {"model": EMBEDDER, "extra_headers": {"X-Priority": priority}}
    answer = await gpt.embeddings.create(input=texts, **asked)
    assert [item.index for item in answer.data] == [0, 1]
    assert [item.embedding for item in answer.data] == [pytest.approx(embedding(text)) for text in texts]
    assert answer.usage.total_tokens == 3
    assert (answer.headrace["engine"], answer.headrace["priority"]) == ("ollama", priority)
    numbers = await gpt.embeddings.create(input=texts[0], encoding_format="float", **asked)
    assert numbers.data[0].embedding == embedding(texts[0])


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"model": "text-embedding-3-small", "input": "x"}, openai.NotFoundError),
        ({"model": "tinyllama", "input": "x"}, openai.NotFoundError),
        ({"model": MODEL, "input": "x"}, openai.NotFoundError),
        ({"model": EMBEDDER, "input": [1, 2]}, openai.BadRequestError),
        ({"model": EMBEDDER, "input": "x", "dimensions": 100_000}, openai.BadRequestError),
    ],
    ids=["unknown", "internal", "mlx", "tokens", "dimensions"],
)
async def test_openai_raises_its_own_exception_for_what_is_not_embedded(
    embedded: Pipeline, asked: dict[str, Any], error: type[openai.APIStatusError]
):
    async with openai.AsyncOpenAI(base_url=f"{embedded.http}/v1", api_key="any") as client:
        with pytest.raises(error) as caught:
            await client.embeddings.create(**asked)
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"


async def test_openai_cannot_chat_with_what_only_embeds(gpt: openai.AsyncOpenAI):
    assert EMBEDDER in [model.id.removesuffix(":latest") async for model in gpt.models.list()]
    with pytest.raises(openai.BadRequestError, match="does not chat"):
        await gpt.chat.completions.create(model=EMBEDDER, messages=FRANCE)


async def test_embeddings_that_are_not_waited_for_are_read_later(web: httpx.AsyncClient):
    body = {"model": EMBEDDER, "input": ["kept for later"]}
    accepted = await web.post("/v1/embeddings", json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    events = events_of((await web.get(accepted.json()["events_url"])).text)
    assert [data["object"] for _, data in events] == ["list"]
    state = (await web.get(accepted.json()["url"])).json()
    assert state["answer"]["data"][0]["embedding"] == embedding("kept for later")


# ---- Ollama's client


@pytest.mark.parametrize("priority", PRIORITIES)
async def test_ollama_chats_at_each_priority_through_to_mlx(embedded: Pipeline, priority: str):
    client = ollama.AsyncClient(host=embedded.http, headers={"X-Priority": priority})
    async with client._client:
        answer = await client.chat(MODEL, FRANCE, options={"temperature": 0})
    assert answer.message.content == "The capital of France is Paris."
    assert answer.done_reason == "stop"
    assert answer.model == MODEL
    assert answer.total_duration >= answer.load_duration + answer.prompt_eval_duration + answer.eval_duration - 3000
    assert answer.eval_count == 8
    assert answer.prompt_eval_count > 0


async def test_ollama_streams_what_it_would_have_got_whole(llama: ollama.AsyncClient):
    asked = {"model": f"{MODEL}:latest", "prompt": "Count from 1 to 20.", "options": {"temperature": 0}}
    whole = await llama.generate(**asked)
    parts = [part async for part in await llama.generate(**asked, stream=True)]
    assert len(parts) > 2
    assert "".join(part.response for part in parts) == whole.response
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count


@pytest.mark.parametrize("stream", [False, True])
async def test_ollama_is_given_tool_calls(llama: ollama.AsyncClient, stream: bool):
    asked = {"model": MODEL, "messages": ASK_WEATHER, "tools": [WEATHER], "options": {"temperature": 0}}
    answer = await llama.chat(**asked, stream=stream)
    messages = [part.message async for part in answer] if stream else [answer.message]
    calls = [call.function for message in messages for call in message.tool_calls or ()]
    assert [(call.name, list(call.arguments)) for call in calls] == [("get_weather", ["city"])]


async def test_ollama_options_are_honoured(llama: ollama.AsyncClient):
    prompt = "Count from 1 to 20."
    stopped = await llama.generate(MODEL, prompt, options={"stop": [" 7"], "temperature": 0, "num_ctx": 2048})
    assert stopped.response.startswith("1, 2, 3, 4, 5, 6")
    assert "7" not in stopped.response
    short = await llama.generate(MODEL, prompt, options={"num_predict": 5}, keep_alive="5m")
    assert (short.eval_count, short.done_reason) == (5, "length")


async def test_ollama_asks_for_a_model_to_be_loaded(llama: ollama.AsyncClient):
    assert (await llama.generate(MODEL)).done_reason == "load"
    assert (await llama.chat(MODEL, [], keep_alive=0)).done_reason == "unload"


async def test_ollama_lists_and_shows_models_and_no_internal_one(llama: ollama.AsyncClient):
    for models in ((await llama.list()).models, (await llama.ps()).models):
        assert MODEL in [entry.model for entry in models]
        assert not any("tinyllama" in entry.model for entry in models)
    for model in (MODEL, f"{MODEL}-mini"):
        assert (await llama.show(model)).capabilities == ["completion", "tools"]


async def test_the_simulated_engine_is_said_to_take_tools(simulated: Pipeline):
    client = ollama.AsyncClient(host=simulated.http)
    async with client._client:
        assert (await client.show(MODEL)).capabilities == ["completion", "tools"]


async def test_ollama_embeds(llama: ollama.AsyncClient):
    answer = await llama.embed(EMBEDDER, ["one text", "another"])
    assert answer.model == EMBEDDER
    assert [list(vector) for vector in answer.embeddings] == [embedding("one text"), embedding("another")]
    assert answer.prompt_eval_count == 3
    assert answer.total_duration
    assert list((await llama.embeddings(EMBEDDER, "one text")).embedding) == embedding("one text")
    assert (await llama.embed(EMBEDDER, "")).embeddings == []
    assert [list(vector) for vector in (await llama.embed(EMBEDDER, ["x", ""])).embeddings] == [
        embedding("x"),
        embedding(" "),
    ]
    assert (await llama.show(EMBEDDER)).capabilities == ["embedding"]


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}-mini"])
async def test_ollamas_client_gets_scores_beside_its_own_parameters(llama: ollama.AsyncClient, model: str):
    answer = await llama.chat(
        model,
        FRANCE,
        think=True,
        logprobs=True,
        top_logprobs=2,
        keep_alive="5m",
        options={"num_ctx": 4096, "temperature": 0},
    )
    scores = answer.logprobs
    assert scores is not None
    assert "".join(score.token for score in scores) == answer.message.content
    assert all(len(score.top_logprobs or ()) == 2 for score in scores)


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda c: c.chat("tinyllama", FRANCE), 404),
        (lambda c: c.generate("nobody", "x"), 404),
        (lambda c: c.show("tinyllama"), 404),
        (lambda c: c.embed(MODEL, "x"), 404),
        (lambda c: c.embed(f"{MODEL}-mini", "x"), 400),
        (lambda c: c.chat(EMBEDDER, FRANCE), 400),
        (lambda c: c.generate(MODEL, "x", images=["aGk="]), 400),
        (lambda c: c.generate(MODEL, "x", options={"temperature": "hot"}), 400),
        (lambda c: c.chat(MODEL, FRANCE, format={"type": "array", "uniqueItems": True}), 400),
        (lambda c: c.generate(MODEL, "x", suffix="y"), 400),
    ],
    ids=[
        "internal",
        "unknown",
        "shown",
        "embeds",
        "chats-only",
        "chats",
        "images",
        "bad-option",
        "format",
        "suffix",
    ],
)
async def test_ollama_raises_its_own_exception(llama: ollama.AsyncClient, call: Any, status: int):
    with pytest.raises(ollama.ResponseError) as caught:
        await call(llama)
    assert caught.value.status_code == status
    assert caught.value.error


# ---- Anthropic's API


async def test_a_message_is_streamed_as_it_would_have_been_whole(web: httpx.AsyncClient):
    body = {"model": MODEL, "max_tokens": 100, "messages": FRANCE, "stop_sequences": [" Paris", " Berlin"]}
    whole = (await web.post("/v1/messages", json=body, headers={"X-Priority": "high"})).json()
    assert whole["content"] == [{"type": "text", "text": "The capital of France is"}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", " Paris")
    assert whole["headrace"]["priority"] == "high"
    async with web.stream("POST", "/v1/messages", json={**body, "stream": True}) as response:
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(each["delta"]["text"] for each in events if each["type"] == "content_block_delta")
    ended = events[-2]
    assert (text, ended["delta"]["stop_sequence"]) == ("The capital of France is", " Paris")
    counted = (await web.post("/v1/messages/count_tokens", json=body)).json()
    for usage in (ended["usage"], whole["usage"]):
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"] > 0


async def test_a_message_calls_a_tool_and_answers_with_its_result(web: httpx.AsyncClient):
    tool = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "tools": [tool], "messages": ASK_WEATHER}
    called = (await web.post("/v1/messages", json=body)).json()
    assert called["stop_reason"] == "tool_use"
    [use] = [block for block in called["content"] if block["type"] == "tool_use"]
    assert (use["name"], use["input"]) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "18 degrees"}
    turns = [{"role": "assistant", "content": called["content"]}, {"role": "user", "content": [result]}]
    answer = await web.post("/v1/messages", json={**body, "messages": ASK_WEATHER + turns})
    assert answer.status_code == 200
    assert answer.json()["stop_reason"] in ("end_turn", "tool_use")


# ---- the queue


async def test_an_answer_that_is_not_waited_for_is_read_later_from_anywhere(web: httpx.AsyncClient):
    body = chat("Count from 1 to 20.", stream=True, temperature=0)
    accepted = await web.post("/v1/chat/completions", json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    assert accepted.headers["location"] == accepted.json()["url"]
    events = events_of((await web.get(accepted.json()["events_url"])).text)
    messages = [data for _, data in events]
    assert messages[-1]["object"] == "chat.completion"
    assert joined(messages) == text_of(messages[-1])

    middle = events[len(events) // 2][0]
    headers = {"Last-Event-ID": str(middle)}
    rest = await web.get(accepted.json()["events_url"], headers=headers)
    assert events_of(rest.text) == [event for event in events if event[0] > middle]
    headers = {"Last-Event-ID": str(events[-1][0])}
    assert (await web.get(accepted.json()["events_url"], headers=headers)).status_code == 204

    state = (await web.get(accepted.json()["url"])).json()
    assert state["state"] == "finished"
    assert state["answer"] == messages[-1]


async def test_the_same_idempotency_key_is_one_request(web: httpx.AsyncClient, asker: Asker):
    headers = {"Idempotency-Key": "http-twice"}
    bodies = [
        (await web.post("/v1/chat/completions", json=chat("Tell me a story.", max_tokens=20), headers=headers)).json()
        for _ in range(2)
    ]
    assert bodies[0] == bodies[1]
    assert bodies[0]["id"] == "http-twice"
    # What the gateway has heard, this listener may hear a moment later.
    await asker.answer("http-twice")
    await flushed(asker.nc)
    assert asker.lasts("http-twice") == 1


async def test_a_key_that_cannot_be_an_id_makes_two_calls_one_request(web: httpx.AsyncClient):
    for given in ("a b.c", "LLM-1", "x" * 200):
        headers = {"Idempotency-Key": given}
        calls = [web.post("/v1/chat/completions", json=chat("What is 2 + 3?"), headers=headers) for _ in range(2)]
        first, second = [(await call).json() for call in calls]
        assert first == second
        assert first["id"] != given


async def test_nobody_knows_a_request_that_was_never_made(web: httpx.AsyncClient):
    for method, path in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
        answer = await web.request(method, f"/queue/requests/never{path}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"]


async def test_statistics_over_http_are_those_of_the_bus(web: httpx.AsyncClient, asker: Asker):
    over_http = (await web.get("/queue/stats")).json()
    over_bus = await asker.request("llm.queue.stats")
    assert over_http.keys() == over_bus.keys()
    assert over_http["high"].keys() == over_bus["high"].keys()


async def test_load_is_streamed(web: httpx.AsyncClient):
    async with web.stream("GET", "/load") as response, asyncio.timeout(20):
        assert response.headers["content-type"].startswith("text/event-stream")
        engines = set()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                load = json.loads(line.removeprefix("data: "))
                assert load["object"] == "headrace.load"
                engines.add(load["engine"])
            if engines == {"mlx", "ollama"}:
                break


async def test_it_says_how_it_is(web: httpx.AsyncClient):
    assert (await web.get("/healthz")).json() == {"status": "ok"}
    assert (await web.get("/readyz")).json()["status"] == "ready"
    metrics = (await web.get("/metrics")).text
    assert 'headrace_requests_total{priority="high",outcome="done"}' in metrics
    assert 'headrace_http_first_byte_seconds_bucket{kind="probes",le="+Inf"}' in metrics


async def test_no_page_calls_another_host(web: httpx.AsyncClient):
    for page in ("/", "/docs"):
        text = (await web.get(page)).text
        assert "default-src 'none'" in (await web.get(page)).headers["content-security-policy"]
        assert "http://" not in text
        assert "https://" not in text


async def test_what_is_not_served_is_refused_in_the_dialect(web: httpx.AsyncClient):
    assert (await web.get("/v1/nothing")).json()["error"]["code"] == "invalid_request"
    assert isinstance((await web.get("/api/nothing")).json()["error"], str)
    answer = await web.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


async def test_a_page_from_elsewhere_cannot_use_an_open_gateway(web: httpx.AsyncClient):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        answer = await web.post("/v1/chat/completions", json=chat("x"), headers=headers)
        assert answer.status_code == 403
    local = await web.get("/v1/models", headers={"Origin": "http://localhost:3000"})
    assert local.status_code == 200


async def test_a_trace_goes_on_into_the_request(web: httpx.AsyncClient, asker: Asker):
    headers: asyncio.Queue[dict[str, str]] = asyncio.Queue()

    async def on_stored(message: Any) -> None:
        await headers.put(message.headers)

    await asker.nc.subscribe("llm.queued.>", cb=on_stored)
    await flushed(asker.nc)
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    sent = {"traceparent": trace, "X-Request-Timeout": "30", "Idempotency-Key": "traced", "X-Priority": "high"}
    await web.post("/v1/chat/completions", json=chat("What is the capital of France?"), headers=sent)
    async with asyncio.timeout(10):
        while (stored := await headers.get())["Nats-Msg-Id"] != "traced":
            pass
    assert stored["traceparent"] == trace
    assert stored["Llm-Timeout"] == "30"
    assert stored["Nats-Subject"] == "llm.request.high"


# ---- clients that go away


async def test_a_waiting_request_whose_client_goes_away_is_taken_back(simulated: Pipeline):
    async with asking(simulated.url) as asker, httpx.AsyncClient(base_url=simulated.http) as web:
        headers = {"Idempotency-Key": "impatient", "X-Priority": "low"}
        with contextlib.suppress(httpx.ReadTimeout):
            await web.post("/v1/chat/completions", json=chat("x"), headers=headers, timeout=httpx.Timeout(5, read=0.05))
        last = await asker.answer("impatient")
        assert last["object"] == "chat.completion" or last["error"]["code"] == "cancelled"


async def test_a_gateway_that_is_killed_loses_no_request_and_its_client_reads_on(tmp_path: Path):
    options = ("--engine", "simulated", "--simulated-answer-tokens", "60", "--simulated-tokens-per-s", "160")
    with running(tmp_path, *options, *ALONE) as pipeline:
        async with asking(pipeline.url) as asker, httpx.AsyncClient(base_url=pipeline.http, timeout=60) as web:
            with pytest.raises(httpx.TransportError):
                await read_some_and_kill(pipeline, web)
            last = await asker.answer("survivor")
            assert last["headrace"]["attempts"] == 1

            async def read_again() -> str:
                with contextlib.suppress(httpx.TransportError):
                    found = await web.get("/queue/requests/survivor/events")
                    # A gateway that has just started may not have heard of a monitor yet.
                    return found.text if found.status_code == 200 else ""
                return ""

            events = [data for _, data in events_of(await eventually(read_again))]
            assert events[-1] == last
            assert joined(events) == text_of(last)


async def read_some_and_kill(pipeline: Pipeline, web: httpx.AsyncClient) -> None:
    """Read the first words of an answer, then have the gateway killed; raises as the client does."""
    headers = {"Idempotency-Key": "survivor"}
    body = chat("on and on", stream=True)
    async with web.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        read = 0
        async for _ in response.aiter_lines():
            read += 1
            if read == 5:
                pipeline.kill("gateway")
