"""llama.cpp as an engine: the server's life, its model, and the requests that run."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import httpx

from consumers.engines.llamacpp.generation import LlamaGeneration
from consumers.engines.llamacpp.native import LlamaFacts, LlamaServer
from consumers.engines.llamacpp.wire import call_of
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted

# The server sends a sign of life every 30 s, also while it reads a prompt.
_SILENCE_S = 90.0


class LlamaEngine:
    """One GGUF file on llama.cpp, in this process. Entering it loads the model.

    It begins each answer anew: it does not continue the text of an earlier attempt.

    Args:
        gguf: the model's file.
        slots: how many requests run at once. More wait in the server, in order.
        threads: how many threads compute; 0 for half of the cores, at least one.
    """

    simulated: bool = False
    facts: LlamaFacts

    def __init__(self, gguf: Path, *, slots: int, threads: int = 0) -> None:
        self._gguf = gguf
        self._slots = slots
        self._threads = threads
        self._generations: set[LlamaGeneration] = set()

    async def __aenter__(self) -> Self:
        """Load the model. The library holds the interpreter until it is loaded, so a thread would not help.

        Raises:
            LlamaError: the library or the file cannot be used.
        """
        self._server = LlamaServer(self._gguf, slots=self._slots, threads=self._threads)
        self.facts = self._server.facts()
        self._http = httpx.AsyncClient(
            base_url=self._server.url,
            headers=self._server.headers,
            trust_env=False,
            timeout=_SILENCE_S,
            limits=httpx.Limits(max_connections=None),
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        for generation in list(self._generations):
            await generation.close()
        await self._http.aclose()
        self._server.close()

    async def submit(self, work: Work) -> LlamaGeneration:
        """Begin work.

        Raises:
            HeadraceError: `unsupported_parameter` for what only Ollama honours, for forms of an answer that Ollama's
                API cannot ask for, and for tools that the model's template cannot take.
        """
        if name := work.request.needs_ollama:
            message = f"Model {quoted(work.model)} does not support {name}. Leave it out."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)
        if work.request.structured_outputs is not None:
            message = "llama.cpp does not support `structured_outputs` here. Use `response_format`."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="structured_outputs")
        if work.request.tools and work.request.tool_choice != "none" and not self.facts.calls_tools:
            message = f"Model {quoted(work.model)} has no form for tools. Choose another model."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="tools")
        generation = LlamaGeneration(
            work.id, self._http, *call_of(work), ended=lambda: self._generations.discard(generation)
        )
        self._generations.add(generation)
        return generation
