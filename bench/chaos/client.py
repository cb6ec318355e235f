"""A client that only uses NATS and JSON. It publishes requests, and reads their answers live and from the stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Self

import nats
import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bench.chaos.ledger import Entry, Kept, Ledger
from bench.running import flushed

_PATIENCE_S = 30.0
_TRY_S = 2.0
_PAUSE_S = 0.2
_BATCH = 500


class Refused(Exception):
    """The broker refused the request, or did not acknowledge it in time. It was not accepted."""


class Client:
    """The publisher and reader of a run.

    Attributes:
        started: the number of `started` events, by request id.
        cancelled_in_queue: the ids of requests with a `cancelled` event that names no engine.
        load_at: the time of the last load event, unix seconds.
        workers_at: the time of each worker's last status, by process id, unix seconds.
        slots_used: the used slots in that status, by process id.
        cancels: the answers to cancels, by state.
        asks: the results of core requests. They are not in the ledger, because they are never acknowledged.
    """

    def __init__(self, nc: Nats, ledger: Ledger) -> None:
        self.nc = nc
        self.ledger = ledger
        self.started: Counter[str] = Counter()
        self.cancelled_in_queue: set[str] = set()
        self.load_at = 0.0
        self.cancels: Counter[str] = Counter()
        self.asks: Counter[str] = Counter()
        self._live: dict[str, list[bytes]] = {}
        self._records: dict[str, list[Kept]] = {}
        self._inboxes: dict[str, list[bytes]] = {}
        self.workers_at: dict[int, float] = {}
        self.slots_used: dict[int, int] = {}
        self._prefix = ""
        self._next_sequence = 1
        self._reading = asyncio.Lock()

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str, ledger: Ledger) -> AsyncIterator[Self]:
        """Connect, and listen for the duration of the block."""

        async def quiet(_: Exception) -> None:
            """Ignore the error: outages are part of the run."""

        nc = await nats.connect(
            url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, ping_interval=2, error_cb=quiet, name="chaos"
        )
        try:
            client = cls(nc, ledger)
            client._prefix = nc.new_inbox()
            await nc.subscribe("llm.reply.>", cb=client._on_reply)
            await nc.subscribe(f"{client._prefix}.*", cb=client._on_inbox)
            await nc.subscribe("llm.event.*.started", cb=client._on_started)
            await nc.subscribe("llm.event.*.cancelled", cb=client._on_cancelled)
            await nc.subscribe("llm.worker.*", cb=client._on_worker)
            await nc.subscribe("llm.load.mlx", cb=client._on_load)
            await flushed(nc)
            yield client
        finally:
            await nc.close()

    # ---- publishing

    async def publish(self, entry: Entry, subject: str, body: bytes, headers: dict[str, str]) -> None:
        """Publish until the broker acknowledges the request, and enter it in the ledger.

        Raises:
            Refused: the broker did not acknowledge it.
        """
        if entry.inbox is not None:
            inbox = f"{self._prefix}.{entry.id.replace('.', '-')}"
            headers = {**headers, "Reply-To": inbox}
            self._inboxes[inbox] = entry.inbox
        self._open(entry)
        await self.store(subject, body, {"Nats-Msg-Id": entry.id, **headers})
        entry.accepted_at = time.time()
        self.ledger.entries[entry.id] = entry

    async def publish_nameless(self, entry: Entry, subject: str, body: bytes) -> None:
        """Publish once, without an id, so that the broker assigns one. A retry could store the request twice."""
        answer = await self._try(subject, body, {})
        if answer is None or "seq" not in answer:
            raise Refused(str(answer))
        entry.id = f"LLM-{answer['seq']}"
        entry.accepted_at = time.time()
        self._open(entry)
        self.ledger.entries[entry.id] = entry

    async def store(self, subject: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        """Publish with retries, which the id in the headers makes safe. Returns the acknowledgement."""
        give_up_at = time.monotonic() + _PATIENCE_S
        while time.monotonic() < give_up_at:
            answer = await self._try(subject, body, headers)
            if answer is not None and "seq" in answer:
                return answer
            if answer is not None and answer.get("error", {}).get("err_code") == 10077:
                raise Refused("lane full")
            await asyncio.sleep(_PAUSE_S)
        raise Refused("no acknowledgement")

    async def _try(self, subject: str, body: bytes, headers: dict[str, str]) -> dict[str, Any] | None:
        try:
            message = await self.nc.request(subject, body, timeout=_TRY_S, headers=headers or None)
        except (nats.errors.Error, TimeoutError):
            return None
        return json.loads(message.data) if message.data else None

    async def cancel(self, request_id: str) -> str:
        """Send a cancel. Returns the state in the answer, or `unheard`."""
        answer = await self._try(f"llm.cancel.{request_id}", b"", {})
        state = str(answer["state"]) if answer else "unheard"
        self.cancels[state] += 1
        return state

    async def ask(self, priority: str, text: str) -> None:
        """Send a core request, which the gateway puts on the queue."""
        try:
            answer = json.loads((await self.nc.request(f"llm.ask.{priority}", text.encode(), timeout=30)).data)
        except (nats.errors.Error, TimeoutError):
            self.asks["unheard"] += 1
        else:
            self.asks["answered" if answer["object"] == "chat.completion" else answer["error"]["code"]] += 1

    # ---- reading

    async def read_record(self) -> None:
        """Read the messages that `LLM_REPLIES` has stored since the last call, as a late reader does."""
        async with self._reading:
            await self._read_on()

    async def _read_on(self) -> None:
        while True:
            batch = await self._batch(self._next_sequence)
            for message in batch:
                headers = message.headers or {}
                sequence = int(headers["Nats-Sequence"])
                self._next_sequence = sequence + 1
                at = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
                request_id = headers["Nats-Subject"].removeprefix("llm.reply.")
                self._records.setdefault(request_id, []).append(Kept(sequence, at, message.data))
            if len(batch) < _BATCH:
                return

    async def _batch(self, start: int) -> list[Msg]:
        """Messages of the stream from a sequence on, in one request (NATS ADR-31). Empty while the broker is away."""
        inbox = self.nc.new_inbox()
        found: list[Msg] = []
        try:
            subscription = await self.nc.subscribe(inbox)
            body = json.dumps({"seq": start, "next_by_subj": "llm.reply.>", "batch": _BATCH}).encode()
            await self.nc.publish("$JS.API.DIRECT.GET.LLM_REPLIES", body, reply=inbox)
            while True:
                message = await subscription.next_msg(_TRY_S)
                if "Nats-Sequence" not in (message.headers or {}):
                    break
                found.append(message)
            await subscription.unsubscribe()
        except (nats.errors.Error, TimeoutError):
            pass
        return found

    async def left_in(self, stream: str) -> int:
        """The number of messages in a stream, or -1 if the broker does not answer."""
        answer = await self._try(f"$JS.API.STREAM.INFO.{stream}", b"", {})
        return int(answer["state"]["messages"]) if answer else -1

    def _open(self, entry: Entry) -> None:
        """Connect the entry with the messages under its id, past and future."""
        entry.live = self._live.setdefault(entry.id, [])
        entry.record = self._records.setdefault(entry.id, [])

    async def _on_reply(self, message: Msg) -> None:
        self._live.setdefault(message.subject.removeprefix("llm.reply."), []).append(message.data)

    async def _on_inbox(self, message: Msg) -> None:
        if (inbox := self._inboxes.get(message.subject)) is not None:
            inbox.append(message.data)

    async def _on_started(self, message: Msg) -> None:
        self.started[json.loads(message.data)["id"]] += 1

    async def _on_cancelled(self, message: Msg) -> None:
        event = json.loads(message.data)
        if event.get("engine") is None:
            self.cancelled_in_queue.add(event["id"])

    async def _on_worker(self, message: Msg) -> None:
        pid = int(message.subject.rpartition("-")[2])
        self.workers_at[pid] = time.time()
        self.slots_used[pid] = json.loads(message.data)["slots"]["used"]

    async def _on_load(self, _: Msg) -> None:
        self.load_at = time.time()
