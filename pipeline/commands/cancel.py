"""`headrace cancel`: withdraw one request."""

from __future__ import annotations

from functools import partial

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, tell
from pipeline.wire.subjects import CANCEL, is_request_id


def cancel(request_id: str, url: str) -> int:
    """Cancel a request; prints its state. Returns 0 unless the pipeline knows no such request."""
    if not is_request_id(request_id):
        tell(f"headrace: {request_id!r} cannot be a request's id")
        return 2
    return run_client(partial(_cancel, request_id), url, name="headrace cancel")


async def _cancel(request_id: str, bus: Bus) -> int:
    answer = await bus.request(f"{CANCEL}.{request_id}")
    state = str(msgspec.json.decode(answer.data).get("state", "unknown"))
    say(f"{request_id}: {state}")
    return 1 if state == "unknown" else 0
