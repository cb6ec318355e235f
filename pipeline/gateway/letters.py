"""Dead letters over HTTP: a caller lists, reads, replays and deletes its own."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker import letters as dead
from pipeline.broker.api import StreamState
from pipeline.broker.jetstream import Bus
from pipeline.core.letters import DeadLetter
from pipeline.gateway.identity import Caller, own_name
from pipeline.gateway.queue import answered, events_url
from pipeline.gateway.responses import json_response
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, quoted
from pipeline.wire.subjects import STREAM_DEAD, TENANT, split_name
from pipeline.wire.validation import UNREADABLE

# The newest letters are kept, and the newest of those are listed.
_KNOWN = 10_000
_LISTED = 200


class KnownLetter(NamedTuple):
    """What is kept of a letter between two reads: its sequence, its tenant, and its row in the list."""

    sequence: int
    tenant: str
    row: dead.Row


@dataclass(slots=True)
class Letters:
    """The handlers of `/queue/dead`."""

    bus: Bus
    _entries: deque[KnownLetter] = field(init=False, default_factory=lambda: deque(maxlen=_KNOWN))
    _read_of: StreamState | None = field(init=False, default=None)
    _reading: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    async def list_all(self, request: Request) -> Response:
        """`GET /queue/dead`: newest first."""
        mine = await self._visible(request.state.caller)
        now = self.bus.clock.wall()
        rows = [msgspec.structs.replace(e.row, age_s=round(max(0.0, now - e.row.died_at), 1)) for e in mine]
        return json_response({"object": "list", "data": rows[: -_LISTED - 1 : -1], "total": len(rows)})

    async def show(self, request: Request) -> Response:
        """`GET /queue/dead/{id}`: a letter with its request."""
        latest = (await self._found(request))[-1]
        letter = await answered(dead.letter(self.bus, latest.sequence))
        if letter is None:
            raise _no_letter(latest.row.id)
        fields = msgspec.to_builtins(dead.as_row(letter, self.bus.clock.wall()))
        whole = {"headers": dict(letter.headers), "request": _request(letter)}
        return json_response({"object": "headrace.dead", **fields, **whole})

    async def replay(self, request: Request) -> Response:
        """`POST /queue/dead/{id}/replay`: queue the request again, under its own id."""
        latest = (await self._found(request))[-1]
        replayed = await answered(dead.replay(self.bus, latest.sequence))
        if replayed is None:
            raise _no_letter(latest.row.id)
        if replayed.full:
            message = f"Lane {replayed.subject} is full. Request {replayed.id} stays in the dead letters. Retry later."
            raise HttpError(503, ErrorCode.QUEUE_FULL, message)
        fields = {"object": "headrace.replayed", "id": replayed.id, "subject": replayed.subject}
        return json_response({**fields, "events_url": events_url(replayed.id)}, 202)

    async def purge(self, request: Request) -> Response:
        """`DELETE /queue/dead/{id}`: delete every letter of this id."""
        found = await self._found(request)
        count = sum([await answered(dead.purge(self.bus, entry.sequence)) for entry in found])
        return json_response({"object": "headrace.purged", "id": found[-1].row.id, "purged": count})

    async def _found(self, request: Request) -> list[KnownLetter]:
        """The caller's letters of the id in the path, oldest first, at least one; raises HttpError 404."""
        given, caller = request.path_params["id"], request.state.caller
        mine = await self._visible(caller)
        # A caller that chose the id knows it without the key's name in front.
        for meant in (given, own_name(caller, given)):
            if found := [entry for entry in mine if entry.row.id == meant]:
                return found
        raise _no_letter(given[:128])

    async def _visible(self, caller: Caller) -> list[KnownLetter]:
        """The letters that the caller can see, oldest first. They are read again only if the stream has changed."""
        async with self._reading:
            now = await answered(self.bus.stream_state(STREAM_DEAD))
            if now != self._read_of:
                await answered(self._read())
                self._read_of = now
        return [entry for entry in self._entries if caller.may_see(entry.tenant)]

    async def _read(self) -> None:
        entries: deque[KnownLetter] = deque(maxlen=_KNOWN)
        async for letter in dead.letters(self.bus, dead.Chosen()):
            row = dead.as_row(letter, letter.died_at)
            owner, _ = split_name(letter.id)
            entries.append(KnownLetter(letter.sequence, owner or letter.headers.get(TENANT, ""), row))
        self._entries = entries


def _request(letter: DeadLetter) -> object:
    """The request's body: a JSON object unchanged, anything else as text."""
    try:
        if letter.body.startswith(b"{"):
            msgspec.json.decode(letter.body)
            return msgspec.Raw(letter.body)
    except UNREADABLE:
        pass
    return letter.body.decode(errors="backslashreplace")


def _no_letter(request_id: str) -> HttpError:
    return HttpError(
        404, ErrorCode.INVALID_REQUEST, f"No dead letter has the id {quoted(request_id, 128)}.", param="id"
    )
