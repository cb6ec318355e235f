"""`headrace bench`: how fast the running pipeline answers, one request after another and several at once."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from pipeline.broker.asker import Asker, Outgoing
from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, tell
from pipeline.commands.holding import cancelled_if_interrupted
from pipeline.process.terminal import visible
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Chunk, Completion, ErrorAnswer
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Lane, Priority, Task

_PROMPT = "Tell me a story about a river."


class Benchmark(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent: so many requests, one after another, then all at once."""

    requests: int = 8
    priority: str = "medium"
    model: str | None = None
    max_tokens: int = 64

    def outgoing(self) -> Outgoing:
        """One request, under an id of its own. Temperature 0, so that its answer does not vary."""
        fields = {"prompt": _PROMPT, "model": self.model, "max_tokens": self.max_tokens, "temperature": 0}
        body = msgspec.json.encode(
            {key: value for key, value in (fields | {"stream": True}).items() if value is not None}
        )
        # The engine that a class would choose is no part of what is measured.
        subject = Lane(Priority(self.priority), Task.COMPLEX).subject
        return Outgoing(f"bench-{secrets.token_hex(8)}", subject, body, {})


class Measured(NamedTuple):
    """One answer: seconds until its first text and its end, its tokens, and the engine."""

    first_s: float
    whole_s: float
    tokens: int
    engine: str


def bench(benchmark: Benchmark, url: str) -> int:
    """Measure and print. Return 0, or 1 after an error."""
    return run_client(partial(_bench, benchmark), url, name="headrace bench")


async def _bench(benchmark: Benchmark, bus: Bus) -> int:
    asker = Asker(bus, Tracing())
    try:
        began_at = time.perf_counter()
        alone = [await _ask(asker, benchmark) for _ in range(benchmark.requests)]
        alone_s, began_at = time.perf_counter() - began_at, time.perf_counter()
        together = await asyncio.gather(*(_ask(asker, benchmark) for _ in range(benchmark.requests)))
        together_s = time.perf_counter() - began_at
    except HeadraceError as error:
        tell(f"headrace: {error.code}: {error.message}")
        return 1
    say(f"{benchmark.requests} requests at {benchmark.priority}, up to {benchmark.max_tokens} tokens each\n")
    say(f"{'':<20} {'first text p50':>15} {'longest':>9} {'whole p50':>10} {'tokens/s':>9}  engine")
    say(_row("one after another", alone, alone_s))
    say(_row("all at once", together, together_s))
    return 0


async def _ask(asker: Asker, benchmark: Benchmark) -> Measured:
    """Send one request and read its answer.

    Raises:
        HeadraceError: it was refused, or ended with an error.
    """
    began_at, first_s = time.perf_counter(), 0.0
    request = benchmark.outgoing()
    async with await asker.submit(request) as record, cancelled_if_interrupted(asker, request.name):
        while True:
            answer = (await record.next()).answer
            passed_s = time.perf_counter() - began_at
            if isinstance(answer, Chunk) and answer.choices[0].delta.says and not first_s:
                first_s = passed_s
            if isinstance(answer, ErrorAnswer):
                raise HeadraceError(answer.error.code, answer.error.message)
            if isinstance(answer, Completion):
                engine = f"{answer.headrace.engine} ({answer.model})"
                return Measured(first_s or passed_s, passed_s, answer.usage.completion_tokens, engine)


def _row(name: str, answers: Sequence[Measured], took_s: float) -> str:
    first = [answer.first_s for answer in answers]
    whole = statistics.median(answer.whole_s for answer in answers)
    rate = sum(answer.tokens for answer in answers) / took_s
    engines = visible(", ".join(sorted({answer.engine for answer in answers})))
    return f"{name:<20} {statistics.median(first):13.2f} s {max(first):7.2f} s {whole:8.2f} s {rate:9.1f}  {engines}"
