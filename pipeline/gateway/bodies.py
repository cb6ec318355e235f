"""Reading a request's body, within a size and a time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, quoted

# A body that is too large is still read up to this many times the limit, and dropped.
_DROPPED_BODIES = 16


async def read_body(request: Request, *, limit: int, within_s: float) -> bytes:
    """A request's body of at most `limit` bytes.

    Raises:
        HttpError: 413 if it is too large, 408 if it does not arrive within within_s seconds, 415 if it is compressed.
    """
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        message = f"Content-Encoding {quoted(coding, 40)} is not supported. Send the body uncompressed."
        raise HttpError(415, ErrorCode.INVALID_REQUEST, message, param="Content-Encoding")
    length = request.headers.get("content-length", "")
    body, size = bytearray(), 0
    # A client that is still sending would see a broken connection instead of the error, so a body that is too large is
    # read to its end and dropped, up to a bound.
    most = limit * _DROPPED_BODIES
    if not (length.isdecimal() and int(length) > most):
        try:
            async with asyncio.timeout(within_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        break
                    if size <= limit:
                        body += part
        except TimeoutError:
            message = f"The body did not arrive within {within_s:g} s. Send the request again."
            raise HttpError(408, ErrorCode.INVALID_REQUEST, message) from None
        if size <= limit:
            return bytes(body)
    raise HttpError(413, ErrorCode.REQUEST_TOO_LARGE, f"The body is too large. The limit is {limit} bytes.")
