"""Files and batches as OpenAI's API has them, and what the stream of batches keeps of each.

Source of the shapes: the OpenAI API reference (files, batches, batch input and output). Times are unix seconds.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct

from pipeline.wire.subjects import BATCHES, FILE_CHUNKS, FILE_NOTES

# Of one batch: OpenAI's limits.
MAX_LINES = 50_000
MAX_FILE_BYTES = 200 << 20
# The ids of batches and files are parts of subjects.
_ID = re.compile(r"(batch|file)[_-][0-9A-Za-z_-]{1,80}", re.ASCII)
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 7 * 86400


class BatchStatus(StrEnum):
    """The status of a batch, by OpenAI's names."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the batch does not change any more."""
        return self in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


class FileObject(Struct):
    """A file, as OpenAI's API shows it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int
    object: str = "file"
    status: str = "processed"


class FileDeleted(Struct):
    """The result of deleting a file."""

    id: str
    deleted: bool = True
    object: str = "file"


class LineFault(Struct):
    """Why a line of an input file is not valid. Without a line, it is about the file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class FaultList(Struct):
    """Why a batch failed validation."""

    data: list[LineFault]
    object: str = "list"


class RequestCounts(Struct):
    """How many lines a batch has, and how many of them have ended."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(Struct):
    """A batch, as OpenAI's API shows it."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    object: str = "batch"
    status: BatchStatus = BatchStatus.VALIDATING
    errors: FaultList | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None


class BatchOrder(Struct):
    """A batch as it was created. It never changes.

    Attributes:
        window_s: seconds from its creation to its deadline.
        tenant: of the caller; empty without keys.
        owner: the tenant on whose lanes its lines are; empty for the default tenant.
        key: the API key that its lines are charged to; empty without keys.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: int
    created_at: int
    metadata: dict[str, str] | None = None
    tenant: str = ""
    owner: str = ""
    key: str = ""

    def begun(self) -> BatchObject:
        """The batch before its first line was read."""
        return BatchObject(
            id=self.id,
            endpoint=self.endpoint,
            input_file_id=self.input_file_id,
            completion_window=self.completion_window,
            created_at=self.created_at,
            expires_at=self.created_at + self.window_s,
            metadata=self.metadata,
        )


class BatchCall(Struct):
    """The body of a call that creates a batch."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class LineBody(Struct):
    """One line of an input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(Struct):
    """The response to a line, as an HTTP call would have it."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineTrouble(Struct):
    """Why a line has no response."""

    code: str
    message: str


class LineResult(Struct):
    """One line of an output or an error file."""

    id: str
    custom_id: str
    response: LineResponse | None = None
    error: LineTrouble | None = None


class BatchPart(StrEnum):
    """What the stream keeps of a batch, each on a subject of its own."""

    ORDER = "order"
    CANCEL = "cancel"
    STATE = "state"
    OUTPUT = "output"
    ERROR = "error"


def part_subject(batch_id: str, part: BatchPart) -> str:
    """The subject of one part of a batch; `*` for all batches."""
    return f"{BATCHES}.{batch_id}.{part}"


def line_id(batch_id: str, number: int) -> str:
    """The request id of a line, counted from 1. It names the line, so feeding a line twice is one request."""
    return f"{batch_id}-{number}"


def chunks_subject(content_id: str) -> str:
    """The subject of a file's chunks, by the id that the object store gave its content."""
    return f"{FILE_CHUNKS}.{content_id}"


def notes_subject() -> str:
    """The subjects of the notes on all files."""
    return f"{FILE_NOTES}.*"


def is_stored_id(text: str) -> bool:
    """Whether text can be the id of a file or a batch."""
    return _ID.fullmatch(text) is not None


def window_s(text: str) -> int | None:
    """The seconds of a completion window such as `24h`; None for one that is not valid."""
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    return seconds if 0 < seconds <= MAX_WINDOW_S else None


def faulty(batch: BatchObject, faults: list[LineFault], at: int) -> BatchObject:
    """The batch after its validation failed."""
    changes: dict[str, Any] = {"status": BatchStatus.FAILED, "errors": FaultList(faults), "failed_at": at}
    return msgspec.structs.replace(batch, **changes)
