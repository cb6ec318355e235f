"""Which HTTP status an error of the pipeline has, and when to come back."""

from __future__ import annotations

import math

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ErrorBody

# 499 is what proxies log for a client that has closed its request: nobody else ends one by a cancellation.
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
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.CANCELLED: 499,
    ErrorCode.ENGINE_FAILED: 502,
    ErrorCode.UNAVAILABLE: 503,
}
_MAX_RETRY_AFTER_S = 3600


class HttpError(HeadraceError):
    """An error of the pipeline with a status of its own, where HTTP knows it more exactly.

    Args:
        status: of the response.
        code, message, param: as `HeadraceError`.
        retry_after_s: when to try again, or None.
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
    """The status of the response that tells of error."""
    return error.status if isinstance(error, HttpError) else STATUS_OF[error.code]


def error_of(body: ErrorBody) -> HeadraceError:
    """The error that an engine has written into a record."""
    return HeadraceError(body.code, body.message, param=body.param)


def headers_of(error: HeadraceError) -> dict[str, str]:
    """What goes along with error: when to come back, and that a client need not try at once what cannot succeed."""
    headers = {} if error.retryable else {"x-should-retry": "false"}
    retry_after_s = error.retry_after_s if isinstance(error, HttpError) else None
    if retry_after_s is not None:
        headers["retry-after"] = str(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(retry_after_s))))
    elif status_of(error) in (429, 503):
        headers["retry-after"] = "1"
    return headers
