"""What a model computes for one request, alone and disturbed, to the last bit.

Run as a program: `exactly.py BLAS EXACT` prints, for a run alone and for each disturbed one, a digest of the
probabilities from which each token of the watched answer was sampled. The disturbed runs have the request in a full
batch and, if it is exact, suspended by more urgent ones, read again because its cache was dropped, resumed after some
tokens, and with a prompt that an earlier request has left.
"""

from __future__ import annotations

import hashlib
import json
import queue
import sys
from typing import Any

import msgspec

from consumers.demo_model import PATH
from consumers.engines.local.child.loop import Begin, EngineLoop
from consumers.engines.local.child.mlx import MlxBackend
from consumers.engines.local.child.speed import load_blas
from consumers.engines.local.protocol import Rejected, Step
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatMessage, ChatRequest
from pipeline.wire.subjects import Priority

TOKENS = 24
WATCHED = 1
PROMPT = "Count from one to twenty, and say what each of the numbers is good for. " * 4


class Watching(MlxBackend):
    """The backend, with a digest of what each token of the watched request was sampled from."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, str(PATH), lambda _: None)
        self.digests: dict[int, str] = {}

    def _sampler(self, request: ChatRequest, seed: int, position: int) -> Any:
        sample = super()._sampler(request, seed, position)
        if seed != WATCHED:
            return sample
        at = position

        def watched(logprobs: Any) -> Any:
            nonlocal at
            self.digests[at] = hashlib.sha256(memoryview(logprobs.astype(self._mx.float32))).hexdigest()[:16]
            at += 1
            return sample(logprobs)

        return watched


class Run:
    """One loop on the backend, whose batch is empty. The watched request has the key 1."""

    def __init__(self, backend: Watching, *, exact: bool, **options: Any) -> None:
        config = Config(slots=8, **options)
        backend.reset()
        backend.digests.clear()
        self.backend = backend
        self.commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.tokens: dict[int, list[int]] = {}
        self.suspended = 0
        self.loop = EngineLoop(self.backend, self.commands, self.take, config)
        self.exact, self.started = exact, False

    def take(self, frame: Any) -> None:
        assert not isinstance(frame, Rejected), frame
        if isinstance(frame, Step):
            self.suspended += WATCHED in frame.suspended
            for key, piece in frame.pieces:
                self.tokens.setdefault(key, []).extend(piece.token_ids)

    def begin(self, key: int, *, priority: Priority = Priority.LOW, resume: list[int] | None = None) -> None:
        request = ChatRequest(
            messages=[ChatMessage("user", PROMPT if key == WATCHED else PROMPT[: 20 * key])],
            max_tokens=TOKENS,
            temperature=1.0,
            exact=self.exact and key == WATCHED,
        )
        work = Work(id=str(key), request=request, model="", seed=key, resume_tokens=resume or [])
        self.commands.put(Begin(0, self.backend.prepare(key, work), None, priority))

    def until(self, tokens: int) -> None:
        """Run until the watched answer has so many tokens, or has ended."""
        while len(self.tokens.get(WATCHED, [])) < tokens and not (self.started and WATCHED not in self.loop._begun):
            self.loop.turn()
            self.started |= WATCHED in self.loop._begun

    def digests(self) -> list[str]:
        self.until(TOKENS)
        return [digest for _, digest in sorted(self.backend.digests.items())]


def alone(backend: Watching, *, exact: bool) -> tuple[list[str], list[int]]:
    run = Run(backend, exact=exact)
    run.begin(WATCHED)
    return run.digests(), run.tokens[WATCHED]


def in_a_batch(backend: Watching, *, exact: bool) -> list[str]:
    run = Run(backend, exact=exact)
    for key in range(2, 6):
        run.begin(key)
    run.begin(WATCHED)
    run.until(3)
    for key in range(6, 9):
        run.begin(key)
    return run.digests()


def suspended(backend: Watching, *, kept_bytes: int) -> list[str]:
    run = Run(backend, exact=True, kept_kv_bytes=kept_bytes)
    run.begin(WATCHED)
    run.until(4)
    for key in range(2, 11):
        run.begin(key, priority=Priority.HIGH)
    found = run.digests()
    assert run.suspended
    return found


def resumed(backend: Watching, tokens: list[int], after: int) -> list[str]:
    run = Run(backend, exact=True)
    for key in range(2, 5):
        run.begin(key)
    run.begin(WATCHED, resume=tokens[:after])
    return run.digests()


def reused(backend: Watching) -> list[str]:
    """After the same request, from whose prompt it goes on."""
    run = Run(backend, exact=True)
    run.begin(WATCHED)
    run.digests()
    backend.digests.clear()
    run.tokens.clear()
    run.started = False
    for key in range(2, 5):
        run.begin(key)
    run.begin(WATCHED)
    found = run.digests()
    assert run.loop._planner.reuse.cached_tokens >= 32
    return found


def main(blas: str, exact: bool) -> None:
    load_blas(blas)
    backend = Watching(Config())
    whole, tokens = alone(backend, exact=exact)
    disturbed = {"in a batch": in_a_batch(backend, exact=exact)}
    if exact:
        disturbed["suspended"] = suspended(backend, kept_bytes=1 << 30)
        disturbed["dropped"] = suspended(backend, kept_bytes=0)
        disturbed["reused"] = reused(backend)
        disturbed |= {f"resumed after {n}": [*whole[:n], *resumed(backend, tokens, n)] for n in (1, 9, TOKENS - 1)}
    backend.close()
    print(json.dumps({"alone": whole, "disturbed": disturbed}))


if __name__ == "__main__":
    main(sys.argv[1], msgspec.json.decode(sys.argv[2], type=bool))
