"""What a client hears while its request waits: that it is alive, and where its request stands."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.gateway.dialects.ollama import NDJSON
from pipeline.gateway.dialects.shapes import Shape
from pipeline.wire.answers import Status
from pipeline.wire.messages import Position

# Where the request stands is said this often, seconds.
STATUS_S = 2.0
# Sent into a whole response before its body: JSON permits white space there.
SPACE = b"\n"


def said(status: Position | Status) -> dict[str, Any] | None:
    """The fields of a `headrace.status`; None for a request that has ended or is not known."""
    fields: dict[str, Any] = msgspec.to_builtins(status)
    if isinstance(status, Position) and status.state not in ("queued", "running"):
        return None
    return {"object": "headrace.status", **fields}


def status_part(shape: Shape, fields: dict[str, Any]) -> bytes:
    """A `headrace.status` as a part of a stream: an event, or in Ollama's API the field `headrace` of an empty part."""
    if shape.stream_type == NDJSON:
        return msgspec.json.encode(msgspec.json.decode(shape.keep_alive) | {"headrace": fields}) + b"\n"
    return b"event: headrace.status\ndata: " + msgspec.json.encode(fields | {"type": "headrace.status"}) + b"\n\n"
