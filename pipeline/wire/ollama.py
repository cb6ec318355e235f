"""Ollama's API as its servers see it: the bodies that clients send, and the parts that they read. No I/O.

Two servers speak it: the gateway, in front of the pipeline, and the stand-in, in front of one engine. The client's
side, in `consumers.engines.ollama`, is written apart, so that a misreading of the protocol cannot cancel itself out.

Source of the shapes: Ollama's API reference (`/api/chat`, `/api/generate`, `/api/embed`, `/api/tags`,
`/api/show`, `/api/ps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

FOR_EVER = "2318-01-01T00:00:00Z"  # when a model that is never unloaded expires

# ---- requests --------------------------------------------------------------------------------------------------------


class FunctionIn(Struct):
    """A function that was called: its arguments are an object here, not a string."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class CallIn(Struct):
    """A tool call in the conversation."""

    function: FunctionIn
    id: str = ""


class Turn(Struct):
    """A message of the conversation."""

    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[CallIn] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Body(Struct):
    """What chat and generate have in common. Fields that nobody knows are ignored, as Ollama does."""

    model: str = ""
    stream: bool | None = None
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None

    def _common(self) -> list[tuple[str, str, object]]:
        return [("think", "thinking", self.think), ("logprobs", "logprobs", self.logprobs)]


class ChatBody(Body):
    """The body of `POST /api/chat`."""

    messages: list[Turn] | None = None
    tools: list[Any] | None = None

    def unsupported(self) -> dict[str, str]:
        """What is asked for that would change the answer and that no server here can honour: field, and its name."""
        images = any(turn.images for turn in self.messages or ())
        return _wanted(("images", "images", images), *self._common())

    def fields(self) -> dict[str, Any]:
        """The conversation and its tools as fields of the pipeline's requests."""
        tools = {"tools": self.tools} if self.tools else {}
        return {"messages": _conversation(self.messages or ()), **tools}


class GenerateBody(Body):
    """The body of `POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    def unsupported(self) -> dict[str, str]:
        """As `ChatBody.unsupported`."""
        alike = [(name, name, getattr(self, name)) for name in ("images", "template", "context", "raw")]
        return _wanted(*alike, ("suffix", "insert", self.suffix), *self._common())

    def fields(self) -> dict[str, Any]:
        """The prompt as fields of the pipeline's requests."""
        turns = [Turn("system", self.system)] if self.system else []
        return {"messages": _conversation([*turns, Turn("user", self.prompt)])}


class EmbedBody(Struct):
    """The body of `POST /api/embed`."""

    model: str = ""
    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None


class EmbeddingBody(Struct):
    """The body of `POST /api/embeddings`, which `embed` has taken the place of."""

    model: str = ""
    prompt: str | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None


class ShowBody(Struct):
    """The body of `POST /api/show`; `name` is its old field."""

    model: str = ""
    name: str = ""


def response_format(wanted: Any) -> dict[str, Any] | None:
    """A body's `format` as the pipeline's `response_format`; raises ValueError for what Ollama does not know."""
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return {"type": "json_object"}
    if isinstance(wanted, dict):
        return {"type": "json_schema", "json_schema": {"schema": wanted}}
    raise ValueError('expected "json" or a JSON schema')


def _wanted(*features: tuple[str, str, object]) -> dict[str, str]:
    return {name: feature for name, feature, value in features if value}


def _conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [_message(turn) for turn in turns]


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role.lower(), "content": turn.content or ""}
    if turn.tool_calls:
        message["tool_calls"] = [_call_in(index, call) for index, call in enumerate(turn.tool_calls)]
    if turn.tool_name:
        message["name"] = turn.tool_name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _call_in(index: int, call: CallIn) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return {"id": call.id or f"call_{index}", "function": {"name": call.function.name, "arguments": arguments}}


# ---- answers ---------------------------------------------------------------------------------------------------------


class FunctionOut(Struct):
    """A function that the model calls."""

    index: int
    name: str
    arguments: Any


class CallOut(Struct):
    """A tool call of the model's."""

    id: str
    function: FunctionOut


class Message(Struct, omit_defaults=True):
    """The assistant's message, or a part of it."""

    role: str
    content: str
    tool_calls: list[CallOut] | None = None


class Part(Struct, omit_defaults=True, kw_only=True):
    """One line of an answer, or all of it; durations in nanoseconds. `message` is a chat's, `response` a text's."""

    model: str
    created_at: str
    message: Message | UnsetType = UNSET
    response: str | UnsetType = UNSET
    done: bool
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


def time_text(seconds: float) -> str:
    """A time in UTC unix seconds, as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
