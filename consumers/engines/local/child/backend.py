"""The interface between the child's loop and a backend, which samples tokens: MLX or the simulated engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct

from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Facts
from pipeline.engine import Work


class LoadError(Exception):
    """The model cannot be loaded. The message says why, and what to do."""


class Prepared(Struct):
    """A request that has been checked and may enter the batch.

    Attributes:
        prompt: the tokens that the model reads before it samples: those of the prompt, then the resumed ones.
        position: the index in the answer of the token sampled next, from 0.
        detail: for the backend alone.
    """

    key: int
    prompt: list[int]
    position: int
    transcript: Transcript
    detail: Any = None

    @property
    def longest_tokens(self) -> int:
        """The most tokens that the sequence may have, prompt and answer together."""
        return len(self.prompt) - self.position + self.transcript.max_tokens


class Backend(Protocol):
    """Samples tokens for a batch of sequences. Used by the child's main thread, except `prepare`."""

    facts: Facts

    def prepare(self, key: int, work: Work) -> Prepared:
        """Check a request and tokenise it. Called from the reading thread; does not touch what `step` uses.

        Raises:
            HeadraceError: the request cannot be served.
        """
        ...

    def insert(self, sequence: Prepared) -> None:
        """Add a sequence to the batch."""
        ...

    def remove(self, key: int) -> None:
        """Remove a sequence from the batch. An unknown key is ignored."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """Prefill a bounded part of the prompts, and decode one token for every sequence whose prompt is done.

        Returns pairs of key and token. After an exception, only `reset` and `close` may be called.
        """
        ...

    def reset(self) -> None:
        """Replace the batch by an empty one. The model stays loaded."""
        ...

    def kv_bytes(self) -> int:
        """The size of the batch's KV cache, in bytes."""
        ...

    def close(self) -> None:
        """Free the batch and the model."""
        ...


Note = Callable[[str], None]
"""Called with the progress of loading, in words."""
