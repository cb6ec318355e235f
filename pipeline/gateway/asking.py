"""The endpoints that queue a request and respond with its answer, in every dialect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pipeline.broker.topology import REPLIES_KEPT_S
from pipeline.config import Config
from pipeline.gateway.answering import AnswerContext, Answering
from pipeline.gateway.bodies import read_body
from pipeline.gateway.conversations import Conversations
from pipeline.gateway.dialects.ollama import Loaded
from pipeline.gateway.dialects.responses import Continued, earlier_turns
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.endpoint import JSON, Handler
from pipeline.gateway.identity import meant_id
from pipeline.gateway.intake import Repeats, take_in, urgency
from pipeline.gateway.models import Models
from pipeline.gateway.queue import answered, events_url
from pipeline.gateway.responses import json_response
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import Completion
from pipeline.wire.requests import EmbeddingRequest
from pipeline.wire.subjects import is_request_id

# Reads a body, given the size limit of a published body and the listed models.
Reader = Callable[[bytes, int, Sequence[str]], Asked | Loaded | Continued]


@dataclass(slots=True)
class Asking:
    """Reads a call for an answer, publishes its request, and responds."""

    me: Role
    config: Config
    models: Models
    context: AnswerContext
    _repeats: Repeats = field(init=False, default_factory=Repeats)
    _conversations: Conversations = field(init=False, default_factory=lambda: Conversations(REPLIES_KEPT_S))

    def handler(self, read: Reader) -> Handler:
        """The handler of an endpoint whose bodies `read` reads."""

        async def ask(request: Request) -> ASGIApp:
            limit = self.config.max_body_bytes
            body = await read_body(request, limit=limit, within_s=self.config.http_stall_timeout_s)
            asked = read(body, limit, self.models.listed())
            if isinstance(asked, Loaded):
                return self._loaded(request, asked)
            if isinstance(asked, Continued):
                asked = asked.after(await self._earlier(request, asked.previous))
            return await self._answer(request, asked)

        return ask

    def _loaded(self, request: Request, asked: Loaded) -> Response:
        """Respond to a request that only loads a model; its headers are checked all the same."""
        self.models.check(asked.model, embeds=asked.embeds)
        urgency(request.state.caller, request.state.headers, default=self.config.http_priority)
        return Response(asked.body(self.me.bus.clock.wall()), media_type=JSON)

    async def _earlier(self, request: Request, previous: str) -> list[dict[str, Any]]:
        """The messages of an earlier response, and its answer.

        Raises:
            HeadraceError: `invalid_request`: it is not kept, or has no answer.
        """
        request_id = meant_id(request.state.caller, previous)
        kept = self._conversations.find(request_id, time.monotonic()) if is_request_id(request_id) else None
        last = None if kept is None else await answered(self.context.client.last(request_id))
        if kept is None or last is None or not isinstance(last.answer, Completion):
            message = (
                f"Response {quoted(previous, 128)} cannot be continued: it has no complete answer, or is not kept. "
                "Send the whole conversation in `input`."
            )
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="previous_response_id")
        return earlier_turns(kept, last.answer)

    async def _answer(self, request: Request, asked: Asked) -> ASGIApp:
        self.models.check(asked.request.wanted_model, embeds=isinstance(asked.request, EmbeddingRequest))
        load = self.me.peers.load("mlx")
        intake = take_in(
            request.state.caller,
            request.state.headers,
            asked,
            default=self.config.http_priority,
            saturated=load is not None and load.level == "saturated",
        )
        self._repeats.check(intake, asked.request, time.monotonic())
        if asked.conversation:
            self._conversations.keep(intake.outgoing.id, asked.conversation, time.monotonic())
        if not intake.respond_async:
            return Answering(self.context, asked, intake)
        record = await self.context.submit(intake)
        await record.close()
        return _accepted(intake.outgoing.id)


def _accepted(request_id: str) -> Response:
    url = f"/queue/requests/{request_id}"
    fields = {"object": "headrace.accepted", "id": request_id, "url": url, "events_url": events_url(request_id)}
    headers = {"location": url, "preference-applied": "respond-async", "x-request-id": request_id}
    return json_response(fields, 202, headers)
