"""An internal model's opinion on doubtful requests, asked for several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.core.models import is_internal
from pipeline.core.warmth import WarmStep, Warmth
from pipeline.wire.requests import ChatRequest

if TYPE_CHECKING:
    from consumers.engines.ollama import OllamaClient

AT_ONCE = 4
_QUESTION = "Could a very small language model answer the following request well? Reply with yes or no only.\n\n{}"
_QUESTION_CHARS = 600


class Opinions:
    """Asks `classifier_model`, if it is one of `internal_models`: any other model answers users.

    Args:
        client: of the server that has the model; None if there is none to ask.
        config: the settings.
    """

    def __init__(self, client: OllamaClient | None, config: Config) -> None:
        classifies = client is not None and is_internal(config.classifier_model, config.internal_models)
        self._client = client if classifies else None
        self._model = config.classifier_model
        self._timeout_s = config.classifier_timeout_s
        self._warmth = Warmth(AT_ONCE)
        self._questions: set[asyncio.Task[str | None]] = set()
        self._late: set[asyncio.Task[str | None]] = set()

    async def says_simple(self, request: ChatRequest, asking: Callable[[], None]) -> bool:
        """Whether the model calls the request simple, within `classifier_timeout_s`. Without an answer: no.

        Args:
            request: the request.
            asking: called if the model is asked, before this waits.
        """
        if (client := self._client) is None:
            return False
        step = self._warmth.next(asyncio.get_running_loop().time())
        if step is WarmStep.SKIP:
            return False
        asking()
        prompt = _QUESTION.format(request.chat[-1].text()[:_QUESTION_CHARS])
        question = asyncio.create_task(self._ask(client, prompt, load_first=step is WarmStep.LOAD), name="opinion")
        self._questions.add(question)
        question.add_done_callback(self._ended)
        await asyncio.wait({question}, timeout=self._timeout_s)
        if not question.done():
            self._warmth.late()
            self._late.add(question)
            return False
        return (question.result() or "").lower().startswith("yes")

    async def close(self) -> None:
        """End the questions that are still open."""
        for question in self._questions:
            question.cancel()
        if self._questions:
            await asyncio.wait(self._questions)

    async def _ask(self, client: OllamaClient, prompt: str, *, load_first: bool) -> str | None:
        """What the model says; None if it cannot be loaded or does not answer."""
        if load_first:
            loop = asyncio.get_running_loop()
            began_at, well = loop.time(), await client.load_internal(self._model)
            self._warmth.loaded(loop.time(), well=well)
            if not well:
                return None
            if loop.time() - began_at >= self._timeout_s:
                return ""  # the request is gone, and the model is there for the next one
        return await client.ask_internal(self._model, prompt)

    def _ended(self, question: asyncio.Task[str | None]) -> None:
        answered = not question.cancelled() and question.exception() is None and question.result() is not None
        self._warmth.ended(asyncio.get_running_loop().time(), answered=answered, late=question in self._late)
        self._questions.discard(question)
        self._late.discard(question)
