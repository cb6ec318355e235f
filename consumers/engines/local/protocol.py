"""The frames between an engine's parent and child process, and their encoding on the pipe.

A frame is its length in four bytes (big endian), then one MessagePack array. The child sends one `Step` per decoding
step for all sequences, so that a full batch wakes the parent's event loop once a step.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Struct, field

from pipeline.core.kv import KvSize
from pipeline.engine import Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

LENGTH_BYTES: Final = 4


# ---- parent to child -------------------------------------------------------------------------------------------------


class Submit(Struct, tag="submit", array_like=True):
    """Begin or resume a request. `key` identifies it on this pipe.

    `epoch` is the number of resets of the child that the parent knew of when it sent the frame. The child drops frames
    from before its last reset. The parent counts those requests among the ones that the reset lost, and submits them
    again.
    """

    key: int
    epoch: int
    work: Work


class Cancel(Struct, tag="cancel", array_like=True):
    """Remove a request from the batch. An unknown key is ignored: the child may have just finished the request."""

    key: int


class Count(Struct, tag="count", array_like=True):
    """Count the tokens of a request's prompt. `key` identifies the question on this pipe."""

    key: int
    request: ChatRequest


class Shutdown(Struct, tag="shutdown", array_like=True):
    """End gracefully. The end of the pipe means the same."""


ToChild = Submit | Cancel | Count | Shutdown


# ---- child to parent -------------------------------------------------------------------------------------------------


class Loading(Struct, tag="loading", array_like=True):
    """The progress of loading, in words for the user, and in bytes of the weights; 0 if they are not known."""

    note: str
    done_bytes: int = 0
    total_bytes: int = 0


class Facts(Struct, array_like=True):
    """Facts about the loaded model.

    Attributes:
        kv_bytes_per_token, kv_bytes_fixed, kv_windows: the cache of one sequence, as in `KvSize`.
        gflops: the measured speed of a float32 product on the CPU, in 10⁹ operations a second; 0 on a GPU.
        weights: the type of the weights on a CPU, such as `float32` or `4-bit`; empty on a GPU.
        suspends: whether a sequence can leave the batch with its cache and come back.
        slots: how many sequences run at once, if the backend itself determines it; 0 if that is found.
        free_bytes: memory for KV caches that was free after loading; 0 if not known.
        thinks: whether the model may reason before it answers.
        alone: why sequences are computed one at a time and not together, in words; empty if they are not.
        reuse: how caches can be kept for later sequences: not, cut at any token, or whole.
    """

    context_tokens: int
    vocabulary: int
    calls_tools: bool
    kv_bytes_per_token: int
    gflops: float = 0.0
    weights: str = ""
    kv_bytes_fixed: int = 0
    suspends: bool = True
    slots: int = 0
    free_bytes: int = 0
    alone: str = ""
    kv_windows: tuple[tuple[int, int], ...] = ()
    thinks: bool = False
    reuse: Literal["", "segments", "snapshots"] = ""

    @property
    def kv(self) -> KvSize:
        """The size of the cache of one sequence."""
        return KvSize(self.kv_bytes_per_token, self.kv_bytes_fixed, self.kv_windows)


class Ready(Struct, tag="ready", array_like=True):
    """The model is loaded and has run once. `memory_bytes` is what its weights take; 0 if that is not known."""

    facts: Facts
    memory_bytes: int = 0


class LoadFailed(Struct, tag="failed", array_like=True):
    """The model could not be loaded, and the child ends. `reason` is the error and what to do about it."""

    reason: str


class Rejected(Struct, tag="rejected", array_like=True):
    """One request is refused or has failed. The other requests go on."""

    key: int
    code: ErrorCode
    message: str
    param: str | None = None

    @classmethod
    def of(cls, key: int, error: HeadraceError) -> Rejected:
        """The frame for error."""
        return cls(key, error.code, error.message, error.param)

    def error(self) -> HeadraceError:
        """The frame as an exception."""
        return HeadraceError(self.code, self.message, param=self.param)


class Counted(Struct, tag="counted", array_like=True):
    """The answer to a `Count`: the tokens, or why the request is refused."""

    key: int
    tokens: int = 0
    refusal: Rejected | None = None


class Stats(Struct, array_like=True):
    """The engine after a step: as the fields of `EngineStatus`. 0 means not known yet.

    `slots` is the number of sequences that run at once at present. `reused_tokens` of all `prompt_tokens` so far were
    taken from kept caches, whose size is `kept_bytes`, and `stored_bytes` that of their files. A draft model has
    proposed `drafted_tokens`, of which `accepted_tokens` were right.
    """

    pending_tokens: float = 0.0
    kv_bytes: int = 0
    tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0
    pending_prompt_tokens: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prompt_tokens_per_request: float = 0.0
    slots: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    kept_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    stored_bytes: int = 0


class Step(Struct, tag="step", array_like=True):
    """One step: the pieces that the sequences produced, by key. A step of prefill alone has no pieces.

    Before it, the `resumed` sequences were put back into the batch, and the `suspended` ones taken out. The pieces of
    a suspended sequence are from before.
    """

    pieces: list[tuple[int, Piece]]
    stats: Stats = field(default_factory=Stats)
    suspended: list[int] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)


class Reset(Struct, tag="reset", array_like=True):
    """A step raised. The batch and its requests are lost; the model is still loaded.

    `epoch` is the new epoch. `facts` are those of the model from now on.
    """

    epoch: int
    error: str
    facts: Facts


FromChild = Loading | Ready | LoadFailed | Rejected | Counted | Step | Reset

_encoder = msgspec.msgpack.Encoder()
_to_child = msgspec.msgpack.Decoder(ToChild)
_from_child = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """The frame, with its length in front."""
    body = _encoder.encode(frame)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_to_child(body: bytes) -> ToChild:
    """Decode a frame from the parent."""
    return _to_child.decode(body)


def decode_from_child(body: bytes) -> FromChild:
    """Decode a frame from the child."""
    return _from_child.decode(body)
