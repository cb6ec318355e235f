"""The load of one run: requests of every kind, drawn from one seed and published at a steady mean rate."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

from bench.chaos.client import Client, Refused
from bench.chaos.ledger import Entry
from consumers.standin.embedding import EMBEDDER, embedding
from pipeline.aio import Background, wait_set

PRIORITIES = ("high", "medium", "low")
PROMPTS = (
    "Count from 1 to 100.",
    "Tell me a story.",
    "What is the capital of France?",
    "Explain step by step why the square root of two is irrational, and write a Python function that checks it.",
    "Считай от 1 до 60.",
)
_POISONS = ("[[fault:segfault@3]]", "[[fault:abort@2]]", "[[fault:raise@4]]")
_CANCELLED = frozenset({"cancelled"})
_EXPIRED = frozenset({"deadline_exceeded"})
_BURIED = frozenset({"engine_failed"})
_UNDISTURBED_S = 60.0
# These come and go, so that the consumers of their lanes do too.
TENANTS = tuple(f"team-{number}" for number in range(12))
_TENANTS_SHARE = 0.4


@dataclass(slots=True)
class Load:
    """Publishes requests until it is stopped.

    Attributes:
        undisturbed: the answer to each seeded prompt, from before the first fault.
    """

    client: Client
    draw: random.Random
    rate_per_s: float
    max_tokens: int
    poison_share: float = 0.01
    undisturbed: dict[str, str] = field(default_factory=dict)
    _number: int = 0
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _publishing: Background = field(default_factory=Background)

    async def learn_undisturbed(self) -> None:
        """Get the answer to each seeded prompt once, without faults."""
        entries = {}
        for prompt in PROMPTS:
            entry = self._entry("calm", streams=True)
            # Only MLX answers requests in the complex lanes.
            await self.client.publish(entry, "llm.request.high.complex", self._body(prompt, entry, seeded=True), {})
            entries[prompt] = entry
        async with asyncio.timeout(_UNDISTURBED_S):
            while any(not entry.record or not entry.lasts for entry in entries.values()):
                await asyncio.sleep(0.05)
                await self.client.read_record()
        for prompt, entry in entries.items():
            self.undisturbed[prompt] = entry.lasts[0]["choices"][0]["message"]["content"]

    def stop(self) -> None:
        """Stop publishing."""
        self._over.set()

    async def run(self, seconds: float) -> None:
        """Publish for some seconds, or until stopped. Then wait until every request is accepted or refused."""
        give_up_at = time.monotonic() + seconds
        while time.monotonic() < give_up_at and not self._over.is_set():
            self._publishing.start(self._one(), what="publishing a request")
            await wait_set(self._over, self.draw.expovariate(self.rate_per_s))
        self._over.set()
        await self._publishing.join()

    async def publish_one(self, kind: str) -> Entry:
        """Publish one streamed request of a kind to a lane that only MLX serves."""
        entry = self._entry(kind, streams=True)
        body = self._body(PROMPTS[0], entry, seeded=False)
        await self.client.publish(entry, "llm.request.high.complex", body, {})
        return entry

    async def _one(self) -> None:
        draw = self.draw
        kind = draw.choices(
            ("plain", "inbox", "cancelled", "deadline", "duplicate", "nameless", "embedding", "ask", "poison"),
            (50, 15, 8, 6, 8, 5, 5, 3, 100 * self.poison_share),
        )[0]
        priority = draw.choice(PRIORITIES)
        if kind == "ask":
            await self.client.ask(priority, draw.choice(PROMPTS))
            return
        prompt = draw.choice(PROMPTS)
        seeded = draw.random() < 0.5
        # The broker names requests without an ID, so these are of no tenant.
        tenant = draw.choice(TENANTS) if kind != "nameless" and draw.random() < _TENANTS_SHARE else ""
        entry = self._entry(kind, streams=draw.random() < 0.7, tenant=tenant)
        if seeded and kind != "poison":
            entry.expected = self.undisturbed.get(prompt)
        if kind == "poison":
            prompt += draw.choice(_POISONS)
        body = self._body(prompt, entry, seeded=seeded)
        if kind == "embedding":
            texts = draw.sample(PROMPTS, 2)
            entry.streams, entry.expected = False, [embedding(text) for text in texts]
            body = json.dumps({"model": EMBEDDER, "input": texts}).encode()
        subject = f"llm.request.{priority}" + (tenant and f".t.{tenant}") + draw.choice(("", "", ".complex"))
        try:
            await self._publish(kind, entry, subject, body)
        except Refused as refusal:
            self.client.ledger.refused[str(refusal)] += 1

    async def _publish(self, kind: str, entry: Entry, subject: str, body: bytes) -> None:
        client, draw = self.client, self.draw
        if kind == "nameless":
            await client.publish_nameless(entry, subject, body)
            return
        headers = {"Llm-Timeout": f"{draw.uniform(0.3, 8):.2f}"} if kind == "deadline" else {}
        pause_s = draw.choice((0.0, draw.uniform(0, 2)))
        again_s = draw.choice((0.05, draw.uniform(0, 3), draw.uniform(5, 40)))
        await client.publish(entry, subject, body, headers)
        if kind == "cancelled":
            await asyncio.sleep(pause_s)
            await client.cancel(entry.id)
        if kind == "duplicate":
            await wait_set(self._over, again_s)
            await client.store(subject, body, {"Nats-Msg-Id": entry.id})

    def _entry(self, kind: str, *, streams: bool, tenant: str = "") -> Entry:
        self._number += 1
        may_end = {"cancelled": _CANCELLED, "deadline": _EXPIRED, "poison": _BURIED}.get(kind, frozenset())
        inbox: list[bytes] | None = [] if kind == "inbox" else None
        name = (tenant and f"t.{tenant}.") + f"{kind}-{self._number}"
        return Entry(name, kind, streams, 0.0, may_end=may_end, inbox=inbox)

    def _body(self, prompt: str, entry: Entry, *, seeded: bool) -> bytes:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0.8,
            "stream": entry.streams,
        }
        if seeded:
            body["seed"] = 7
        return json.dumps(body).encode()
