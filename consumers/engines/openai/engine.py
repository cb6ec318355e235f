"""A server of OpenAI's API as an engine: the API in the terms of `consumers.engines.server`."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from consumers.engines.openai.calls import answer_body, notes_on, vectors_body
from consumers.engines.openai.client import OpenAIClient
from consumers.engines.openai.models import OpenAIModel
from consumers.engines.openai.resuming import (
    PROBE,
    Beginning,
    counting,
    counts_turns,
    may_be_open,
    may_leave_open,
    with_next_turn,
    with_open_turn,
)
from consumers.engines.openai.wire import DeltaReader, read_prompt_tokens, read_vectors
from consumers.engines.server.dialect import Call
from consumers.engines.server.engine import ServerEngine
from consumers.engines.server.errors import BadAnswer, ServerError
from pipeline.config import Config
from pipeline.engine import Embedded, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Dialect, ModelFacts
from pipeline.wire.requests import EmbeddingRequest

# Statuses that are about the server, its key or its proxy, and not about the request.
_NOT_THE_REQUEST = frozenset({401, 403, 407, 408, 425, 429, 499})
# llama.cpp's server says so where it was started without what a request needs.
_NOT_IMPLEMENTED = 501
_TOO_LONG = re.compile(
    r"context (length|size|window)|longer than the (model's )?context|maximum context|exceed_context_size",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(r"model.*(not found|does not exist|not loaded)|no such model", re.IGNORECASE)
_NOT_SUPPORTED = re.compile(r"(not|n't) support|unsupported|requires --", re.IGNORECASE)
# Faults of a request that llama.cpp's server answers with status 500, the status of a server's own fault.
_BLAMES_REQUEST = re.compile(r"input is not supported|requires --jinja|failed to parse grammar", re.IGNORECASE)


class OpenAIDialect:
    """A server of OpenAI's API, as `ServerDialect`.

    Args:
        config: the settings; `openai_key`, `default_max_tokens` and the timeouts of Ollama are read.
        url: the server's.

    Raises:
        ConfigError: the URL or the key cannot be used.
    """

    dialect: Dialect = "openai"
    continues = True
    advice = "Load one there."

    def __init__(self, config: Config, url: str) -> None:
        self._default_max_tokens = config.default_max_tokens
        self._client = OpenAIClient(
            url,
            key=config.openai_key,
            idle_timeout_s=config.ollama_timeout_s,
            load_timeout_s=config.ollama_load_timeout_s,
        )
        self.url = self._client.url
        self.label = self.url
        self.place = f"The server at {self.url}"
        self.is_local = self._client.is_local
        # Whether the server leaves the assistant's last turn open, by model; asked when it first matters.
        self._open: dict[str, bool] = {}

    async def models(self) -> Sequence[OpenAIModel]:
        """As `ServerDialect.models`."""
        try:
            return await self._client.models()
        except ServerError as error:
            if error.status in (401, 403):
                message = f"it refuses the API key ({error.message}); set `openai_key`"
                raise ServerError(message, error.status) from None
            raise

    async def loaded(self) -> Mapping[str, int] | None:
        """As `ServerDialect.loaded`: the API does not tell."""
        return None

    def facts(self, model: OpenAIModel, loaded: Mapping[str, int]) -> ModelFacts:  # noqa: ARG002 - of the interface
        """As `ServerDialect.facts`."""
        return model.facts()

    def call(self, work: Work, model: OpenAIModel | None) -> Call:
        """As `ServerDialect.call`."""
        request = work.request
        context = model.context_tokens if model is not None else 0
        body = answer_body(work, default_max_tokens=self._default_max_tokens, context_tokens=context)
        structured = request.structured_outputs
        reader = DeltaReader(
            work.id,
            notes_on(request),
            scores=request.alternatives is not None,
            form=request.response_format is not None and request.response_format.type != "text",
            choices=(structured.choice if structured is not None else None) or (),
            forced=request.forces_tools,
        )
        if work.resume_text:
            parts = self._resumed(body, work.resume_text, reader, context)
        else:
            parts = self._fitted(body, context)
        return Call(parts, reader, limit=body["max_tokens"])

    async def _fitted(self, body: dict[str, Any], context: int) -> AsyncGenerator[dict[str, Any], None]:
        """An answer. If the server refuses the prompt and the limit together, the limit becomes the space left."""
        begun = False
        try:
            async with aclosing(self._client.answer(body)) as parts:
                async for part in parts:
                    begun = True
                    yield part
            return
        except ServerError as error:
            room = 0 if begun or not _is_too_long(error) else await self._room(body, context)
            if not 0 < room < body["max_tokens"]:
                raise
        async with aclosing(self._client.answer(body | {"max_tokens": room})) as parts:
            async for part in parts:
                yield part

    async def _room(self, body: dict[str, Any], context: int) -> int:
        """The tokens that a prompt leaves of a context; none if either is not known."""
        try:
            return context - await self._count(body) if context else 0
        except (BadAnswer, ServerError):
            return 0

    async def _resumed(
        self, body: dict[str, Any], text: str, reader: DeltaReader, context: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The rest of an answer that another attempt began."""
        counted = await self._open_turn(body, text) if may_be_open(body) else None
        if counted is None:
            reader.beginning = Beginning(left=text)
        else:
            prompt, prompted = counted
            reader.beginning = Beginning(prompted_tokens=prompted)
            left = body["max_tokens"] - prompted
            if left <= 0:
                usage = {"prompt_tokens": prompt + prompted, "completion_tokens": 0}
                yield {"choices": [{"finish_reason": "length"}], "usage": usage}
                return
            body = with_open_turn(body, text) | {"max_tokens": left}
        async with aclosing(self._fitted(body, context)) as parts:
            async for part in parts:
                yield part

    async def _open_turn(self, body: dict[str, Any], text: str) -> tuple[int, int] | None:
        """The tokens of a prompt, and those of a text as the assistant's open turn; None if the server closes turns."""
        model = body["model"]
        if "prompt" not in body and self._open.get(model) is False:
            return None
        try:
            prompt = await self._count(body)
            if "prompt" in body:
                return prompt, await self._count(with_open_turn(body, text)) - prompt
            if model not in self._open:
                self._open[model] = await self._leaves_open(body, prompt)
            return (prompt, await self._count(with_open_turn(body, text)) - prompt) if self._open[model] else None
        except BadAnswer:
            return None
        except ServerError as error:
            if self.refusal(error) is None:
                raise
            return None

    async def _leaves_open(self, body: dict[str, Any], prompt: int) -> bool:
        """Whether the server leaves the assistant's last turn open."""
        probed = await self._count(with_open_turn(body, PROBE))
        return may_leave_open(prompt, probed) and counts_turns(probed, await self._count(with_next_turn(body)))

    async def _count(self, body: dict[str, Any]) -> int:
        return read_prompt_tokens(await self._client.whole(counting(body)))

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """As `ServerDialect.embed`."""
        return read_vectors(await self._client.embed(vectors_body(request, model)), len(request.texts))

    def refusal(self, error: ServerError) -> HeadraceError | None:
        """As `ServerDialect.refusal`."""
        too_long = _is_too_long(error)
        if not (too_long or _BLAMES_REQUEST.search(error.message) or _is_of_the_request(error.status)):
            return None
        code = ErrorCode.CONTEXT_LENGTH_EXCEEDED if too_long else _code(error)
        message = f"{self.label} refused the request: {error.message.rstrip('.')}."
        return HeadraceError(code, message, param=error.param)

    async def close(self) -> None:
        """As `ServerDialect.close`."""
        await self._client.close()


class OpenAIEngine(ServerEngine[OpenAIModel]):
    """A server of OpenAI's API as an engine.

    Args:
        config: the settings.
        url: the server's.

    Raises:
        ConfigError: the URL or the key cannot be used.
    """

    def __init__(self, config: Config, url: str) -> None:
        super().__init__(config, OpenAIDialect(config, url), slots=config.openai_slots)


def _is_too_long(error: ServerError) -> bool:
    return bool(_TOO_LONG.search(f"{error.message} {error.code}"))


def _is_of_the_request(status: int | None) -> bool:
    if status is None or status in _NOT_THE_REQUEST:
        return False
    return 400 <= status < 500 or status == _NOT_IMPLEMENTED


def _code(error: ServerError) -> ErrorCode:
    if _NO_MODEL.search(f"{error.message} {error.code}"):
        return ErrorCode.MODEL_NOT_FOUND
    return ErrorCode.UNSUPPORTED_PARAMETER if _NOT_SUPPORTED.search(error.message) else ErrorCode.INVALID_REQUEST
