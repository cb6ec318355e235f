"""Earlier responses, for the calls that continue one or refer to its items."""

from __future__ import annotations

import time

import msgspec

from pipeline.broker.asker import Asker
from pipeline.broker.topology import REPLIES_KEPT_S
from pipeline.gateway.conversations import Conversations
from pipeline.gateway.dialects.response_items import Turn, answer_turn
from pipeline.gateway.dialects.responses import Continued
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.identity import Caller, meant_name
from pipeline.gateway.queue import answered
from pipeline.wire.answers import Completion
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.subjects import is_request_name


class Continuing:
    """Finds the answers of earlier responses in their records, and keeps the conversations that led to them.

    Args:
        client: reads the records.
    """

    def __init__(self, client: Asker) -> None:
        self._client = client
        self._conversations = Conversations(REPLIES_KEPT_S)

    def keep(self, name: str, conversation: bytes) -> None:
        """Keep the messages of a request, as JSON, for a call that continues its response."""
        self._conversations.keep(name, conversation, time.monotonic())

    async def resolve(self, caller: Caller, call: Continued) -> Asked:
        """The request of a call, with what it continues and refers to.

        Raises:
            HeadraceError: `invalid_request`: an earlier response is not kept, or has no answer.
        """
        answers: dict[str, Completion] = {}
        for response_id in call.referred:
            answer = await self._answer(meant_name(caller, response_id))
            if answer is not None:
                answers[response_id] = answer
        earlier = await self._conversation(caller, call.previous) if call.previous else []
        return call.after(earlier, answers)

    async def _conversation(self, caller: Caller, previous: str) -> list[Turn]:
        """The messages of an earlier response, and its answer."""
        name = meant_name(caller, previous)
        kept = self._conversations.find(name, time.monotonic())
        answer = None if kept is None else await self._answer(name)
        if kept is None or answer is None:
            message = (
                f"Response {quoted(previous, 128)} cannot be continued: it has no complete answer, or is not kept. "
                "Send the whole conversation in `input`."
            )
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="previous_response_id")
        return [*msgspec.json.decode(kept), answer_turn(answer)]

    async def _answer(self, name: str) -> Completion | None:
        """The answer of a request; None if its record is not kept, or is not complete."""
        last = await answered(self._client.last(name)) if is_request_name(name) else None
        return last.answer if last is not None and isinstance(last.answer, Completion) else None
