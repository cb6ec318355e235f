"""The accounts of use over HTTP: `GET /queue/usage`, and the part of them in `/metrics`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.core.usage import part_of
from pipeline.gateway.identity import Caller
from pipeline.gateway.queue import answered
from pipeline.wire.messages import encode
from pipeline.wire.subjects import QUEUE_USAGE
from pipeline.wire.usage import UsageReport
from pipeline.wire.validation import UNREADABLE

# The report is reused for this long: many readers cost no more than one.
_KEPT_S = 0.5


@dataclass(slots=True)
class UsageView:
    """The accounts as the monitor that leads reports them.

    Args:
        bus: the connection.
    """

    bus: Bus
    _report: UsageReport | None = field(init=False, default=None)
    _at: float = field(init=False, default=float("-inf"))
    _lock: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    async def show(self, request: Request) -> Response:
        """`GET /queue/usage`: all accounts for an operator and without keys, else those of the key and its tenant."""
        return Response(
            encode(_own(request.state.caller, await answered(self._asked()))), media_type="application/json"
        )

    async def for_metrics(self, caller: Caller) -> UsageReport | None:
        """What a caller may see; None if no monitor answers."""
        try:
            return _own(caller, await self._asked())
        except (BusError, *UNREADABLE):
            return None

    async def _asked(self) -> UsageReport:
        async with self._lock:
            if self._report is None or self.bus.clock.now() - self._at > _KEPT_S:
                answer = await self.bus.request(QUEUE_USAGE)
                self._report, self._at = msgspec.json.decode(answer.data, type=UsageReport), self.bus.clock.now()
            return self._report


def _own(caller: Caller, report: UsageReport) -> UsageReport:
    if caller.sees_all or caller.key is None:
        return report
    return part_of(report, caller.tenant, caller.key.name)
