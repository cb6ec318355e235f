"""The endpoints that queue a request and respond with its answer, in every dialect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from pipeline.config import Config
from pipeline.core.triage import saturated
from pipeline.gateway.answering import AnswerContext, Answering
from pipeline.gateway.bodies import read_body
from pipeline.gateway.continuing import Continuing
from pipeline.gateway.dialects.ollama import Loaded
from pipeline.gateway.dialects.responses import Continued
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.endpoint import JSON, Handler
from pipeline.gateway.identity import choice_id
from pipeline.gateway.intake import (
    Intake,
    Repeats,
    refused_by_store,
    refused_by_tenants,
    take_in,
    urgency,
    wants_exact,
    with_exact,
)
from pipeline.gateway.models import Models
from pipeline.gateway.queue import events_url
from pipeline.gateway.responses import json_response
from pipeline.gateway.several import Several
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import EmbeddingRequest, wanted
from pipeline.wire.subjects import tenant_of

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
    _continuing: Continuing = field(init=False)

    def __post_init__(self) -> None:
        self._continuing = Continuing(self.context.client)

    def handler(self, read: Reader) -> Handler:
        """The handler of an endpoint whose bodies `read` reads."""

        async def ask(request: Request) -> ASGIApp:
            limit = self.config.max_body_bytes
            body = await read_body(request, limit=limit, within_s=self.config.http_stall_timeout_s)
            asked = read(body, limit, self.models.listed())
            if isinstance(asked, Loaded):
                return self._loaded(request, asked)
            if isinstance(asked, Continued):
                asked = await self._continuing.resolve(request.state.caller, asked)
            return await self._answer(request, asked)

        return ask

    def _loaded(self, request: Request, asked: Loaded) -> Response:
        """Respond to a request that only loads a model; its headers are checked all the same."""
        self.models.check(wanted(asked.model), embeds=asked.embeds)
        urgency(request.state.caller, request.state.headers, default=self.config.http_priority)
        wants_exact(request.state.headers)
        return Response(asked.body(self.me.bus.clock.wall()), media_type=JSON)

    async def _answer(self, request: Request, asked: Asked) -> ASGIApp:
        self.models.check(asked.request.wanted_model, embeds=isinstance(asked.request, EmbeddingRequest))
        asked = with_exact(asked, request.state.headers)
        load = self.me.peers.load("mlx")
        intake = take_in(
            request.state.caller,
            request.state.headers,
            asked,
            default=self.config.http_priority,
            saturated=load is not None and saturated(load),
        )
        self._repeats.check(intake, asked.request, time.monotonic())
        refusal = refused_by_store(self.me.peers.store()) or refused_by_tenants(
            load, intake.priority, tenant_of(intake.outgoing.subject), self.config.tenants_max_messages
        )
        if refusal is not None and not intake.outgoing.given_id:
            raise refusal  # the answer of an id that was used before may be there
        calls = self._choices(asked, intake)
        self.context.quotas.reserve([(each.request, taken) for each, taken in calls])
        if asked.conversation:
            self._continuing.keep(intake.outgoing.name, asked.conversation)
        if asked.others:
            return Several(self.context, calls)
        if not intake.respond_async:
            return Answering(self.context, asked, intake)
        async with self.context.hang_ups.following(intake.outgoing.name), await self.context.submit(intake):
            pass
        return _accepted(intake.outgoing.id)

    def _choices(self, asked: Asked, first: Intake) -> list[tuple[Asked, Intake]]:
        """The requests of a call: one for each choice, with an id that follows from the first's."""
        if asked.others and first.respond_async:
            message = "`Prefer: respond-async` works only for calls with one choice. Send one call for each choice."
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message)
        calls = [(asked, first)]
        for number, other in enumerate(asked.others, start=1):
            outgoing = first.outgoing._replace(id=choice_id(first.outgoing.id, number), body=other.body)
            intake = first._replace(outgoing=outgoing)
            self._repeats.check(intake, other.request, time.monotonic())
            calls.append((other, intake))
        return calls


def _accepted(request_id: str) -> Response:
    url = f"/queue/requests/{request_id}"
    fields = {"object": "headrace.accepted", "id": request_id, "url": url, "events_url": events_url(request_id)}
    ids = {"x-request-id": request_id, "request-id": request_id}
    return json_response(fields, 202, {"location": url, "preference-applied": "respond-async", **ids})
