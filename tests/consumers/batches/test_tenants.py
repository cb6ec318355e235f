"""A batch belongs to its tenant: its lines, files and results. It needs no gateway while it runs."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager

import msgspec
import pytest

from pipeline.gateway.identity import make_key
from pipeline.wire.subjects import STREAM_REPLIES, STREAM_REQUESTS
from tests.consumers.batches.conftest import CHAT, line, names
from tests.pipeline.gateway.conftest import serve
from tests.pipeline.worker.conftest import ScriptedEngine, start
from tests.waiting import eventually

__all__ = ["serve", "start"]  # fixtures

ACME_SECRET, ACME = make_key("alice")
BOLT_SECRET, BOLT = make_key("bob")
KEYS = [msgspec.structs.replace(ACME, tenant="acme"), msgspec.structs.replace(BOLT, tenant="bolt")]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def created(client, headers, *lines: bytes):
    file = await client.post(
        "/v1/files", files={"file": ("in.jsonl", b"\n".join(lines))}, data={"purpose": "batch"}, headers=headers
    )
    body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    answer = await client.post("/v1/batches", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


@asynccontextmanager
async def answering(worker):
    """Answer what the worker's engine has, as it comes, as long as `goes_on` is set."""
    goes_on = asyncio.Event()
    goes_on.set()

    async def answer() -> None:
        served = 0
        while True:
            await goes_on.wait()
            if served < len(worker.engine.submitted):
                worker.engine.submitted[served].finish("ok")
                served += 1
            await asyncio.sleep(0.002)

    task = asyncio.create_task(answer())
    try:
        yield goes_on
    finally:
        task.cancel()


async def test_the_lines_of_a_tenant_s_batch_are_on_its_lane_and_its_files_are_its_own(
    serve, batches, monitor, bus, start
):
    await monitor()
    await batches()
    acme, bolt = bearer(ACME_SECRET), bearer(BOLT_SECRET)
    async with serve(http_keys=KEYS) as client:
        batch = await created(client, acme, *map(line, names(5)))

        async def subjects() -> Counter[str]:
            return Counter([m.headers["Nats-Subject"] async for m in bus.scan(STREAM_REQUESTS, "llm.request.>")])

        async def fed() -> bool:
            return await subjects() == {"llm.request.low.t.acme": 5}

        await eventually(fed, what="the lines are queued")
        worker = await start(ScriptedEngine(slots=4))
        async with answering(worker):

            async def ended() -> dict:
                shown = (await client.get(f"/v1/batches/{batch['id']}", headers=acme)).json()
                return shown if shown["status"] == "completed" else {}

            shown = await eventually(ended, what="the batch has ended", every_s=0.05)
        assert {run.work.tenant for run in worker.engine.submitted} == {"acme"}
        output = f"/v1/files/{shown['output_file_id']}/content"
        rows = [json.loads(row) for row in (await client.get(output, headers=acme)).text.splitlines()]
        assert {row["custom_id"] for row in rows} == set(names(5))
        for path in (f"/v1/batches/{batch['id']}", output, f"/v1/files/{batch['input_file_id']}"):
            assert (await client.get(path, headers=bolt)).status_code == 404
        assert (await client.post(f"/v1/batches/{batch['id']}/cancel", headers=bolt)).status_code == 404
        for path in ("/v1/batches", "/v1/files"):
            assert (await client.get(path, headers=bolt)).json()["data"] == []


@pytest.mark.parametrize("keys", [[], KEYS], ids=["default tenant", "tenant"])
async def test_a_gateway_that_is_away_for_longer_than_answers_are_kept_loses_no_line(
    serve, batches, monitor, desk, start, keys
):
    await monitor()
    role = await batches(batch_lines=4)
    headers = bearer(ACME_SECRET) if keys else {}
    async with serve(http_keys=keys) as client:
        batch = await created(client, headers, *map(line, names(24)))
    order = await desk.store.order(batch["id"])
    worker = await start(ScriptedEngine(slots=2))
    async with answering(worker) as goes_on:

        async def completed() -> int:
            return (await desk.state(order)).request_counts.completed

        for written in (6, 12, 18):

            async def reached(written: int = written) -> bool:
                return await completed() >= written

            await eventually(reached, what=f"{written} results")
            goes_on.clear()
            await settled(worker, completed)
            # As ten minutes do it.
            await desk.bus.purge(STREAM_REPLIES, ">", up_to=10_000_000)
            if written == 12:
                await role.kill()
                await batches(batch_lines=4)
            goes_on.set()
        await desk.ended(order)
    await desk.bus.purge(STREAM_REPLIES, ">", up_to=10_000_000)
    async with serve(http_keys=keys) as client:
        shown = (await client.get(f"/v1/batches/{batch['id']}", headers=headers)).json()
        assert shown["request_counts"] == {"total": 24, "completed": 24, "failed": 0}
        text = (await client.get(f"/v1/files/{shown['output_file_id']}/content", headers=headers)).text
    assert Counter(json.loads(row)["custom_id"] for row in text.splitlines()) == dict.fromkeys(names(24), 1)


async def settled(worker, completed) -> None:
    """What the engine has been told to finish has been answered, and the answers have been read."""

    async def read() -> bool:
        answered = len(worker.engine.submitted) - len(worker.worker._jobs)
        return worker.worker._jobs.unstored == 0 and await completed() == answered

    await eventually(read, what="the answers are stored and read")
