"""`headrace cancel`: cancel one request."""

from __future__ import annotations

from functools import partial

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, tell
from pipeline.wire.subjects import CANCEL, is_request_id


def cancel(request_id: str, url: str) -> int:
    """Cancel a request and print its state. Return 0, or 1 if the request is unknown, or 2 if the id is invalid."""
    if not is_request_id(request_id):
        tell(f'headrace: "{request_id}" is not a request id. Use 1 to 128 letters, digits, "-" or "_".')
        return 2
    return run_client(partial(_cancel, request_id), url, name="headrace cancel")


async def _cancel(request_id: str, bus: Bus) -> int:
    answer = await bus.request(f"{CANCEL}.{request_id}")
    state = str(msgspec.json.decode(answer.data).get("state", "unknown"))
    say(f"{request_id}: {state}")
    return 1 if state == "unknown" else 0
