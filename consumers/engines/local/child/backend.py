"""The interface between the child's loop and a backend, which samples tokens: MLX or the simulated engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct, field

from consumers.engines.local.child.guided import Guide
from consumers.engines.local.child.prompt_files import PromptFiles
from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Facts
from pipeline.core.batch_plan import FetchKept, Keep, Restore, StoreKept
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest


class LoadError(Exception):
    """The model cannot be loaded. The message says why, and what to do."""


class Prepared(Struct):
    """A request that has been checked and may enter the batch.

    Attributes:
        prompt: the tokens that the model reads before it samples: those of the prompt, then the resumed ones.
        position: the index in the answer of the token sampled next, from 0.
        detail: for the backend alone.
        exact: whether what the model computes for it must not depend on anything else.
        guide: what may follow, if the answer must have a form.
        tenant: for whom it is. Only sequences of one tenant use each other's caches.
        adapter: the number of its adapter; 0 for none. Only sequences of one adapter use each other's caches.
        marks: how many tokens there are up to the end of the system prompt and of the last message. Empty if caches can
            be cut anywhere, or are not kept.
    """

    key: int
    prompt: list[int]
    position: int
    transcript: Transcript
    detail: Any = None
    exact: bool = False
    guide: Guide | None = None
    tenant: str = ""
    adapter: int = 0
    marks: list[int] = field(default_factory=list)

    @property
    def longest_tokens(self) -> int:
        """The most tokens that the sequence may have, prompt and answer together."""
        return len(self.prompt) - self.position + self.transcript.max_tokens


class Suspended(Struct):
    """What became of sequences that were taken out of the batch.

    Attributes:
        kept_bytes: the size of the cache of each, by key.
        sampled: pairs of key and token, for tokens that had been sampled and not been returned yet.
    """

    kept_bytes: dict[int, int]
    sampled: list[tuple[int, int]]


class Batch(Protocol):
    """The sequences of a backend. Used by the child's main thread.

    `pipeline.core.batch` decides what is done. After an exception, only `Backend.reset` and `Backend.close` may be
    called.

    Attributes:
        ahead: how many tokens beyond one the latest step has added to the cache of the only sequence that decodes.
    """

    ahead: int

    def read(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Read the given number of next tokens of each of these sequences, as pairs of key and number.

        Returns pairs of key and token: one for each sequence whose prompt is now complete.
        """
        ...

    def join(self, keys: list[int]) -> None:
        """Let the next step read the last token of these sequences, and sample their first one."""
        ...

    def step(self) -> list[tuple[int, int]]:
        """Decode one token for every sequence that has been read. Returns pairs of key and token.

        A token may be returned one step later, except the first of a sequence. A sequence that is decoded alone may get
        several tokens, whose number is `ahead` and one.
        """
        ...

    def suspend(self, keys: list[int]) -> Suspended:
        """Take sequences out of the batch, with their caches."""
        ...

    def drop(self, key: int) -> None:
        """Free the cache of a suspended sequence. All its tokens are read again."""
        ...

    def resume(self, keys: list[int]) -> None:
        """Put suspended sequences back. They go on exactly where they were."""
        ...

    def cached(self, key: int) -> list[int]:
        """The tokens of a sequence whose state is in its cache. Empty for an unknown key."""
        ...

    def keep(self, keep: Keep) -> int:
        """Keep a part of the cache of a sequence for later ones. Returns its size in bytes."""
        ...

    def load(self, load: Restore) -> None:
        """Give a sequence of which nothing was read a cache made of what was kept."""
        ...

    def fetch(self, fetch: FetchKept) -> int:
        """Keep what is in files. Returns its size in bytes."""
        ...

    def store(self, store: StoreKept) -> int:
        """Write what is kept to a file. Returns its size in bytes.

        Raises:
            OSError: it cannot be written.
        """
        ...

    def free(self, handles: list[int]) -> None:
        """Free what was kept under these handles."""
        ...

    def remove(self, key: int) -> None:
        """Remove a sequence, wherever it is. An unknown key is ignored."""
        ...

    def kv_bytes(self) -> int:
        """The size of all KV caches, in bytes."""
        ...


class Backend(Protocol):
    """A model, and the sequences that it decodes. Used by the child's main thread, except `prepare`.

    Attributes:
        facts: of the model.
        on_cpu: whether it runs on the CPU.
        files: where kept caches are stored as well; None if they are not.
    """

    facts: Facts
    on_cpu: bool
    files: PromptFiles | None

    @property
    def batch(self) -> Batch:
        """The sequences."""
        ...

    def prepare(self, key: int, work: Work) -> Prepared:
        """Check a request and tokenise it. Called from the reading thread; does not touch what `batch` uses.

        Raises:
            HeadraceError: the request cannot be served.
        """
        ...

    def count_tokens(self, request: ChatRequest) -> int:
        """The number of tokens of a request's prompt. As `prepare`."""
        ...

    def drafted(self) -> tuple[int, int]:
        """How many tokens a draft model has proposed, and how many of them were right."""
        ...

    def insert(self, sequence: Prepared) -> None:
        """Take a sequence. Nothing of it has been read."""
        ...

    def reset(self, *, alone: str = "") -> None:
        """Replace the batch by an empty one. The model stays loaded.

        With `alone`, which says why, the new one computes each sequence by itself. `facts` change accordingly.
        """
        ...

    def close(self) -> None:
        """Free the batch and the model."""
        ...


Note = Callable[[str], None]
"""Called with the progress of loading, in words."""
