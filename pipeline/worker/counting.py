"""A worker's reply to the question how many tokens a prompt has: on `llm.tokens.<worker>`, beside the queue."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.broker.connection import Message
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.process.role import Role
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import TokenCount, encode
from pipeline.wire.subjects import TOKENS, is_inbox


@dataclass(slots=True)
class Counting:
    """Counts the tokens of prompts, if the worker's engine can.

    Args:
        me: the role.
        engine: the worker's engine.
        config: the settings.
    """

    me: Role
    engine: Engine
    config: Config

    async def start(self) -> None:
        """Begin to reply. Call once."""
        if self.engine.counter is not None:
            await self.me.bus.subscribe(f"{TOKENS}.{self.me.name}", self._on_question)

    async def _on_question(self, message: Message) -> None:
        if not is_inbox(message.reply):
            return
        try:
            reply: TokenCount | ErrorAnswer = TokenCount(await self._count(message.data))
        except HeadraceError as error:
            reply = ErrorAnswer(id="", created=int(self.me.bus.clock.wall()), error=ErrorBody.of(error))
        await self.me.bus.publish(message.reply, encode(reply))

    async def _count(self, body: bytes) -> int:
        request = decode_chat(body, max_body_bytes=self.config.max_body_bytes)
        self.engine.resolve(request.wanted_model)
        assert self.engine.counter is not None  # noqa: S101 - else nothing is subscribed
        return await self.engine.counter.count_tokens(request)
