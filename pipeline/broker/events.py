"""Publishing what happens to requests, for the monitor, the dashboard and any other listener."""

from __future__ import annotations

from pipeline.broker.connection import Connection
from pipeline.wire.messages import RequestEvent, encode
from pipeline.wire.subjects import EVENT


async def publish_event(connection: Connection, event: RequestEvent) -> None:
    """Publish event on `llm.event.<priority>.<kind>`. It is sent once, and not stored.

    Raises:
        Unreachable: as `Connection.publish`.
    """
    await connection.publish(f"{EVENT}.{event.priority}.{event.kind}", encode(event))
