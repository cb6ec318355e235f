"""What priorities, preemption and traces cost in throughput: the same requests with all of them and with none.

    python -m bench.overhead [--model DIR] [--repeats N]

LOW and MEDIUM requests arrive at once, and a HIGH question every two seconds while they run. `all` sends them to the
three lanes, with preemption, and traces one request in ten. `none` sends all of them to LOW at the same times, with
preemption and traces off. The two take turns; each run has a pipeline of its own. All answers are of one length, so the
slots run empty at the end in the same way, whatever came last.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx

from bench.bare import PROMPTS, default_model
from bench.running import ALONE, up

_TOKENS = 48
_SAMPLED = "0.1"
_OTLP = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG")


class Asked(NamedTuple):
    """A request: when it is sent, and its priority."""

    after_s: float
    priority: str


LOAD = (
    *(Asked(0.0, "low") for _ in range(24)),
    *(Asked(0.0, "medium") for _ in range(8)),
    *(Asked(1.0 + 2.0 * number, "high") for number in range(10)),
)


async def _run(url: str, *, lanes: bool) -> tuple[float, float]:
    """Tokens per second of all answers together, and the median of the seconds that a HIGH question took."""
    high: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:  # noqa: S113 - a model is slow

        async def one(number: int, asked: Asked) -> int:
            await asyncio.sleep(asked.after_s)
            body = {
                "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}],
                "max_tokens": _TOKENS,
                "temperature": 0,
            }
            headers = {"X-Priority": asked.priority if lanes else "low"}
            sent_at = time.perf_counter()
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            if asked.priority == "high":
                high.append(time.perf_counter() - sent_at)
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        await one(0, Asked(0.0, "low"))
        high.clear()
        began_at = time.perf_counter()
        counts = await asyncio.gather(*(one(number, asked) for number, asked in enumerate(LOAD)))
        return sum(counts) / (time.perf_counter() - began_at), statistics.median(high)


class _Collector(BaseHTTPRequestHandler):
    """Accepts spans, and keeps none."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def _traced(*, traced: bool) -> Iterator[None]:
    """The environment of a pipeline that traces one request in ten, or none."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        for name in _OTLP:
            os.environ.pop(name, None)
        if traced:
            url = f"http://127.0.0.1:{collector.server_port}"
            os.environ.update(zip(_OTLP, (url, "parentbased_traceidratio", _SAMPLED), strict=True))
        try:
            yield
        finally:
            collector.shutdown()


def main() -> int:
    """Returns 0: the ratio is printed."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: SmolLM2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    given = parser.parse_args()
    model = {"MODEL": str(given.model.resolve() if given.model else default_model())}
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for repeat in range(given.repeats):
        for everything in (False, True) if repeat % 2 else (True, False):
            settings = ALONE | model | ({} if everything else {"MAX_PREEMPTIONS": "0"})
            with (
                _traced(traced=everything),
                tempfile.TemporaryDirectory() as folder,
                up(Path(folder), settings) as here,
            ):
                found[everything].append(asyncio.run(_run(here["http"], lanes=everything)))
    rates = {everything: statistics.median(rate for rate, _ in runs) for everything, runs in found.items()}
    for everything, name in ((False, "none"), (True, "all")):
        waits = statistics.median(wait for _, wait in found[everything])
        each = ", ".join(f"{rate:.1f}" for rate, _ in found[everything])
        print(f"{name:<5} {rates[everything]:6.1f} tokens/s (runs: {each}); a HIGH answer takes {waits:.2f} s (median)")
    print(f"ratio {rates[True] / rates[False]:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
