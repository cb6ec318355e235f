"""The trace of a request whose publisher did not begin one.

Every process derives the same ids from facts that it knows about the request. So deliveries, moves and the monitor's
spans belong to one trace, although nothing is added to the request and the processes do not exchange the ids.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class TraceOrigin(NamedTuple):
    """The trace id (128 bits) and the span id (64 bits) of the trace's first span. Neither is 0."""

    trace_id: int
    span_id: int


def trace_origin(request_id: str, created: int) -> TraceOrigin:
    """The ids for a request.

    Args:
        request_id: the request's id. One that the broker assigned contains the stored sequence.
        created: the second in which the broker first stored the request (UTC). Moves keep it, and it distinguishes a
            later request with the same id, and `LLM-1` of this broker from that of another.
    """
    digest = hashlib.blake2b(f"trace of {request_id}@{created}".encode(), digest_size=24).digest()
    return TraceOrigin(int.from_bytes(digest[:16], "big") or 1, int.from_bytes(digest[16:], "big") or 1)
