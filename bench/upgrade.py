"""Upgrading in place, and two versions on one broker: `make upgrade`, or `python -m bench.upgrade --from REV`.

The other version comes from git and runs from its own tree, with its own virtual environment if its pinned requirements
differ from the ones here. Each part publishes requests to every lane, as a client that knows only the wire contract,
and holds each record in `LLM_REPLIES` against the promise: one last message, no gap in `seq`, the chunks' text.

- *stopped*: the other version stores the requests and is told to stop with some of them running; this version starts
  on its state folder and answers the rest.
- *killed*: the same, but every process of the other version is killed at once.
- *beside*: a pipeline of one version is joined by roles of the other, and both serve. A role that refuses to join
  counts as well, if it exits and its log says why.

The exit code is 1 if a request is lost, answered twice or answered wrongly, or if a role neither serves nor refuses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nats.aio.msg import Msg
from rich.console import Console
from rich.table import Table

from bench.chaos.client import Client
from bench.chaos.ledger import Entry, Ledger
from bench.revision import ROOT, revision
from bench.running import flushed
from bench.versions import Broken, Program, Version, prepared, until

# The last version before the packages were laid out anew. A release moves it on to the one before it.
VERSION_BEFORE = "fdee883d96f922dadc80e922d1fae108ba62d86a"

ANSWER_TIMEOUT_S = 180.0

PRIORITIES = ("high", "medium", "low")
SUBJECTS = [f"llm.request.{priority}{task}" for priority in PRIORITIES for task in ("", ".simple", ".complex")]
QUEUES = ("LLM", "LLM_OLLAMA")
PROMPTS = ("What is the capital of France?", "Tell me a story.", "Count from 1 to 100.", "Считай от 1 до 60.")
CANCELLED = 5
AGAIN = 5
POISON = "Tell me a story. [[fault:raise@2]]"

# Settings that both versions know. The first is overloaded, so that requests wait in every lane and some are spilled.
COMMON = {"ENGINE": "simulated", "SLOTS": "4", "OLLAMA_SLOTS": "2", "SIMULATED_ANSWER_TOKENS": "24", "HTTP_PORT": "0"}
COMMON |= {"LOG_LEVEL": "info", "TARGET_WAIT_S": "1", "OLLAMA_HOST": "none"}
SLOW = COMMON | {"SIMULATED_TOKENS_PER_S": "60", "DRAIN_TIMEOUT_S": "0.3", "ENGINE_FAULTS": "true"}
FAST = COMMON | {"SIMULATED_TOKENS_PER_S": "2000"}
STEADY = COMMON | {"SIMULATED_TOKENS_PER_S": "300"}


@dataclass(slots=True)
class Part:
    """What one part of the run came to."""

    title: str
    accepted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything was as promised."""
        return not self.faults and not self.wrong

    def close(self, ledger: Ledger) -> None:
        """Take over the ledger's verdict."""
        summary = ledger.summary()
        self.accepted, self.ended, self.faults = summary.accepted, summary.ended, summary.faults
        self.wrong += [f"{fault}: {', '.join(ids)}" for fault, ids in summary.examples.items()]


# ---- the parts


async def in_place(before: Version, now: Version, folder: Path, *, requests: int, killed: bool) -> Part:
    """One version stores the requests and ends with some of them running; the other goes on with its state folder."""
    part = Part("killed" if killed else "stopped")
    ledger, port = Ledger(), str(_free_port())
    async with _up(before, folder, port, SLOW, "before") as old, Client.connected(_url(port), ledger) as client:
        poisoned = Entry("poison", "poison", streams=False, accepted_at=0.0, may_end=frozenset({"engine_failed"}))
        await client.publish(poisoned, "llm.request.high.complex", _body(POISON, stream=False), {})
        await _until_answered(client, ledger)
        cancelled = await _store(client, requests)
        for entry in cancelled[:CANCELLED]:
            await client.cancel(entry.id)
        await until(lambda: _is_in_the_middle(client, ledger), "some answered, some in mid-answer, some spilled")
        await client.read_record()
        part.notes.append(await _what_stands(client, ledger))
        if killed:
            old.kill()
        else:
            await old.stop()
        answered_before = len(ledger.entries) - len(ledger.open())
        async with _up(now, folder, port, FAST, "now"):
            # As soon as it serves: the monitor may not have read the queue yet.
            states = Counter([await client.cancel(entry.id) for entry in cancelled[CANCELLED:]])
            part.notes.append(f"{answered_before} answered before; cancelled after the start: {dict(states)}")
            await _until_answered(client, ledger)
            await _publish_again(client, ledger)
            part.close(ledger)
            letter = now.call("dead", "replay", "--all", "--nats-url", _url(port)).strip()
            await until(lambda: _was_answered_anew(client, poisoned), "the replayed letter is answered")
            part.notes.append(f"dead letter of the version before: {letter}")
    return part


async def beside(host: Version, guest: Version, roles: tuple[str, ...], folder: Path, *, requests: int) -> Part:
    """A pipeline of one version, joined by roles of the other."""
    part = Part(f"{host.name}, joined by {guest.name}'s {', '.join(roles)}")
    ledger, port = Ledger(), str(_free_port())
    async with _up(host, folder, port, STEADY, "host"), Client.connected(_url(port), ledger) as client:
        busy = await _listen_to_workers(client)
        await until(lambda: "mlx" in {engine for engine, _ in busy}, "the host's worker says how it is")
        settings = STEADY | {"NATS_URL": _url(port), "STATE_DIR": str(folder / "guest")}
        guests = {role: guest.start(folder / f"{role}.log", "run", role, settings=settings) for role in roles}
        try:
            await until(lambda: _all_joined(guests, busy), f"{', '.join(roles)} of {guest.name} join or refuse")
            await _store(client, requests)
            await _until_answered(client, ledger)
            part.close(ledger)
            for role, program in guests.items():
                _judge_guest(part, role, program, busy)
        finally:
            for program in guests.values():
                await program.stop()
    return part


def _judge_guest(part: Part, role: str, program: Program, busy: Mapping[tuple[str, int], int]) -> None:
    """A guest serves until it is stopped, or has refused in words."""
    code = program.process.poll()
    if code is not None:
        refused = code != 0 and program.last_words != "nothing"
        (part.notes if refused else part.wrong).append(f"{role} ended with {code}: {program.last_words}")
    elif role == "mlx":
        workers = {pid: slots for (engine, pid), slots in busy.items() if engine == "mlx"}
        part.notes.append(
            f"slots in use at most: guest {workers.pop(program.process.pid)}, host {max(workers.values())}"
        )
        if not all(slots for (engine, _), slots in busy.items() if engine == "mlx"):
            part.wrong.append("a worker had nothing to do")
    else:
        part.notes.append(f"the guest's {role} was up all the time")


# ---- what they have in common


@asynccontextmanager
async def _up(
    version: Version, folder: Path, port: str, settings: Mapping[str, str], name: str
) -> AsyncIterator[Program]:
    """`headrace up` that serves at a port; it has ended when the block has."""
    ready = folder / f"{name}.json"
    options = ("up", "--state-dir", str(folder / "state"), "--ready-file", str(ready), "--nats-port", port)
    program = version.start(folder / f"{name}.log", *options, settings=settings)
    try:
        await until(lambda: ready.exists() or program.process.poll() is not None, f"{program.name} serves")
        if not ready.exists():
            raise Broken(f"{program.name} ended: {program.last_words}")
        yield program
        if program.process.poll() is None:
            await program.stop()
    finally:
        program.kill()


async def _store(client: Client, count: int) -> list[Entry]:
    """Publish so many requests to all lanes, and after them some to be cancelled, which are returned."""
    for number in range(count):
        entry = Entry(f"plain-{number}", "plain", streams=number % 3 != 0, accepted_at=0.0)
        subject = SUBJECTS[number % len(SUBJECTS)]
        await client.publish(entry, subject, _body(PROMPTS[number % len(PROMPTS)], stream=entry.streams), {})
    to_cancel = []
    for number in range(2 * CANCELLED):
        entry = Entry(f"cancelled-{number}", "cancelled", False, 0.0, may_end=frozenset({"cancelled"}))
        await client.publish(entry, "llm.request.low.complex", _body(PROMPTS[0], stream=False), {})
        to_cancel.append(entry)
    return to_cancel


async def _publish_again(client: Client, ledger: Ledger) -> None:
    """A client that has lost its acknowledgement publishes again under the same id, and nothing happens."""
    started = client.started.total()
    for entry in list(ledger.entries.values())[-AGAIN:]:
        await client.store("llm.request.high", _body("Answered already.", stream=False), {"Nats-Msg-Id": entry.id})
    await _until_answered(client, ledger)
    if client.started.total() != started:
        raise Broken("a request that had been answered was begun again")


def _body(prompt: str, *, stream: bool) -> bytes:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 64, "stream": stream, "seed": 7}
    return json.dumps(body).encode()


async def _is_in_the_middle(client: Client, ledger: Ledger) -> bool:
    await client.read_record()
    entries = ledger.entries.values()
    answered = len(entries) - len(ledger.open())
    begun = sum(entry.is_in_mid_answer for entry in entries)
    return answered >= 10 and begun >= 2 and await client.left_in("LLM_OLLAMA") >= 2


async def _what_stands(client: Client, ledger: Ledger) -> str:
    """What a version leaves behind: requests by subject, and answers that have begun."""
    lanes: Counter[str] = Counter()
    for stream in QUEUES:
        body = json.dumps({"subjects_filter": ">"}).encode()
        answer = json.loads((await client.nc.request(f"$JS.API.STREAM.INFO.{stream}", body, timeout=5)).data)
        lanes.update(answer["state"].get("subjects") or {})
    begun = sum(entry.is_in_mid_answer for entry in ledger.entries.values())
    written = ", ".join(f"{subject.removeprefix('llm.')} {count}" for subject, count in sorted(lanes.items()))
    return f"stored when it ended: {written}; {begun} in mid-answer"


async def _until_answered(client: Client, ledger: Ledger) -> None:
    """Wait until every request has its last message and both queues are empty."""

    async def quiet() -> bool:
        await client.read_record()
        return not ledger.open() and not any([await client.left_in(stream) for stream in QUEUES])

    try:
        await until(quiet, "every request is answered", timeout_s=ANSWER_TIMEOUT_S)
    except Broken as error:
        left = {stream: await client.left_in(stream) for stream in QUEUES}
        unanswered = [entry.id for entry in ledger.open()]
        raise Broken(f"{error}: {len(unanswered)} open ({', '.join(unanswered[:5])} ...), stored {left}") from None


async def _was_answered_anew(client: Client, entry: Entry) -> bool:
    """Whether the record of a replayed request ends with an answer."""
    await client.read_record()
    return bool(json.loads(entry.record[-1].data)["object"] == "chat.completion")


async def _listen_to_workers(client: Client) -> dict[tuple[str, int], int]:
    """The most slots that each worker has had in use, by engine and process; it goes on changing."""
    busy: dict[tuple[str, int], int] = defaultdict(int)

    async def on_status(message: Msg) -> None:
        status: dict[str, Any] = json.loads(message.data)
        key = (status["engine"], int(status["worker"].rpartition("-")[2]))
        busy[key] = max(busy[key], status["slots"]["used"])

    await client.nc.subscribe("llm.worker.*", cb=on_status)
    await flushed(client.nc)
    return busy


def _all_joined(guests: Mapping[str, Program], busy: Mapping[tuple[str, int], int]) -> bool:
    """Whether each guest that is a worker has been heard of, and each other one has reported that it is ready."""
    pids = {pid for _, pid in busy}
    return all(
        program.process.poll() is not None
        or program.process.pid in pids
        or (role != "mlx" and re.search(r"\bready\b", program.log.read_text()))
        for role, program in guests.items()
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _url(port: str) -> str:
    return f"nats://127.0.0.1:{port}"


async def run(before: Version, now: Version, folder: Path, requests: int) -> list[Part]:
    """All parts, one after another. A part that cannot be carried through has failed, and the next one begins."""
    parts: dict[str, Callable[[Path], Awaitable[Part]]] = {
        "stopped": lambda to: in_place(before, now, to, requests=requests, killed=False),
        "killed": lambda to: in_place(before, now, to, requests=requests, killed=True),
        "guest worker": lambda to: beside(now, before, ("mlx",), to, requests=requests),
        "host worker": lambda to: beside(before, now, ("mlx",), to, requests=requests),
        "guest router and monitor": lambda to: beside(now, before, ("router", "monitor"), to, requests=requests),
        "host router and monitor": lambda to: beside(before, now, ("router", "monitor"), to, requests=requests),
    }
    done = []
    for title, part in parts.items():
        print(f"{title} ...", flush=True)
        place = folder / title.replace(" ", "-")
        place.mkdir()
        try:
            done.append(await part(place))
        except Broken as error:
            done.append(Part(title, wrong=[str(error)]))
    return done


def _table(parts: list[Part]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, show_edge=False)
    for heading in ("part", "accepted", "ended", "lost", "doubled", "result"):
        table.add_column(heading, overflow="fold")
    for part in parts:
        ended = ", ".join(f"{how} {count}" for how, count in part.ended.most_common())
        result = "passed" if part.passed else "FAILED"
        lost, doubled = str(part.faults["lost"]), str(part.faults["doubled"])
        table.add_row(part.title, str(part.accepted), ended, lost, doubled, result, end_section=True)
    return table


def main() -> int:
    """Returns 0 where every part passed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.upgrade", description="Upgrade in place, and two versions on one broker."
    )
    parser.add_argument(
        "--from", dest="rev", default=VERSION_BEFORE, metavar="REV", help="the other version (default: the one before)"
    )
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="in each part (default: 200)")
    parser.add_argument("--keep", action="store_true", help="keep the logs and the state folders")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headrace-upgrade-"))
    with revision(options.rev) as tree:
        before = prepared(options.rev[:7], tree, folder)
        parts = asyncio.run(run(before, prepared("this version", ROOT, folder), folder, options.requests))
    print()
    Console(width=118, highlight=False, markup=False).print(_table(parts))
    for part in parts:
        for line in [*part.notes, *(f"WRONG: {wrong}" for wrong in part.wrong)]:
            print(f"{part.title}: {line}")
    failed = not all(part.passed for part in parts)
    if failed or options.keep:
        print(f"logs and state folders: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
