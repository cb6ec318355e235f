"""The frames between an engine's parent and its child, and their form on the pipe.

A frame is four bytes of length (big endian), then one MessagePack array. The child sends one `Step` a decoding step,
whatever the number of sequences, so that a full batch costs the parent's event loop one wake-up a step.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct, field

from pipeline.engine import Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError

LENGTH_BYTES: Final = 4


# ---- parent to child -------------------------------------------------------------------------------------------------


class Submit(Struct, tag="submit", array_like=True):
    """Begin a request, or go on with it. `key` names it on this pipe.

    `epoch` is how many resets of the child the parent knew of when it wrote this. The child drops what is older than
    its last reset: the parent counts those among what the reset threw out, and submits them again.
    """

    key: int
    epoch: int
    work: Work


class Cancel(Struct, tag="cancel", array_like=True):
    """Take a request out of the batch; unknown keys are ignored, since the child may just have finished it."""

    key: int


class Shutdown(Struct, tag="shutdown", array_like=True):
    """End in order. The end of the pipe means the same."""


ToChild = Submit | Cancel | Shutdown


# ---- child to parent -------------------------------------------------------------------------------------------------


class Loading(Struct, tag="loading", array_like=True):
    """How far loading has come, for a person to read."""

    note: str


class Facts(Struct, array_like=True):
    """What a loaded model is: token counts, and KV bytes that one token of one sequence takes."""

    context_tokens: int
    vocabulary: int
    calls_tools: bool
    kv_bytes_per_token: int


class Ready(Struct, tag="ready", array_like=True):
    """The model is loaded and warm."""

    facts: Facts


class Failed(Struct, tag="failed", array_like=True):
    """The model could not be loaded; the child ends after this. `reason` says what to do about it."""

    reason: str


class Rejected(Struct, tag="rejected", array_like=True):
    """One request is refused, or fails alone; the others are untouched."""

    key: int
    code: ErrorCode
    message: str
    param: str | None = None

    @classmethod
    def of(cls, key: int, error: HeadraceError) -> Rejected:
        """The frame that carries error."""
        return cls(key, error.code, error.message, error.param)

    def error(self) -> HeadraceError:
        """The exception that the frame carries."""
        return HeadraceError(self.code, self.message, param=self.param)


class Stats(Struct, array_like=True):
    """The engine after a step: output tokens still expected, KV bytes held, measured rates (0: not known yet)."""

    pending_tokens: float = 0.0
    kv_bytes: int = 0
    tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0


class Step(Struct, tag="step", array_like=True):
    """One step: what every sequence that moved has produced, by key. A step of prefill alone has no pieces."""

    pieces: list[tuple[int, Piece]]
    stats: Stats = field(default_factory=Stats)


class Reset(Struct, tag="reset", array_like=True):
    """A step raised: the batch is gone with everything in it, the model is still loaded. `epoch` is the new one."""

    epoch: int
    error: str


FromChild = Loading | Ready | Failed | Rejected | Step | Reset

_encoder = msgspec.msgpack.Encoder()
_to_child = msgspec.msgpack.Decoder(ToChild)
_from_child = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """The frame with its length before it."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_to_child(body: bytes) -> ToChild:
    """Read a frame that the parent wrote."""
    return _to_child.decode(body)


def decode_from_child(body: bytes) -> FromChild:
    """Read a frame that the child wrote."""
    return _from_child.decode(body)
