"""Error codes, and the one exception that carries them.

Every failure in headrace ends in exactly one of these codes. The client reads it in its last message, the statistics
count it, and the trace records it. The set is closed, so a code is safe as a metric label.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ErrorCode(StrEnum):
    """The error codes of the wire contract."""

    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    REQUEST_TOO_LARGE = "request_too_large"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_INTERNAL = "model_internal"
    REPLY_SUBJECT_DENIED = "reply_subject_denied"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    INSUFFICIENT_QUOTA = "insufficient_quota"
    UNAUTHORIZED = "unauthorized"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    ENGINE_FAILED = "engine_failed"
    UNAVAILABLE = "unavailable"


_TYPES = {
    ErrorCode.INVALID_REQUEST: "invalid_request_error",
    ErrorCode.UNSUPPORTED_PARAMETER: "invalid_request_error",
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "invalid_request_error",
    ErrorCode.REQUEST_TOO_LARGE: "invalid_request_error",
    ErrorCode.MODEL_NOT_FOUND: "invalid_request_error",
    ErrorCode.MODEL_INTERNAL: "invalid_request_error",
    ErrorCode.REPLY_SUBJECT_DENIED: "invalid_request_error",
    ErrorCode.QUEUE_FULL: "rate_limit_error",
    ErrorCode.RATE_LIMITED: "rate_limit_error",
    ErrorCode.RATE_LIMIT_EXCEEDED: "rate_limit_error",
    ErrorCode.INSUFFICIENT_QUOTA: "insufficient_quota",
    ErrorCode.UNAUTHORIZED: "authentication_error",
    ErrorCode.DEADLINE_EXCEEDED: "timeout_error",
    ErrorCode.CANCELLED: "cancelled_error",
    ErrorCode.ENGINE_FAILED: "server_error",
    ErrorCode.UNAVAILABLE: "server_error",
}

_RETRYABLE = frozenset(
    {ErrorCode.QUEUE_FULL, ErrorCode.RATE_LIMITED, ErrorCode.RATE_LIMIT_EXCEEDED, ErrorCode.UNAVAILABLE}
)


class HeadraceError(Exception):
    """A failure with a code, sent to the client.

    Args:
        code: one of the closed set.
        message: what happened, to which request, and what to do next. The client sees it unchanged.
        param: the field of the request that is at fault, or None.
    """

    def __init__(self, code: ErrorCode, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """The family of the error, as OpenAI's API names it."""
        return _TYPES[self.code]

    @property
    def retryable(self) -> bool:
        """Whether the same request can succeed when it is sent again later."""
        return self.code in _RETRYABLE


def quoted(text: str, most: int = 80) -> str:
    """A client's own text inside a message: in double quotes, escaped, cut after `most` characters."""
    shown = text[:most].encode(errors="replace").decode()
    return msgspec.json.encode(shown if len(text) <= most else f"{shown}...").decode()
