"""Conversations with forks on a tiny model, with what earlier ones have left and without.

Run as a program: `reused.py SHAPE SEED REQUESTS [--wrong | --stored FOLDER]` prints how many answers differ from those
of an engine that keeps nothing, and what was reused. Some requests come together, some are preempted or cancelled, and
what is kept exceeds its budget. `--wrong` reverses the values of the reused caches, which must not pass unnoticed. With
`--stored`, a new engine takes the place of the old one again and again, and has only what that one has left in files.
"""

from __future__ import annotations

import json
import queue
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from consumers.engines.local.child.backend import Prepared
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.caches import tried_reuse
from consumers.engines.local.child.loop import Begin, EngineLoop, kept_bytes
from consumers.engines.local.child.memory import measured_size
from consumers.engines.local.child.prompt_files import PromptFiles
from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Cancel, Facts, Reset, Step
from pipeline.config import Config
from pipeline.wire.subjects import Priority
from tests.consumers.engines.local.child.disturbed import model_of, sampler

SYSTEM_TOKENS, ANSWER_TOKENS, TENANTS = 90, 12, ("", "", "other")
BUDGET_PROMPTS, STORED_BUDGETS = 4, 3
PRIORITIES = (Priority.HIGH, Priority.MEDIUM, Priority.LOW, Priority.LOW)


class Silent:
    """A detokenizer without text."""

    def push(self, _: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Ask:
    """A request: its prompt, the end of its system prompt, and whose it is."""

    def __init__(self, key: int, prompt: list[int], tenant: str, priority: Priority) -> None:
        self.key, self.prompt, self.tenant, self.priority = key, prompt, tenant, priority


class Tiny:
    """A backend with a tiny model of random weights."""

    on_cpu = True

    def __init__(self, model: Any, folder: str = "") -> None:
        self.files = PromptFiles(Path(folder)) if folder else None
        size = measured_size(model)
        self.facts = Facts(
            4096,
            200,
            False,
            size.per_token,
            kv_bytes_fixed=size.fixed,
            kv_windows=size.windows,
            reuse=tried_reuse(model),
        )
        self._model = model
        self.reset()

    def reset(self) -> None:
        self.batch = MlxBatch(self._model, on_cpu=True, reuse=self.facts.reuse, files=self.files)

    def drafted(self) -> tuple[int, int]:
        return 0, 0

    def insert(self, sequence: Prepared) -> None:
        self.batch.add(sequence.key, sequence.prompt, sampler(sequence.detail), [])

    def prepared(self, ask: Ask) -> Prepared:
        transcript = Transcript(len(ask.prompt), ANSWER_TOKENS, Silent())
        marks = [SYSTEM_TOKENS, len(ask.prompt) - 3] if self.facts.reuse == "snapshots" else []
        return Prepared(ask.key, ask.prompt, 0, transcript, ask.key, tenant=ask.tenant, marks=marks)


class Engine:
    """A loop on the backend, and what it has answered."""

    def __init__(self, model: Any, folder: str = "", **options: Any) -> None:
        self.model, self.folder = model, folder
        self.backend = Tiny(model, folder)
        self.config = Config(slots=2, **options)
        self.commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.said: dict[int, list[int]] = {}
        self.cached: dict[int, int] = {}
        self.suspended = self.most_bytes = 0
        self.loop = EngineLoop(self.backend, self.commands, self.take, self.config)

    def restart(self) -> None:
        """Store what is kept, and go on in a new process, as it were."""
        while self.loop._due():
            self.loop.turn()
        self.backend = Tiny(self.model, self.folder)
        self.loop = EngineLoop(self.backend, self.commands, self.take, self.config)

    def take(self, frame: Any) -> None:
        assert not isinstance(frame, Reset), frame
        if isinstance(frame, Step):
            self.suspended += len(frame.suspended)
            for key, piece in frame.pieces:
                self.said.setdefault(key, []).extend(piece.token_ids)
                if piece.usage is not None:
                    self.cached[key] = piece.usage.prompt_tokens_details.cached_tokens

    def run(self, asks: list[Ask], cancelled: set[int]) -> None:
        """Run requests that come one after another while the earlier ones run. Some are cancelled in their middle."""
        waiting = list(asks)
        while waiting or self.loop._begun:
            if waiting:
                ask = waiting.pop(0)
                self.commands.put(Begin(0, self.backend.prepared(ask), None, ask.priority))
            for key in cancelled & self.loop._begun.keys():
                if len(self.said.get(key, [])) > ANSWER_TOKENS // 2:
                    self.commands.put(Cancel(key))
            self.loop.turn()
            planner = self.loop._planner
            assert self.backend.batch._kept.nbytes() == planner.reuse.nbytes
            self.most_bytes = max(self.most_bytes, planner.reuse.nbytes + planner._suspended_bytes())


def conversations(rng: random.Random, count: int, answers: dict[int, list[int]]) -> list[Ask]:
    """The next requests: of new conversations, and of old ones, some of which fork from an earlier turn."""
    systems = [[random.Random(n).randrange(1, 200) for _ in range(SYSTEM_TOKENS)] for n in range(2)]
    asks = list[Ask]()
    for _ in range(count):
        key, tenant = len(answers) + len(asks) + 1, rng.choice(TENANTS)
        head = rng.choice(systems)
        if HISTORY and rng.random() < 0.7:
            head = rng.choice(HISTORY[-6:])
            head = head[: rng.randrange(SYSTEM_TOKENS, len(head))] if rng.random() < 0.3 else head
        prompt = head + [rng.randrange(1, 200) for _ in range(rng.randrange(4, 60))]
        asks.append(Ask(key, prompt, tenant, rng.choice(PRIORITIES)))
    if not HISTORY:  # two that share nothing fill both slots, and a third one takes a place
        asks = [
            Ask(key, [*systems[key % 2], key], "", (Priority.LOW, Priority.LOW, Priority.HIGH)[key - 1])
            for key in (1, 2, 3)
        ]
    return asks


HISTORY: list[list[int]] = []


def main(shape: str, seed: str, requests: str, *options: str) -> None:
    mx.disable_compile()
    model, rng = model_of(shape), random.Random(int(seed))
    facts = Tiny(model).facts
    budget = BUDGET_PROMPTS * facts.kv.of(2 * SYSTEM_TOKENS)
    folder = options[1] if "--stored" in options else ""
    files_bytes = STORED_BUDGETS * budget
    reusing = Engine(model, folder, kept_kv_bytes=budget, prompt_disk_bytes=files_bytes)
    alone = Engine(model, prompt_cache=False)
    if "--wrong" in options:
        load = reusing.backend.batch._kept.load
        reusing.backend.batch._kept.load = lambda parts: [reversed_(layer) for layer in load(parts)]
    asked = list[Ask]()
    while len(reusing.said) < int(requests):
        asks = conversations(rng, rng.randrange(1, 5), reusing.said)
        cancelled = {ask.key for ask in asks if rng.random() < 0.1}
        reusing.run(asks, cancelled)
        if folder:
            reusing.restart()
            assert sum(nbytes for _, nbytes in reusing.backend.files.names()) <= files_bytes
        asked += asks
        HISTORY.extend(ask.prompt + reusing.said[ask.key] for ask in asks)
    for ask in asked:
        alone.run([ask], set())
    print(
        json.dumps(
            {
                "answers": len(asked),
                "differ": sum(reusing.said[a.key] != alone.said[a.key][: len(reusing.said[a.key])] for a in asked),
                "distinct": len({tuple(tokens) for tokens in alone.said.values()}),
                "reused": sum(tokens > 0 for tokens in reusing.cached.values()),
                "reused alone": sum(alone.cached.values()),
                "suspensions": reusing.suspended,
                "budget": kept_bytes(reusing.config, facts),
                "most": reusing.most_bytes,
                "share": sum(reusing.cached.values()) / sum(len(ask.prompt) for ask in asked),
            }
        )
    )
    mx.clear_streams()


def reversed_(layer: Any) -> Any:
    """A cache of keys and values whose values have the other sign."""
    layer.values = -layer.values
    return layer


if __name__ == "__main__":
    main(*sys.argv[1:])
