"""`/queue/pause`, `/queue/resume`, `/queue/paused` and changes of priority. With API keys, for operators only."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker import operator
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects.shapes import decode_body
from pipeline.gateway.identity import Caller, meant_name
from pipeline.gateway.queue import answered
from pipeline.gateway.responses import json_response
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.pauses import DEFAULT_TENANT, MoveAllCall, MoveCall, Pause, PauseCall, PriorityCall, ScopeCall
from pipeline.wire.subjects import split_name

_T = TypeVar("_T", bound=Struct)
_LEFT = {"running": "already runs", "there": "already has this priority", "gone": "has ended", "full": "finds no room"}


@dataclass(slots=True)
class OperatorCalls:
    """The handlers of an operator's endpoints."""

    bus: Bus
    config: Config

    async def pause(self, request: Request) -> Response:
        """`POST /queue/pause`."""
        return json_response(await _carried_out(operator.pause(self.bus, await self._scope(request))))

    async def resume(self, request: Request) -> Response:
        """`POST /queue/resume`."""
        return json_response(await _carried_out(operator.resume(self.bus, await self._scope(request))))

    async def paused(self, request: Request) -> Response:
        """`GET /queue/paused`: what is paused, and the log. A caller who sees only one tenant gets that part."""
        state = await answered(operator.paused(self.bus))
        caller: Caller = request.state.caller
        if not caller.sees_all:
            pauses = [seen for pause in state.pauses if (seen := seen_pause(caller, pause))]
            state = replace(state, pauses=pauses, log=[])
        return json_response(state)

    async def move(self, request: Request) -> Response:
        """`POST /queue/requests/{id}/priority`."""
        caller = operator_of(request)
        body = await self._body(request, PriorityCall)
        tenant, request_id = split_name(meant_name(caller, request.path_params["id"]))
        call = MoveCall(body.priority, request_id, tenant=tenant or None, by=_who(caller), reason=body.reason)
        report = await _carried_out(operator.move(self.bus, call), 404)
        if not report.moved:
            why = next((_LEFT[word] for word in report.left if word in _LEFT), "cannot be moved")
            raise HttpError(409, ErrorCode.INVALID_REQUEST, f"Request {quoted(request_id, 128)} {why}.", param="id")
        return json_response(report)

    async def move_all(self, request: Request) -> Response:
        """`POST /queue/priority`."""
        caller = operator_of(request)
        body = await self._body(request, MoveAllCall)
        call = MoveCall(body.priority, "", body.batch, body.tenant, _who(caller), body.reason)
        return json_response(await _carried_out(operator.move(self.bus, call)))

    async def _scope(self, request: Request) -> PauseCall:
        caller = operator_of(request)
        body = await self._body(request, ScopeCall)
        return PauseCall(body.priority, body.tenant, _who(caller), body.reason)

    async def _body(self, request: Request, kind: type[_T]) -> _T:
        config = self.config
        data = await read_body(request, limit=config.max_body_bytes, within_s=config.http_stall_timeout_s)
        return decode_body(data, kind)


def seen_pause(caller: Caller, pause: Pause) -> Pause | None:
    """What a caller sees of a pause: nothing of other tenants', and only an operator sees who paused it."""
    if caller.sees_all:
        return pause
    return replace(pause, by="") if pause.tenant in (None, caller.owner or DEFAULT_TENANT) else None


def operator_of(request: Request) -> Caller:
    """The caller, if it may act for all tenants; raises HttpError 403."""
    caller: Caller = request.state.caller
    if not caller.sees_all:
        message = "Only an operator's API key permits this: `headrace key add NAME --operator` makes one."
        raise HttpError(403, ErrorCode.UNAUTHORIZED, message)
    return caller


def _who(caller: Caller) -> str:
    return f"key {caller.name}" if caller.key is not None else f"HTTP from {caller.name}"


async def _carried_out(call: Awaitable[_T], status: int = 400) -> _T:
    """The answer of the monitor; raises HttpError if it refused the call, and 503 if it does not answer."""
    try:
        return await answered(call)
    except HttpError:
        raise
    except HeadraceError as error:
        raise HttpError(status, error.code, error.message, param=error.param) from error
