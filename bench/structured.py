"""What answers of a given form cost, and whether they have it.

`python -m bench.structured [--model DIR] [--slots 16] [--steps 200] [--answers 500]`

1. The time of a step of a full batch, with no answer of a given form, with half of them, and with all, in turns.
2. Answers to schemas of many shapes. Another library than the one that guides them checks each.
3. Seeded answers that are broken off and continued by a new batch, as after a crash.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import queue
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jsonschema_rs

from bench.bare import CORES
from bench.shapes import shapes
from consumers.demo_model import PATH
from consumers.engines.local.blas import selected, threads_environment
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.loop import Begin, EngineLoop
from consumers.engines.local.child.mlx import MlxBackend
from consumers.engines.local.child.speed import load_blas
from consumers.engines.local.protocol import Step
from pipeline.config import Config
from pipeline.engine import Piece, Work
from pipeline.wire.decoding import decode_chat
from pipeline.wire.requests import ChatRequest

WARM_STEPS = 10
LIMIT_TOKENS = 600
PROMPTS = (
    "What is the capital of France?",
    "Count from 1 to 100.",
    "What is 3 + 4?",
    "Give me a JSON object.",
    "Translate cat to French.",
)
ENDLESS = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1000}


def request(prompt: str, schema: Any = None, **more: Any) -> ChatRequest:
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], **more}
    if schema is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    return decode_chat(json.dumps(fields).encode(), max_body_bytes=1 << 20)


class Answers:
    """The answers of one loop on a backend, as they grow."""

    def __init__(self, backend: MlxBackend, config: Config) -> None:
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._sent: list[Any] = []
        self._loop = EngineLoop(backend, self._commands, self._sent.append, config)
        self._backend = backend
        self.of: dict[int, list[Piece]] = {}

    def begin(
        self, key: int, asked: ChatRequest, *, seed: int, resume: list[int] | None = None, text: str = ""
    ) -> None:
        """Begin or resume an answer."""
        work = Work(id=str(key), request=asked, model="", seed=seed, resume_tokens=resume or [], resume_text=text)
        self.of[key] = []
        self._commands.put(Begin(0, self._backend.prepare(key, work), None))

    def turn(self) -> None:
        """Let the loop do one thing."""
        self._loop.turn()
        for frame in self._sent:
            assert isinstance(frame, Step), frame
            for key, piece in frame.pieces:
                self.of[key].append(piece)
        self._sent.clear()

    def complete(self) -> None:
        """Go on until all answers have ended."""
        while any(self.reason(key) is None for key in self.of):
            self.turn()

    def tokens(self, key: int) -> list[int]:
        """All that were sampled."""
        return [token for piece in self.of[key] for token in piece.token_ids]

    def text(self, key: int) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.of[key])

    def reason(self, key: int) -> str | None:
        """Why it ended, if it has."""
        return self.of[key][-1].finish_reason if self.of[key] else None


# ---- 1. the cost of a step -------------------------------------------------------------------------------------------


def filled(backend: MlxBackend, *, slots: int, guided: int) -> MlxBatch:
    """A batch in which so many of the answers have a form. None of them ends."""
    batch = MlxBatch(backend._model, on_cpu=backend.on_cpu)  # noqa: SLF001 - it has one batch, and this needs four
    backend.batch = batch
    for key in range(slots):
        asked = request("Count from 1 to 100.", ENDLESS if key < guided else None, temperature=1, max_tokens=1000)
        backend.insert(sequence := backend.prepare(key, Work(id="", request=asked, model="", seed=key)))
        batch.read([(key, len(sequence.prompt))])
    return batch


def print_cost(backend: MlxBackend, *, slots: int, steps: int) -> None:
    """The batches take their steps in turns, so that what else the machine does falls on all alike."""
    cases = {"none": 0, "none, a second time": 0, "half": slots // 2, "all": slots}
    batches = {name: filled(backend, slots=slots, guided=guided) for name, guided in cases.items()}
    wall: dict[str, list[float]] = {name: [] for name in cases}
    cpu: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(WARM_STEPS + steps):
        for name, batch in batches.items():
            started, used = time.perf_counter(), time.process_time()
            batch.step()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    print(f"a step of {slots} answers: lower quartile of {steps} steps, in turns\n")
    print("| answers of a given form | step | ratio | processor time | ratio |\n|---|---|---|---|---|")
    for name in cases:
        cells = [name]
        for times in (wall, cpu):
            low, none = (statistics.quantiles(times[each][WARM_STEPS:], n=4)[0] for each in (name, "none"))
            cells += [f"{low * 1000:.2f} ms", f"{low / none:.3f}"]
        print(f"| {' | '.join(cells)} |")
    for batch in batches.values():
        batch.close()
    backend.reset()


# ---- 2. whether they have it -----------------------------------------------------------------------------------------


def print_valid(backend: MlxBackend, config: Config, count: int) -> int:
    """Returns how many answers do not have their form."""
    draw, kinds = random.Random(1), shapes()
    answers, schemas = Answers(backend, config), {}
    for key in range(count):
        schemas[key] = kinds[key % len(kinds)]
        asked = request(
            draw.choice(PROMPTS), schemas[key], temperature=draw.choice([0, 0.7, 1.3]), max_tokens=LIMIT_TOKENS
        )
        answers.begin(key, asked, seed=key)
    answers.complete()
    outcomes: collections.Counter[str] = collections.Counter()
    for key, schema in schemas.items():
        outcome = verdict(answers.text(key), schema, answers.reason(key))
        outcomes[outcome] += 1
        if outcome != "valid":
            print(outcome, json.dumps(schema), repr(answers.text(key)[:120]))
    print(f"{count} answers to {len(kinds)} schemas: " + ", ".join(f"{n} {what}" for what, n in outcomes.items()))
    return count - outcomes["valid"]


def verdict(text: str, schema: Any, reason: str | None) -> str:
    if reason != "stop":
        return f"ended by {reason}"
    try:
        instance = json.loads(text)
    except ValueError:
        return "no JSON"
    return "valid" if jsonschema_rs.is_valid(schema, instance) else "invalid"


# ---- 3. over a crash -------------------------------------------------------------------------------------------------


def print_continued(backend: MlxBackend, config: Config, count: int) -> int:
    """Returns how many answers went on in another way than without the crash."""
    draw, kinds = random.Random(2), shapes()
    whole, rest = Answers(backend, config), Answers(backend, config)
    asked = {
        key: request(draw.choice(PROMPTS), draw.choice(kinds), temperature=1, max_tokens=LIMIT_TOKENS)
        for key in range(count)
    }
    for key, each in asked.items():
        whole.begin(key, each, seed=key)
    whole.complete()
    backend.reset()
    for key, each in asked.items():
        tokens = whole.tokens(key)
        at = draw.randrange(len(tokens))
        rest.begin(key, each, seed=key, resume=tokens[:at])
    rest.complete()
    same = sum(whole.tokens(key)[-len(rest.tokens(key)) :] == rest.tokens(key) for key in asked)
    print(f"{same} of {count} seeded answers that were broken off went on with the same tokens")
    return count - same


def main() -> int:
    """Returns 0 if all answers have their form and go on as they began."""
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=PATH, help="an MLX folder (default: the demo model)")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="0 leaves the first part out")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--threads", type=int, default=CORES, help="of the BLAS library")
    options = parser.parse_args()
    os.environ.update(threads_environment(options.threads))
    library = asyncio.run(selected("auto", options.threads))
    load_blas(library.library if library else "")
    config = Config(slots=options.slots)
    backend = MlxBackend(config, str(options.model), lambda _: None)
    if options.steps:
        print_cost(backend, slots=options.slots, steps=options.steps)
    wrong = print_valid(backend, config, options.answers) if options.answers else 0
    backend.reset()
    wrong += print_continued(backend, config, options.answers // 10) if options.answers else 0
    backend.close()
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
