"""The lists of models over HTTP: what workers tell of their models, and the name that stands for any of them."""

from __future__ import annotations

from typing import Any

import pytest
from httpx import AsyncClient

from pipeline.broker.jetstream import Bus
from pipeline.wire.messages import ModelFacts, PerPriorityCount, Slots, WorkerStatus, encode
from tests.pipeline.gateway.conftest import Serve
from tests.waiting import eventually

NONE = PerPriorityCount()
BIG = ModelFacts(["completion", "tools", "thinking"], 32_768, "qwen3", size_bytes=7, digest="d", loaded=True)
OLD = "old:latest"  # of a worker that tells no facts


async def told(bus: Bus, client: AsyncClient) -> dict[str, Any]:
    """The list, once both workers are heard."""
    facts = {"big:latest": BIG, "cold:latest": ModelFacts(["completion"], 4096)}
    for status in (
        WorkerStatus("a", "ollama", "ready", list(facts), Slots(0, 1), NONE, 0, 0, 0, 0, 0, at=0.0, facts=facts),
        WorkerStatus("b", "mlx", "ready", [OLD], Slots(0, 1), NONE, 0, 0, 0, 0, 0, at=0.0, tool_models=[OLD]),
    ):
        await bus.publish(f"llm.worker.{status.worker}", encode(status))

    async def heard() -> dict[str, Any] | None:
        listed: dict[str, Any] = (await client.get("/api/tags")).json()
        return listed if len(listed.get("models", ())) == 4 else None

    found = await eventually(heard)
    assert found is not None
    return found


async def test_ollamas_lists_have_what_the_workers_tell(serve: Serve, bus: Bus) -> None:
    async with serve() as client:
        models = {entry["name"]: entry for entry in (await told(bus, client))["models"]}
        assert list(models) == [OLD, "big:latest", "cold:latest", "auto"]
        assert (models["big:latest"]["size"], models["big:latest"]["digest"]) == (7, "d")
        assert models[OLD]["capabilities"] == ["completion", "tools"]
        loaded = (await client.get("/api/ps")).json()["models"]
        assert [(entry["name"], entry["context_length"]) for entry in loaded] == [("big:latest", 32_768)]
        shown = (await client.post("/api/show", json={"model": "big"})).json()
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
        assert shown["model_info"]["qwen3.context_length"] == 32_768
        assert [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]] == list(models)


async def test_any_model_is_shown_as_the_one_that_answers_first(serve: Serve, bus: Bus) -> None:
    async with serve() as client:
        await told(bus, client)
        for name in ("auto", "auto:latest"):
            shown = (await client.post("/api/show", json={"name": name})).json()
            assert shown["capabilities"] == ["completion", "tools"]
        assert (await client.get("/v1/models/auto")).json()["id"] == "auto"


@pytest.mark.parametrize("model", ["auto", "auto:latest", "big", ""])
async def test_a_request_for_nothing_loads_any_model_too(serve: Serve, bus: Bus, model: str) -> None:
    async with serve() as client:
        await told(bus, client)
        for path, body in (("/api/generate", {}), ("/api/chat", {"messages": []})):
            response = await client.post(path, json={"model": model, **body})
            assert (response.status_code, response.json().get("done_reason")) == (200, "load")
        assert (await client.post("/api/generate", json={"model": "other"})).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}),
        ("/api/generate", {"prompt": "x"}),
        ("/api/show", {}),
        ("/api/pull", {}),
    ],
)
async def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason(
    serve: Serve, bus: Bus, path: str, body: dict[str, Any]
) -> None:
    async with serve() as client:
        await told(bus, client)
        failed = {"broken": "its file is incomplete."}
        await bus.publish(
            "llm.worker.b",
            encode(
                WorkerStatus("b", "mlx", "ready", [OLD], Slots(0, 1), NONE, 0, 0, 0, 0, 0, at=0.0, cannot_load=failed)
            ),
        )

        async def refused() -> bool:
            return (await client.get("/v1/models/broken")).status_code == 503

        await eventually(refused)
        said = await client.post(path, json={"model": "broken", **body})
        assert said.status_code == 503
        assert 'Model \\"broken\\" cannot be loaded: its file is incomplete.' in said.text
        assert "unavailable" in said.text
        listed = [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]
        assert listed == [OLD, "big:latest", "cold:latest", "auto"]
