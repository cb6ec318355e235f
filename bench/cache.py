"""What the prompt cache saves, and whether texts are the same with it: `python -m bench.cache [PART ...]`.

    turns     the times to the first text of a chat that grows to about 1,350 tokens in five turns, beside those of
              `mlx_lm.server`; both are asked in turns, over HTTP
    users     eight users of one system prompt of 2,000 tokens, one after another, then all at once with another prompt
    restart   the time to the first token of that system prompt in a new process, with `prompt_disk_bytes` and without
    texts     how many answers of conversations with forks differ from those of an engine that keeps nothing, under a
              seed and MLX's own BLAS; four run at once, HIGH ones preempt, and the engine is killed now and then
              (--text-model, --conversations; default: the demo model)
    memory    the size of what is kept against its budget, after conversations that exceed it

Figures of one run can be compared; those of two runs only if the machine was idle in both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from bench.bare import CORES, default_model
from bench.peer import mlx_lm_server
from bench.preemptions import SENTENCE, SENTENCE_TOKENS, started, until
from bench.running import ALONE, up
from consumers.demo_model import PATH as DEMO
from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatMessage, ChatRequest
from pipeline.wire.subjects import Priority

TURNS, FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS = 5, 500, 140, 24
# headrace lowers the priority of its engine on a CPU by so much. Beside other programs, that would decide the times.
NICENESS = 3
USERS, SYSTEM_TOKENS = 8, 2000
MEMORY_PROMPTS, MEMORY_TOKENS = 8, 400
KILL_EVERY = 40
STORING_S = 10.0
TOPICS = ("the weather", "bread", "trees", "Rome", "music", "a letter", "the sea", "winter", "horses", "a bridge")


class Asked(NamedTuple):
    """An answer: its text, the seconds to the first of it, its prompt's tokens, and how often it was preempted."""

    text: str
    first_s: float
    prompt_tokens: int
    cached_tokens: int
    preempted: int = 0


def about(tokens: int, seed: int) -> str:
    """A text of about so many tokens."""
    return f"Note {seed}. " + SENTENCE * (tokens // SENTENCE_TOKENS)


# ---- turns -----------------------------------------------------------------------------------------------------------


async def over_http(client: httpx.AsyncClient, messages: Sequence[dict[str, str]]) -> Asked:
    """Ask, and read the stream to its end."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began_at, first_s, text, usage = time.perf_counter(), 0.0, "", dict[str, Any]()
    # The chat of a person who waits. Below HIGH, headrace reads prompts in short pieces, as a HIGH request may come.
    async with client.stream("POST", "/v1/chat/completions", json=body, headers={"X-Priority": "high"}) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = msgspec.json.decode(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if said := choice["delta"].get("content"):
                    first_s = first_s or time.perf_counter() - began_at
                    text += said
    details = usage.get("prompt_tokens_details") or {}
    return Asked(text, first_s, usage["prompt_tokens"], details.get("cached_tokens") or 0)


async def growing(clients: Sequence[httpx.AsyncClient]) -> AsyncIterator[list[Asked]]:
    """A chat with each server. Yields the answers of each turn."""
    chats = [[{"role": "system", "content": about(FIRST_TOKENS, 0)}] for _ in clients]
    for turn in range(1, TURNS + 1):
        answers = []
        for client, messages in zip(clients, chats, strict=True):
            messages.append({"role": "user", "content": about(TURN_TOKENS, turn) + "What did the note say?"})
            answers.append(await over_http(client, messages))
            messages.append({"role": "assistant", "content": answers[-1].text})
        yield answers


async def asked_in_turns(urls: Sequence[str]) -> None:
    """Print a row for each turn."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) for url in urls]  # noqa: S113 - a model is slow
        for client in clients:
            await stack.enter_async_context(client)
        turn = 0
        async for answers in growing(clients):
            turn += 1
            theirs, ours = answers
            told = "  ".join(f"{one.first_s:7.2f} s ({one.cached_tokens:4} cached)" for one in answers)
            print(f"{turn:4}  {ours.prompt_tokens:6}  {told}  {ours.first_s / theirs.first_s:.2f}", flush=True)


def turns(model: Path, threads: int) -> None:
    """A table of the times to the first text."""
    print(f"turn  prompt  {'mlx_lm.server':>23}  {'headrace':>23}  ratio of the times to the first text")
    settings = ALONE | {"MODEL": str(model), "PROMPT_CACHE": "true", "MLX_THREADS": str(threads)}
    with (
        tempfile.TemporaryDirectory() as folder,
        mlx_lm_server(model, threads, NICENESS) as peer,
        up(Path(folder), settings) as here,
    ):
        asyncio.run(asked_in_turns([peer, here["http"]]))


# ---- users -----------------------------------------------------------------------------------------------------------


async def ask(engine: EngineProcess, work: Work) -> Asked:
    """Ask the engine, and read to the end."""
    began_at, first_s, text, preempted = time.perf_counter(), 0.0, "", 0
    generation = await engine.submit(work)
    while True:
        piece = await generation.next()
        if piece.token_ids:
            first_s = first_s or time.perf_counter() - began_at
        text += piece.text
        preempted += piece.preempted
        if piece.usage is not None:
            await generation.close()
            cached = piece.usage.prompt_tokens_details.cached_tokens
            return Asked(text, first_s, piece.usage.prompt_tokens, cached, preempted)


def user(system: str, number: int) -> Work:
    """A question of one user under a system prompt."""
    messages = [ChatMessage("system", system), ChatMessage("user", f"I am user {number}. What is the river like?")]
    request = ChatRequest(messages=messages, max_tokens=8, temperature=0)
    return Work(f"user-{number}", request, "", seed=number, priority=Priority.MEDIUM)


async def users(model: Path, threads: int) -> None:
    """A line for users one after another, and one for users at once."""
    async with started(Config(model=str(model), mlx_threads=threads, step_timeout_s=600.0)) as engine:
        await ask(engine, user("Hello.", 0))
        tell("one after another", [await ask(engine, user(about(SYSTEM_TOKENS, 1), n)) for n in range(USERS)])
        asking = (ask(engine, user(about(SYSTEM_TOKENS, 2), number)) for number in range(USERS))
        tell("all at once", await asyncio.gather(*asking))


async def restarted(model: Path, threads: int, disk_bytes: int) -> None:
    """A line for one user before, and one after the engine's process was killed."""
    settings = Config(model=str(model), mlx_threads=threads, step_timeout_s=600.0, prompt_disk_bytes=disk_bytes)
    async with started(settings) as engine:
        await ask(engine, user("Hello.", 0))
        before = await ask(engine, user(about(SYSTEM_TOKENS, 1), 0))
        await asyncio.sleep(STORING_S)
        os.kill(engine.child_pid or 0, signal.SIGKILL)
        for ready in (False, True):
            await until(engine, ready=ready)
        after = await ask(engine, user(about(SYSTEM_TOKENS, 1), 1))
    print(f"a system prompt of {before.prompt_tokens} tokens, {disk_bytes >> 20} MiB for files")
    print(f"  first token after {before.first_s:.2f} s; in a new process after {after.first_s:.2f} s", flush=True)
    print(f"  after / before: {after.first_s / before.first_s:.3f}; cached tokens: {after.cached_tokens}", flush=True)


def restart(model: Path, threads: int) -> None:
    """Both, with a cache folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for disk_bytes in (0, 1 << 30):
            asyncio.run(restarted(model, threads, disk_bytes))
        files = [file.stat().st_size for file in Path(folder).glob("**/*.safetensors")]
        print(f"  {len(files)} files, {sum(files) >> 20} MiB", flush=True)
        del os.environ["XDG_CACHE_HOME"]


def tell(how: str, found: Sequence[Asked]) -> None:
    """Print the times of users who came like this."""
    times = " ".join(f"{one.first_s:.2f}" for one in found)
    cached = ", ".join(str(one.cached_tokens) for one in found)
    print(f"{USERS} users of one system prompt, {found[0].prompt_tokens} tokens, {how}: first token after {times} s")
    print(f"  second / first: {found[1].first_s / found[0].first_s:.3f}; cached tokens: {cached}", flush=True)


# ---- texts -----------------------------------------------------------------------------------------------------------


class Talk(NamedTuple):
    """A conversation so far, and the request that it is."""

    work: Work
    messages: list[ChatMessage]


def conversations(count: int, tokens: int) -> list[Talk]:
    """Seeded requests: new conversations, and old ones that go on or fork. The answers in them are made up."""
    rng, talks = random.Random(7), list[Talk]()
    for number in range(count):
        messages = [ChatMessage("system", f"You are helper {rng.randrange(3)}. " + "Answer in a few words. " * 6)]
        if talks and rng.random() < 0.7:
            base = rng.choice(talks[-12:]).messages
            messages = base[: rng.randrange(1, len(base) + 1, 2)]
            if len(messages) > 1:
                messages = [*messages[:-1], ChatMessage("assistant", f"I know of {rng.choice(TOPICS)}.")]
        messages = [*messages, ChatMessage("user", f"Tell me about {rng.choice(TOPICS)} and {rng.choice(TOPICS)}.")]
        request = ChatRequest(messages=messages, max_tokens=tokens, temperature=0.8)
        priority = rng.choice((Priority.HIGH, Priority.LOW, Priority.LOW))
        talks.append(Talk(Work(f"talk-{number}", request, "", seed=number, priority=priority), [*messages]))
        talks[-1].messages.append(ChatMessage("assistant", f"That is {rng.choice(TOPICS)}."))
    return talks


async def written(engine: EngineProcess, talks: Sequence[Talk], at_once: int, *, kills: bool) -> list[Asked]:
    """The answers. With kills, the engine's process is killed while every `KILL_EVERY`th one is being written."""
    room = asyncio.Semaphore(at_once)

    async def one(number: int, talk: Talk) -> Asked:
        async with room:
            asking = asyncio.create_task(ask(engine, talk.work))
            if kills and number % KILL_EVERY == KILL_EVERY - 1:
                await asyncio.wait([asking], timeout=0.3)
                if engine.child_pid:
                    os.kill(engine.child_pid, signal.SIGKILL)
            return await asking

    return list(await asyncio.gather(*(one(number, talk) for number, talk in enumerate(talks))))


async def texts(model: Path, given: argparse.Namespace) -> None:
    """How many texts differ, with disturbances and without a cache."""
    talks = conversations(given.conversations, given.tokens)
    settings = {"model": str(model), "blas": given.blas, "mlx_threads": given.threads, "slots": 2}
    async with started(Config(**settings, prompt_cache=False)) as engine:
        plain = await written(engine, talks, 1, kills=False)
    async with started(Config(**settings)) as engine:
        found = await written(engine, talks, 4, kills=True)
    differ = sum(one.text != other.text for one, other in zip(plain, found, strict=True))
    share = sum(one.cached_tokens for one in found) / sum(one.prompt_tokens for one in found)
    print(
        f"{len(talks)} conversations with forks, blas {given.blas}: {differ} texts differ with and without the cache; "
        f"{share:.0%} of the prompts' tokens were cached; {sum(one.preempted for one in found)} preemptions, "
        f"{len(talks) // KILL_EVERY} kills",
        flush=True,
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


async def memory(model: Path, threads: int, budget: int) -> None:
    """The size of what is kept, at its greatest, after prompts that need more."""
    most = 0
    async with started(Config(model=str(model), mlx_threads=threads, kept_kv_bytes=budget)) as engine:
        for number in range(MEMORY_PROMPTS):
            await ask(engine, user(about(MEMORY_TOKENS, number), number))
            most = max(most, engine.status().kept_bytes)
        tokens = engine.status().prompt_tokens
    print(f"kept at most {most / 1e6:.1f} MB of {budget / 1e6:.1f} MB after prompts of {tokens} tokens", flush=True)


async def _main(given: argparse.Namespace) -> None:
    model = given.model.resolve() if given.model else default_model()
    if "users" in given.parts:
        await users(model, given.threads)
    if "texts" in given.parts:
        await texts(given.text_model.resolve() if given.text_model else DEMO, given)
    if "memory" in given.parts:
        await memory(model, given.threads, given.budget)


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("turns", "users", "restart", "texts", "memory")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: SmolLM2)")
    parser.add_argument("--text-model", type=Path, metavar="DIR", help="the model of `texts` (default: demo)")
    parser.add_argument("--conversations", type=int, default=200, metavar="N", help="for `texts` (default: 200)")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="of each text (default: 24)")
    parser.add_argument("--blas", default="none", metavar="NAME", help="for `texts` (default: none, MLX's own)")
    parser.add_argument("--budget", type=int, default=100_000_000, metavar="BYTES", help="for `memory`")
    parser.add_argument("--threads", type=int, default=CORES, metavar="N", help="threads of MLX (default: all cores)")
    given = parser.parse_args()
    given.parts = given.parts or parts
    logging.disable(logging.ERROR)  # the kills are on purpose
    if "turns" in given.parts:
        turns(given.model.resolve() if given.model else default_model(), given.threads)
    if "restart" in given.parts:
        restart(given.model.resolve() if given.model else default_model(), given.threads)
    asyncio.run(_main(given))


if __name__ == "__main__":
    main()
