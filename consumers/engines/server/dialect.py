"""What a model server's API must tell the engine in front of it. One implementation for each API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from consumers.engines.server.errors import ServerError
from pipeline.core.server_pace import Timing
from pipeline.engine import Embedded, Piece, Work
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import Dialect, ModelFacts
from pipeline.wire.requests import EmbeddingRequest


class ServerModel(Protocol):
    """A model in a server's list."""

    @property
    def name(self) -> str:
        """Its name in calls."""

    @property
    def size(self) -> int | None:
        """The bytes of its files; None if the server does not tell."""

    @property
    def parameters(self) -> float:
        """How many parameters it has; 0 if the server does not tell."""

    @property
    def chats(self) -> bool:
        """Whether it answers users' chats."""

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings, and does not chat."""

    @property
    def calls_tools(self) -> bool:
        """Whether the server reports that it calls tools."""

    @property
    def family(self) -> str:
        """The architecture; empty if the server does not tell."""

    @property
    def standin(self) -> bool:
        """Whether headrace's own stand-in serves it."""


class PartReader(Protocol):
    """Turns the parts of one answer into pieces.

    Attributes:
        timing: the figures of the answer, once its last part was read; None before.
    """

    timing: Timing | None

    def read(self, part: dict[str, Any]) -> Piece:
        """A part of the answer as a piece. The last one has its `usage`.

        Raises:
            BadAnswer: the part does not have the shape of the API's.
            HeadraceError: the request ends with it.
        """
        ...


class Call(NamedTuple):
    """A call that has not begun.

    Attributes:
        parts: the streamed answer. Iterating it makes the call; closing it disconnects. It raises ServerError.
        reader: of the parts.
        limit: the most tokens of the answer.
    """

    parts: AsyncGenerator[dict[str, Any], None]
    reader: PartReader
    limit: int


M = TypeVar("M", bound=ServerModel)


class ServerDialect(Protocol[M]):
    """One server, in the terms of its API.

    Attributes:
        dialect: the API's name.
        label: the server, as the subject of a sentence.
        place: the same, with its URL.
        url: the URL, without credentials.
        is_local: whether the server is on this machine.
        continues: whether another attempt may go on with an answer that has begun.
        advice: what to do where the server has no usable model.
    """

    dialect: Dialect
    label: str
    place: str
    url: str
    is_local: bool
    continues: bool
    advice: str

    async def models(self) -> Sequence[M]:
        """The models of the server; raises ServerError."""
        ...

    async def loaded(self) -> Mapping[str, int] | None:
        """The bytes on a GPU of each model in memory, by name; None if the server does not say. Never raises."""
        ...

    def facts(self, model: M, loaded: Mapping[str, int]) -> ModelFacts:
        """What is known of a model."""
        ...

    def call(self, work: Work, model: M | None) -> Call:
        """The call for work. `model` is the server's entry for it, None if the list does not have it.

        Raises:
            HeadraceError: the server cannot do the work.
        """
        ...

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """The vectors of texts; raises ServerError, or BadAnswer."""
        ...

    def refusal(self, error: ServerError) -> HeadraceError | None:
        """The request's error, if the server's error is the request's own fault."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...
