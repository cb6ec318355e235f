"""`headrace cancel`: cancel one request."""

from __future__ import annotations

from functools import partial

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, tell
from pipeline.wire.subjects import CANCEL, is_request_name


def cancel(name: str, url: str) -> int:
    """Cancel a request and print its state. Return 0, or 1 if the request is unknown, or 2 if the id is invalid."""
    if not is_request_name(name):
        tell(
            f'headrace: "{name}" is not a request id. Use 1 to 128 letters, digits, "-" or "_"; for the request of a '
            "tenant, t.TENANT.ID."
        )
        return 2
    return run_client(partial(_cancel, name), url, name="headrace cancel")


async def _cancel(name: str, bus: Bus) -> int:
    answer = await bus.request(f"{CANCEL}.{name}")
    state = str(msgspec.json.decode(answer.data).get("state", "unknown"))
    say(f"{name}: {state}")
    if state != "unknown":
        return 0
    tell(f'headrace: No request has the id "{name}", or its answer has expired.')
    return 1
