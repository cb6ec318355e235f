"""`POST /v1/messages/count_tokens`: a worker with the model counts the tokens of a prompt. Nothing is queued."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.connection import Unreachable
from pipeline.config import Config
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects import anthropic
from pipeline.gateway.models import Models
from pipeline.gateway.responses import json_response
from pipeline.gateway.statuses import error_of
from pipeline.process.role import Role
from pipeline.wire.answers import ErrorAnswer
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import TokenCount
from pipeline.wire.subjects import TOKENS
from pipeline.wire.validation import UNREADABLE

# Longer than a worker waits for its engine.
_PATIENCE_S = 12.0
_reply_decoder: msgspec.json.Decoder[TokenCount | ErrorAnswer] = msgspec.json.Decoder(TokenCount | ErrorAnswer)


@dataclass(slots=True)
class TokenCounts:
    """The handler of the endpoint. Only MLX counts tokens: the APIs of other servers do not.

    Args:
        me: the role.
        config: the settings.
        models: the models that clients can name.
    """

    me: Role
    config: Config
    models: Models

    async def count(self, request: Request) -> Response:
        """`POST /v1/messages/count_tokens`."""
        limit = self.config.max_body_bytes
        body = await read_body(request, limit=limit, within_s=self.config.http_stall_timeout_s)
        prompt, written = anthropic.read_prompt(body, limit, self.models.listed())
        self.models.check(prompt.wanted_model, embeds=False)
        if self.models.only_on_ollama(prompt.wanted_model):
            message = f"Model {quoted(prompt.model or '')} is on a server that does not count tokens before it answers."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="model")
        return json_response({"input_tokens": await self._counted(written)})

    async def _counted(self, body: bytes) -> int:
        """The count of the first ready worker that has the model. If all say that they lack it, their error."""
        replies = list[ErrorAnswer | None]()
        for status in self.me.peers.workers("mlx"):
            reply = await self._ask(f"{TOKENS}.{status.worker}", body) if status.state == "ready" else None
            if isinstance(reply, TokenCount):
                return reply.prompt_tokens
            if reply is not None and reply.error.code not in (ErrorCode.MODEL_NOT_FOUND, ErrorCode.UNAVAILABLE):
                raise error_of(reply.error)
            replies.append(reply)
        lacking = [reply for reply in replies if reply is not None and reply.error.code is ErrorCode.MODEL_NOT_FOUND]
        if lacking and len(lacking) == len(replies):
            raise error_of(lacking[0].error)
        message = "No worker can count the tokens now: only MLX counts them, for the models that it has loaded."
        raise HeadraceError(ErrorCode.UNAVAILABLE, message)

    async def _ask(self, subject: str, body: bytes) -> TokenCount | ErrorAnswer | None:
        try:
            return _reply_decoder.decode((await self.me.bus.request(subject, body, timeout_s=_PATIENCE_S)).data)
        except (Unreachable, *UNREADABLE):
            return None
