"""What spilling gains: the same requests with the second engine and without it, and how soon a spill sets in.

    python -m bench.spill [--ollama-host URL] [--gguf FILE] [--model DIR] [--runs N] [--onsets N] [ROW ...]

`backlog`: eight simple requests arrive while MLX (simulated, so that it has cores of its own) has 23 s of work that
only it may do. `both`: 48 simple requests at once, for the same MLX. `shared`: 32 simple LOW requests on a real model,
with the second engine on the same cores. `onset`: bursts saturate the simulated MLX again and again. The second engine
is the Ollama server that is named, its model unloaded before a cold run and loaded before a warm one; or else llama.cpp
behind the stand-in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import nats

from bench.running import ALONE, flushed, process, up
from pipeline.wire.answers import Chunk, Completion, Status, decode_answer, is_last
from pipeline.wire.messages import Load
from pipeline.wire.subjects import LOAD, MSG_ID, reply_subject

ROWS = ("backlog", "both", "shared", "onset")
SIMULATED = {"ENGINE": "simulated", "SIMULATED_TOKENS_PER_S": "100", "SIMULATED_ANSWER_TOKENS": "1000", "SLOTS": "8"}
TOKENS = 64
BACKLOG = 24  # three rounds of all slots
BACKLOG_TOKENS = 96
_TIMEOUT_S = 600.0
_SAID = "Tell me a long story about a fox, number {}."


class Run:
    """The answers of one run. Times are monotonic seconds."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._stream = client.jetstream()
        self.sent_at: dict[str, float] = {}
        self.first_at: dict[str, float] = {}
        self.ended_at: dict[str, float] = {}
        self.last: dict[str, Any] = {}
        self.spilled: dict[str, str] = {}
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        """Read all answers from now on."""
        await self._client.subscribe(reply_subject("*"), cb=self._heard)
        await flushed(self._client)

    async def send(self, name: str, subject: str, tokens: int) -> None:
        """Store one request."""
        body = {"prompt": _SAID.format(random.randint(1, 10**6)), "stream": True, "max_tokens": tokens}
        self.sent_at[name] = time.monotonic()
        await self._stream.publish(subject, msgspec.json.encode(body), headers={MSG_ID: name}, timeout=30)

    async def _heard(self, message: Any) -> None:
        answer, now = decode_answer(message.data), time.monotonic()
        if isinstance(answer, Status) and answer.state == "spilled":
            self.spilled[answer.id] = answer.engine
        elif isinstance(answer, Chunk):
            self.first_at.setdefault(answer.id, now)
        elif is_last(answer):
            self.ended_at[answer.id], self.last[answer.id] = now, answer
            self._changed.set()

    async def ended(self, names: Sequence[str]) -> None:
        """Wait until all of these have ended."""
        async with asyncio.timeout(_TIMEOUT_S):
            while not self.ended_at.keys() >= set(names):
                self._changed.clear()
                await self._changed.wait()

    def engines(self, names: Sequence[str]) -> str:
        """How many of these each engine ended, and how many both wrote."""
        answers = [self.last[name] for name in names]
        whole = [answer for answer in answers if isinstance(answer, Completion)]
        mlx = sum(answer.headrace.engine == "mlx" for answer in whole)
        both = sum(answer.headrace.models is not msgspec.UNSET for answer in whole)
        failed = len(answers) - len(whole)
        return f"mlx {mlx}, other {len(whole) - mlx}, by both {both}" + (f", failed {failed}" if failed else "")


async def _backlog(url: str) -> tuple[float, str]:
    """Seconds from the first simple request to the last answer, and who answered."""
    client = await nats.connect(url)
    run = Run(client)
    await run.listen()
    work = [f"work-{number}" for number in range(BACKLOG)]
    simple = [f"simple-{number}" for number in range(8)]
    for name in work:
        await run.send(name, "llm.request.low.complex", BACKLOG_TOKENS)
    began_at = time.monotonic()
    for name in simple:
        await run.send(name, "llm.request.low.simple", TOKENS)
    await run.ended([*work, *simple])
    await client.close()
    return max(run.ended_at.values()) - began_at, run.engines(simple)


async def _simple(url: str, count: int) -> tuple[float, str]:
    """The same for simple requests that arrive at once."""
    client = await nats.connect(url)
    run = Run(client)
    await run.listen()
    names = [f"low-{number}" for number in range(count)]
    began_at = time.monotonic()
    await asyncio.gather(*(run.send(name, "llm.request.low.simple", TOKENS) for name in names))
    await run.ended(names)
    await client.close()
    return max(run.ended_at.values()) - began_at, run.engines(names)


async def _onsets(url: str, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the burst to the load event, and from the event to the first spilled token, for each onset."""
    client = await nats.connect(url)
    run, events, tokens = Run(client), [], []
    level: dict[str, Any] = {"now": "normal", "at": 0.0}

    async def on_load(message: Any) -> None:
        load = msgspec.json.decode(message.data, type=Load)
        if load.level == "saturated" != level["now"]:
            level["at"] = time.monotonic()
        level["now"] = load.level

    await client.subscribe(f"{LOAD}.mlx", cb=on_load)
    await run.listen()
    for onset in range(-2, count):  # the first two let the second engine show its speed
        names = [f"o{onset}-{number}" for number in range(24)]
        began_at = time.monotonic()
        await asyncio.gather(*(run.send(name, "llm.request.low.simple", 48) for name in names))
        await run.ended(names)
        firsts = [run.first_at[name] for name in names if name in run.spilled and name in run.first_at]
        while level["now"] != "normal":  # noqa: ASYNC110 - a benchmark may look again and again
            await asyncio.sleep(0.05)
        if onset >= 0 and firsts:
            events.append((level["at"] - began_at) * 1000)
            tokens.append((min(firsts) - level["at"]) * 1000)
    await client.close()
    return events, tokens


# ---- the second engine -----------------------------------------------------------------------------------------------


def _call(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data)  # noqa: S310 - an HTTP URL, given by the caller
    with urllib.request.urlopen(request, timeout=300) as response:  # noqa: S310 - as above
        found: dict[str, Any] = json.load(response)
    return found


def _model_of(url: str) -> str:
    return str(_call(url, "/api/tags")["models"][0]["name"])


def _set_loaded(url: str, *, loaded: bool) -> None:
    """Load or unload a real Ollama's model."""
    model = _model_of(url)
    _call(url, "/api/generate", {"model": model, "keep_alive": "10m" if loaded else 0})
    while not loaded and _call(url, "/api/ps")["models"]:
        time.sleep(0.1)


def _own_first_ms(url: str) -> float:
    """The second engine's own time to a first token, median of nine."""
    took = []
    for number in range(9):
        message = {"role": "user", "content": _SAID.format(number)}
        body = {"model": _model_of(url), "messages": [message], "options": {"num_predict": 1}, "stream": False}
        began_at = time.monotonic()
        _call(url, "/api/chat", body)
        took.append((time.monotonic() - began_at) * 1000)
    return statistics.median(took)


@contextmanager
def _second(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The URL of the second engine."""
    if given.ollama_host:
        yield given.ollama_host
        return
    command = ("consumers.standin", "--parallel", "1", *(("--gguf", str(given.gguf)) if given.gguf else ()))
    with process(*command, ready=folder / "standin.json", settings={}) as standin:
        yield standin["url"]


# ---- the rows --------------------------------------------------------------------------------------------------------


def _measure(what: Any, settings: dict[str, str]) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), settings) as here:
        found: tuple[float, str] = asyncio.run(what(here["nats"]))
    return found


def _compare(name: str, what: Any, engine: dict[str, str], url: str, given: argparse.Namespace) -> None:
    """Print one row: alone, and with the second engine cold and warm."""
    alone = [_measure(what, engine | ALONE)[0] for _ in range(given.runs)]
    print(f"{name:<8} alone    {_figures(alone)}", flush=True)
    for state in ("cold", "warm") if given.ollama_host else ("warm",):
        taken = []
        for _ in range(given.runs):
            if given.ollama_host:
                _set_loaded(url, loaded=state == "warm")
            took_s, who = _measure(what, engine | {"OLLAMA_HOST": url, "OLLAMA_STANDIN": "false"})
            taken.append(took_s)
            print(f"{'':<8} {state:<8} {took_s:6.1f} s   {who}", flush=True)
        ratio = statistics.median(taken) / statistics.median(alone)
        print(f"{name:<8} {state:<8} {_figures(taken)}  {ratio:.2f} of alone", flush=True)


def _figures(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):6.1f} s (median of {len(seconds)}; {min(seconds):.1f} to {max(seconds):.1f})"


def _onset(url: str, given: argparse.Namespace) -> None:
    own_ms = _own_first_ms(url)
    settings = SIMULATED | {"OLLAMA_HOST": url, "OLLAMA_STANDIN": "false", "TARGET_WAIT_S": "1"}
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), settings) as here:
        events, tokens = asyncio.run(_onsets(here["nats"], given.onsets))
    print(f"onset    the second engine's own first token: {own_ms:.0f} ms; {len(events)} onsets")
    for name, found in (
        ("burst to event", events),
        ("event to spilled token, beyond that", [t - own_ms for t in tokens]),
    ):
        cut = statistics.quantiles(found, n=20)
        print(f"         {name}: p50 {cut[9]:.0f} ms, p95 {cut[18]:.0f} ms", flush=True)


def main() -> int:
    """Returns 0: the figures are printed."""
    parser = argparse.ArgumentParser(prog="python -m bench.spill", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)} (default: all that can run)")
    parser.add_argument("--ollama-host", default="", metavar="URL", help="a real Ollama (default: the stand-in)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the stand-in's model on llama.cpp")
    parser.add_argument("--model", type=Path, metavar="DIR", help="MLX's model, for `shared`")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each kind (default: 5)")
    parser.add_argument("--onsets", type=int, default=50, metavar="N", help="(default: 50)")
    given = parser.parse_args()
    rows = given.rows or [row for row in ROWS if row != "shared" or given.model]
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder, _second(given, Path(folder)) as url:
        for row in rows:
            if row == "backlog":
                _compare(row, _backlog, SIMULATED, url, given)
            elif row == "both":
                _compare(row, partial(_simple, count=48), SIMULATED, url, given)
            elif row == "shared":
                _compare(row, partial(_simple, count=32), {"MODEL": str(given.model.resolve())}, url, given)
            else:
                _onset(url, given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
