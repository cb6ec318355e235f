"""What a real model does on this machine's CPU: `python -m bench.real [--model DIR] [PART ...]`.

    speed     tokens/s through headrace for 1, 8 and 32 requests at once, and of the bare `BatchGenerator` in the same
              run; with MLX's own BLAS and with the selected one, weights as they are and as float32
    engines   both engines busy at once, with a thread for each core each and with the cores divided (--gguf)
    seeds     how often a seeded text is another one in a batch, or over a crash, than alone; with each BLAS, and for
              requests that ask for an exact text (--exact)
    memory    the memory of each process of `headrace up`, at rest and with eight long answers under way
    preemptions  how often a seeded text is another one after random preemptions, and in another batch; with each BLAS
    long      a long LOW prompt, alone and beside HIGH answers that are being written: the gaps in these

`preemptions` and `long` run only if they are named. A part without an option that it needs is left out. Figures of one
run can be compared; those of two runs only if the machine was idle in both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.bare import CORES, PROMPTS, Job, default_model, run
from bench.preemptions import long_prompt, preemptions, started
from bench.running import ALONE, ROOT, START_TIMEOUT_S, ended, up
from consumers.engines.local.blas import selected
from consumers.engines.local.process import EngineProcess
from consumers.models.known import SMOLLM2
from pipeline.config import Config
from pipeline.core.cores import divide
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest

AT_ONCE = (1, 8, 32)


def request(index: int, tokens: int) -> dict[str, Any]:
    """One request for a long answer, greedy."""
    messages = [{"role": "user", "content": PROMPTS[index % len(PROMPTS)]}]
    return {"messages": messages, "max_tokens": tokens, "temperature": 0}


# ---- speed -----------------------------------------------------------------------------------------------------------


async def through_headrace(url: str, tokens: int, at_once: Sequence[int]) -> list[float]:
    """Tokens/s for each number of requests at once, over HTTP."""
    rates = []
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:  # noqa: S113 - a model is slow

        async def one(index: int) -> int:
            answer = (await client.post("/v1/chat/completions", json=request(index, tokens))).raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        for many in at_once:
            began_at = time.perf_counter()
            counts = await asyncio.gather(*(one(index) for index in range(many)))
            rates.append(sum(counts) / (time.perf_counter() - began_at))
    return rates


async def speed(model: Path, tokens: int, threads: int) -> None:
    """A table of tokens/s: before, the BLAS alone, and with float32 weights."""
    print(f"{model.name}: tokens/s for {', '.join(map(str, AT_ONCE))} at once, {threads} threads", flush=True)
    quantized = "quantization" in json.loads((model / "config.json").read_text())
    kinds = (False, True) if quantized else (True,)
    cases = [(blas, float32) for blas in ("none", "auto") for float32 in kinds]
    for blas, float32 in cases:
        # With MLX's own BLAS or quantized weights, whole answers and 32 at once would take an hour.
        length, at_once = (tokens, AT_ONCE) if blas == "auto" and float32 else (8, AT_ONCE[:-1])
        library = await selected(blas, threads)
        jobs = [Job([PROMPTS[index % len(PROMPTS)] for index in range(many)], [length] * many) for many in at_once]
        alone = await asyncio.to_thread(run, model, jobs, blas=blas, threads=threads, full=float32)
        settings = {
            "MODEL": str(model),
            "SLOTS": "32",
            "BLAS": blas,
            "FLOAT32_WEIGHTS": str(float32).lower(),
            "MLX_THREADS": str(threads),
        }
        with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | settings) as here:
            rates = await through_headrace(here["http"], length, at_once)
        name = f"{library.name if library else 'own BLAS'}, weights {'float32' if float32 else 'as they are'}"
        for what, figures in (("bare", [took.tokens_per_s for took in alone]), ("headrace", rates)):
            print(f"  {name:<32} {what:<9} {'  '.join(f'{rate:6.1f}' for rate in figures)}", flush=True)


# ---- both engines ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def llama(gguf: Path, threads: int) -> Iterator[str]:
    """The stand-in with llama.cpp, on this many threads; yields its URL."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        options = ["--gguf", gguf, "--name", "m", "--threads", threads, "--parallel", 4, "--ready-file", ready]
        command = [sys.executable, "-m", "consumers.standin", *map(str, options)]
        with ended(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)) as started:
            give_up_at = time.monotonic() + START_TIMEOUT_S
            while not ready.exists():
                if started.poll() is not None or time.monotonic() > give_up_at:
                    raise SystemExit("the stand-in did not start")
                time.sleep(0.05)
            yield json.loads(ready.read_text())["url"]


async def asking_ollama(url: str, options: Mapping[str, Any], stop: asyncio.Event) -> float:
    """Tokens/s of an Ollama server with four requests at a time, until stop."""
    count, began_at = 0, time.perf_counter()

    async def one(client: httpx.AsyncClient, index: int) -> None:
        nonlocal count
        body = {"model": "m", "messages": request(index, 0)["messages"]}
        body["options"] = {"temperature": 0, "num_predict": 400, **options}
        async with client.stream("POST", "/api/chat", json=body) as answer:
            async for line in answer.aiter_lines():
                if stop.is_set():
                    return
                count += "done_reason" not in line

    async def keep(client: httpx.AsyncClient, index: int) -> None:
        while not stop.is_set():
            await one(client, index)

    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:  # noqa: S113 - a model is slow
        await asyncio.gather(*(keep(client, index) for index in range(4)))
    return count / (time.perf_counter() - began_at)


async def asking_mlx(engine: EngineProcess, stop: asyncio.Event) -> float:
    """Tokens/s of the engine with eight requests at a time, until stop."""
    count, began_at = 0, time.perf_counter()

    async def keep(index: int) -> None:
        nonlocal count
        while not stop.is_set():
            asked = ChatRequest(prompt=PROMPTS[index], max_tokens=400, temperature=0)
            generation = await engine.submit(Work(id=str(index), request=asked, model="", seed=1))
            while not stop.is_set() and (piece := await generation.next()).finish_reason is None:
                count += len(piece.token_ids)
            await generation.close()

    await asyncio.gather(*(keep(index) for index in range(8)))
    return count / (time.perf_counter() - began_at)


async def for_a_time(seconds: float, *busy: Callable[[asyncio.Event], Awaitable[float]]) -> list[float]:
    """Run several at once for so many seconds."""
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return list(await asyncio.gather(*(one(stop) for one in busy)))


async def engines(model: Path, gguf: Path, seconds: float) -> None:
    """A table of tokens/s, each engine alone and both at once."""
    share = divide(CORES, second_shares=True)
    print(f"tokens/s of both engines, on {CORES} cores: MLX (8 at once), llama.cpp (4 at once)")
    for name, mlx_threads, second_threads in (
        ("a thread for each core, each", CORES, CORES),
        ("the cores divided", share.mlx, share.second),
    ):
        async with started(Config(model=str(model), mlx_threads=mlx_threads)) as engine:
            with llama(gguf, second_threads) as url:
                options = {"num_thread": second_threads}
                mlx, second = (
                    lambda stop: asking_mlx(engine, stop),
                    lambda stop: asking_ollama(url, options, stop),  # noqa: B023
                )
                (mlx_alone,), (second_alone,) = await for_a_time(seconds, mlx), await for_a_time(seconds, second)
                both = await for_a_time(seconds, mlx, second)
        line = f"  {name:<30} {mlx_threads} + {second_threads} threads: alone {mlx_alone:5.1f} and {second_alone:5.1f}"
        print(f"{line}, at once {both[0]:5.1f} and {both[1]:5.1f}", flush=True)


# ---- seeds -----------------------------------------------------------------------------------------------------------


async def text_of(engine: EngineProcess, index: int, tokens: int, crash_after: int = 0, *, exact: bool = False) -> str:
    """A seeded text. With crash_after, the child is killed once there are so many tokens."""
    asked = ChatRequest(prompt=PROMPTS[index % len(PROMPTS)], max_tokens=tokens, temperature=0.8, exact=exact)
    generation = await engine.submit(Work(id=str(index), request=asked, model="", seed=index))
    text, count = "", 0
    while True:
        piece = await generation.next()
        text, count = text + piece.text, count + len(piece.token_ids)
        if crash_after and count >= crash_after:
            crash_after = 0
            if engine.child_pid:
                os.kill(engine.child_pid, signal.SIGKILL)
        if piece.finish_reason is not None:
            await generation.close()
            return text


async def seeds(model: Path, given: argparse.Namespace, blas: str) -> None:
    """How many texts differ from the one that the engine wrote alone. A line for each eight, as it takes long."""
    differ, count = Counter[str](), 0
    async with started(Config(model=str(model), blas=blas, mlx_threads=given.threads)) as engine:
        for first in range(given.first, given.first + given.texts, 8):
            some = range(first, min(first + 8, given.first + given.texts))
            alone = [await text_of(engine, index, given.tokens, exact=given.exact) for index in some]
            batch = await asyncio.gather(*(text_of(engine, index, given.tokens, exact=given.exact) for index in some))
            cut = [given.tokens // 2 if index == first else 0 for index in some]
            asked = zip(some, cut, strict=True)
            crash = await asyncio.gather(*(text_of(engine, i, given.tokens, at, exact=given.exact) for i, at in asked))
            for what, others in (("in a batch of 8", batch), ("over a crash as well", crash)):
                differ[what] += sum(one != other for one, other in zip(alone, others, strict=True))
            count += len(some)
            found = ", ".join(f"{differ[what]} {what}" for what in ("in a batch of 8", "over a crash as well"))
            kind = "exact" if given.exact else "usual"
            print(f"  blas {blas:<5} {kind} texts of {given.tokens} tokens: of {count} differ {found}", flush=True)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_of(pid: int) -> dict[str, float]:
    """Resident memory of a process and of all that it started, in MiB, by what each runs."""
    listing = ["/bin/ps", "-A", "-o", "pid=,ppid=,rss=,args="]
    lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    listed = {
        int(own): (int(parent), int(rss), args) for own, parent, rss, args in (line.split(None, 3) for line in lines)
    }
    ours, found = {pid}, dict[str, float]()
    for own, (parent, rss, args) in sorted(listed.items()):
        if own in ours or parent in ours:
            ours.add(own)
            name = next((name for mark, name in _PROCESSES.items() if mark in args), None)
            if name:
                found[name] = found.get(name, 0.0) + int(rss) / 1024
    return found


_PROCESSES = {
    "local.child": "engine (MLX)",
    "consumers.standin": "stand-in (llama.cpp)",
    "nats-server": "broker",
    "run mlx": "MLX worker",
    "run ollama": "Ollama worker",
    "run router": "router",
    "run monitor": "monitor",
    "run gateway": "gateway",
    "pipeline.cli up": "headrace up",
}


async def memory(model: Path, tokens: int) -> None:
    """A table of the memory of each process."""
    settings = {"MODEL": SMOLLM2.name if model == default_model() else str(model), "OLLAMA_HOST": "none"}
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), settings) as here:
        at_rest = memory_of(int(here["pid"]))
        asking = asyncio.create_task(through_headrace(here["http"], tokens, [8]))
        most = dict(at_rest)
        while not asking.done():
            await asyncio.wait([asking], timeout=0.5)
            for name, rss in memory_of(int(here["pid"])).items():
                most[name] = max(most.get(name, 0.0), rss)
    print("resident memory, MiB: at rest, and the most with eight answers under way")
    for name in _PROCESSES.values():
        print(f"  {name:<22} {at_rest.get(name, 0.0):7.0f} {most.get(name, 0.0):7.0f}", flush=True)
    print(f"  {'all':<22} {sum(at_rest.values()):7.0f} {sum(most.values()):7.0f}", flush=True)


async def _main(given: argparse.Namespace) -> None:
    model = given.model.resolve() if given.model else default_model()
    if "speed" in given.parts:
        await speed(model, given.tokens, given.threads)
    if "memory" in given.parts:
        await memory(model, given.tokens)
    if "engines" in given.parts and given.gguf is not None:
        await engines(model, given.gguf.resolve(), given.seconds)
    if "seeds" in given.parts:
        print(f"seeded texts, temperature 0.8, {given.threads} threads, against the same text alone")
        for blas in given.blas:
            await seeds(model, given, blas)
    if "preemptions" in given.parts:
        print(f"random preemptions, temperature 1, {given.threads} threads")
        for blas in given.blas:
            await preemptions(model, given.count, given.tokens, blas, given.threads)
    if "long" in given.parts:
        await long_prompt(model, given.prompt_tokens, given.threads)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="speed, memory, engines, seeds (default: these), preemptions, long"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: SmolLM2)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="length of each answer (default: 64)")
    parser.add_argument("--threads", type=int, default=CORES, metavar="N", help="threads of MLX (default: all cores)")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="for both engines (default: 20)")
    parser.add_argument("--texts", type=int, default=24, metavar="N", help="seeded texts (default: 24)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    parser.add_argument("--exact", action="store_true", help="ask for exact texts")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="preemptions (default: 500)")
    parser.add_argument("--prompt-tokens", type=int, default=6000, metavar="N", help="for long (default: 6000)")
    parser.add_argument("--blas", nargs="+", default=["auto", "none"], metavar="NAME", help="for seeds, preemptions")
    given = parser.parse_args()
    given.parts = given.parts or ["speed", "memory", "engines", "seeds"]
    logging.disable(logging.ERROR)  # the crashes are on purpose
    asyncio.run(_main(given))


if __name__ == "__main__":
    main()
