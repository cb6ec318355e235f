"""`/v1/batches`: batches are created, shown, listed and cancelled. Another role runs them. A caller sees its own."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.batches import BatchStore
from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects.batches import READERS
from pipeline.gateway.dialects.shapes import decode_body
from pipeline.gateway.intake import refused_by_store
from pipeline.gateway.paging import listed, page
from pipeline.gateway.queue import answered
from pipeline.gateway.quotas import KeyQuotas
from pipeline.gateway.responses import json_response
from pipeline.gateway.schemas import MOST_BATCHES
from pipeline.gateway.statuses import HttpError
from pipeline.gateway.uploads import own_file
from pipeline.wire.batches import BatchCall, BatchOrder, FileObject, is_stored_id, window_s
from pipeline.wire.errors import ErrorCode, quoted

# As OpenAI's API has it.
_MOST_METADATA = 16
_MOST_KEY = 64
_MOST_VALUE = 512


@dataclass(slots=True)
class BatchCalls:
    """The handlers of `/v1/batches`."""

    bus: Bus
    peers: Peers
    config: Config
    quotas: KeyQuotas

    async def create(self, request: Request) -> Response:
        """`POST /v1/batches`: the batch is stored when this responds."""
        if (refusal := refused_by_store(self.peers.store())) is not None:
            raise refusal
        self.quotas.check_day(request.state.caller.key)
        limit = self.config.max_body_bytes
        body = await read_body(request, limit=limit, within_s=self.config.http_stall_timeout_s)
        call = decode_body(body, BatchCall)
        file = await own_file(self.bus, request, call.input_file_id)
        now = int(self.bus.clock.wall())
        caller = request.state.caller
        order = order_of(call, file.shown, now, caller.tenant, caller.owner, key=caller.key.name if caller.key else "")
        await answered(BatchStore(self.bus).create(order))
        return json_response(order.begun())

    async def show(self, request: Request) -> Response:
        """`GET /v1/batches/{id}`."""
        order = await self._found(request)
        return json_response(await answered(BatchStore(self.bus).show(order)))

    async def list_all(self, request: Request) -> Response:
        """`GET /v1/batches`: newest first."""
        caller = request.state.caller
        mine = [order for order in await answered(self._orders()) if caller.may_see(order.tenant)]
        entries, more = page(mine[::-1], request.query_params, most=MOST_BATCHES)
        shown = [await answered(BatchStore(self.bus).show(order)) for order in entries]
        return json_response(listed(shown, more=more))

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/batches/{id}/cancel`. A batch that has ended stays as it is."""
        order, store = await self._found(request), BatchStore(self.bus)
        batch = await answered(store.show(order))
        if not batch.status.is_final:
            await answered(store.cancel(order.id))
            batch = await answered(store.show(order))
        return json_response(batch)

    async def _orders(self) -> list[BatchOrder]:
        return [found.order async for found in BatchStore(self.bus).orders()]

    async def _found(self, request: Request) -> BatchOrder:
        batch_id = request.path_params["id"]
        order = await answered(BatchStore(self.bus).order(batch_id)) if is_stored_id(batch_id) else None
        if order is None or not request.state.caller.may_see(order.tenant):
            raise HttpError(404, ErrorCode.INVALID_REQUEST, f"No batch has the id {quoted(batch_id, 128)}.", param="id")
        return order


def order_of(call: BatchCall, file: FileObject, now: int, tenant: str, owner: str = "", *, key: str = "") -> BatchOrder:
    """The order of a new batch.

    Args:
        call: what is asked for.
        file: the input file.
        now: unix seconds.
        tenant: of the caller.
        owner: the tenant on whose lanes the lines are.
        key: the API key that its lines are charged to.

    Raises:
        HttpError: 400, for a call that is not valid.
    """
    if call.endpoint not in READERS:
        raise _bad(f"`endpoint` must be one of {', '.join(READERS)}.", "endpoint")
    if (seconds := window_s(call.completion_window)) is None:
        raise _bad("`completion_window` must be a time such as 30m, 24h or 7d, and at most 7d.", "completion_window")
    if file.purpose != "batch":
        raise _bad("The purpose of the input file must be batch.", "input_file_id")
    if file.expires_at < now + seconds:
        raise _bad("The input file is deleted before the completion window ends. Store it again.", "input_file_id")
    for field, value in (call.metadata or {}).items():
        if len(field) > _MOST_KEY or len(value) > _MOST_VALUE:
            message = f"A key of `metadata` has at most {_MOST_KEY} characters, a value {_MOST_VALUE}."
            raise _bad(message, "metadata")
    if len(call.metadata or {}) > _MOST_METADATA:
        raise _bad(f"`metadata` has at most {_MOST_METADATA} keys.", "metadata")
    batch_id = f"batch_{secrets.token_hex(12)}"
    window = call.completion_window
    return BatchOrder(batch_id, call.endpoint, file.id, window, seconds, now, call.metadata, tenant, owner, key)


def _bad(message: str, param: str) -> HttpError:
    return HttpError(400, ErrorCode.INVALID_REQUEST, message, param=param)
