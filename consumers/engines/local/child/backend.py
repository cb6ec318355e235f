"""What the child's loop needs of whatever turns sequences into tokens: MLX or a simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct

from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Facts
from pipeline.engine import Work


class LoadError(Exception):
    """The model cannot be loaded; the message says why and what to do."""


class Prepared(Struct):
    """A request that has been checked and may enter the batch.

    `prompt` is everything the model reads before it samples: the prompt's tokens, then the resumed ones. `position` is
    the answer's token sampled next, counted from 0. `detail` is the backend's own.
    """

    key: int
    prompt: list[int]
    position: int
    transcript: Transcript
    detail: Any = None

    @property
    def longest_tokens(self) -> int:
        """How long the sequence may become, prompt and answer."""
        return len(self.prompt) - self.position + self.transcript.max_tokens


class Backend(Protocol):
    """Owned by the child's main thread; only `prepare` is called from another one."""

    facts: Facts

    def prepare(self, key: int, work: Work) -> Prepared:
        """Check a request and tokenise it. Touches nothing that `step` uses.

        Raises:
            HeadraceError: what cannot be served, with its code.
        """
        ...

    def insert(self, sequence: Prepared) -> None:
        """Take a sequence into the batch."""
        ...

    def remove(self, key: int) -> None:
        """Take a sequence out; an unknown key is ignored."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """Decode one token for every sequence that is past its prompt, and prefill a bounded part of one prompt.

        Returns pairs of key and token. After an exception only `reset` and `close` may be called.
        """
        ...

    def reset(self) -> None:
        """Throw the batch away and begin with an empty one; the model stays."""
        ...

    def kv_bytes(self) -> int:
        """What the batch holds of the KV cache."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


Note = Callable[[str], None]
"""Told how far loading has come."""
