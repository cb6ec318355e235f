"""The HTTP status of each error code, and when to retry."""

from __future__ import annotations

import math

from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError

# 499: proxies log it for a client that closed its request. HTTP has no status of its own for a cancellation.
STATUS_OF: dict[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNSUPPORTED_PARAMETER: 400,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.REQUEST_TOO_LARGE: 413,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.MODEL_INTERNAL: 404,
    ErrorCode.REPLY_SUBJECT_DENIED: 400,
    ErrorCode.QUEUE_FULL: 503,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.RATE_LIMIT_EXCEEDED: 429,
    ErrorCode.INSUFFICIENT_QUOTA: 429,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,
    ErrorCode.ENGINE_FAILED: 502,
    ErrorCode.UNAVAILABLE: 503,
}
_MAX_RETRY_AFTER_S = 3600


class HttpError(HeadraceError):
    """An error with a status of its own, where HTTP has a more exact one than its code's.

    Args:
        status: of the response.
        code, message, param: as `HeadraceError`.
        retry_after_s: seconds until a retry can succeed, or None.
    """

    def __init__(
        self,
        status: int,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(code, message, param=param)
        self.status = status
        self.retry_after_s = retry_after_s


def status_of(error: HeadraceError) -> int:
    """The status of an error's response."""
    return error.status if isinstance(error, HttpError) else STATUS_OF[error.code]


def error_of(body: ErrorBody) -> HeadraceError:
    """An error message of a record, as an exception."""
    return HeadraceError(body.code, body.message, param=body.param)


def headers_of(error: HeadraceError) -> dict[str, str]:
    """An error's headers: when to retry, or that a retry cannot succeed."""
    headers = {} if error.retryable else {"x-should-retry": "false"}
    retry_after_s = error.retry_after_s if isinstance(error, HttpError) else None
    if retry_after_s is not None:
        headers["retry-after"] = str(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(retry_after_s))))
    elif status_of(error) in (429, 503):
        headers["retry-after"] = "1"
    return headers
