"""Calls to an Ollama server. Only this module uses the `ollama` client, and it translates the client's exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

import httpx
from ollama import AsyncClient, ResponseError

from consumers.engines.ollama.threads import Threads
from consumers.engines.ollama.wire import BadAnswer, LoadedModel, OllamaModel, error_text, read_loaded, read_models

CONNECT_TIMEOUT_S = 5.0
_LOADED_TIMEOUT_S = 1.0
_ANSWER_TOKENS = 8
# A busy server, and proxies that find no server behind them: the same call can succeed later.
_RETRY_LATER = frozenset({408, 425, 429, 502, 503, 504})
# Calls to this machine use no proxy. httpx would send them to the environment's proxy too.
_DIRECT: dict[str, httpx.AsyncBaseTransport | None] = {
    "all://127.0.0.1": None,
    "all://localhost": None,
    "all://[::1]": None,
    "all://0.0.0.0": None,
}


class OllamaError(Exception):
    """A call that failed.

    Args:
        message: the server's error, or what happened to the connection.
        status: the HTTP status; None if the connection or the answer broke.
        away: whether the server was not reached, or asks for a later retry: it has done nothing with the call.
    """

    def __init__(self, message: str, status: int | None = None, *, away: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.away = away


class OllamaClient:
    """A client of one server, with any number of connections.

    Args:
        host: as `OLLAMA_HOST`: `host`, `host:port`, `:port` or a URL; empty for `OLLAMA_HOST` or the default.
        idle_timeout_s: the longest silence in an answer, before its first part too.
        threads: how many threads the server uses for a model on its CPU; 0 leaves that to the server.
    """

    def __init__(self, host: str, *, idle_timeout_s: float, threads: int = 0) -> None:
        self._threads = Threads(threads)
        self._ollama = _Ollama(
            host,
            timeout=httpx.Timeout(idle_timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            mounts=_DIRECT,
        )

    @property
    def url(self) -> str:
        """The URL of the server."""
        return self._ollama.url

    async def close(self) -> None:
        """Close all connections."""
        await self._ollama.close()  # type: ignore[no-untyped-call]

    async def models(self) -> list[OllamaModel]:
        """The models of the server; raises OllamaError."""
        try:
            found = read_models(await self._ollama.body("GET", "/api/tags"))
        except Exception as error:
            raise _translated(error) from None
        if self._threads.wanted and (loaded := await self._loaded()) is not None:
            self._threads.review(loaded)
        return found

    async def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The vectors of texts. Cancelling disconnects, and the server stops.

        Raises:
            OllamaError: the call failed.
        """
        try:
            return await self._ollama.body("POST", "/api/embed", await self._with_threads(body))
        except Exception as error:
            raise _translated(error) from None

    async def chat(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The parts of a streamed answer. Closing or cancelling the iterator disconnects, and the server stops.

        Raises:
            OllamaError: at any part. It is the end of the answer.
        """
        try:
            body = await self._with_threads(body)
            async with aclosing(self._ollama.parts("POST", "/api/chat", body)) as parts:
                async for part in parts:
                    yield part
        except Exception as error:
            raise _translated(error) from None

    async def ask_internal(self, model: str, prompt: str, *, timeout_s: float) -> str | None:
        """A short answer of a model for the pipeline's own work, or None if the model is missing, slow or broken.

        Never raises. The caller checks that the model is an internal one.
        """
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": False,
            "think": False,
            "options": {"temperature": 0, "num_predict": _ANSWER_TOKENS},
        }
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._ollama.body("POST", "/api/chat", await self._with_threads(body))
            text = answer["message"]["content"]
        except Exception:
            return None
        return text.strip() or None if isinstance(text, str) else None

    async def _with_threads(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body with the threads for its model. While the server does not say what it has, without."""
        model = body["model"]
        if not self._threads.knows(model) and (loaded := await self._loaded()) is not None:
            self._threads.choose(model, loaded)
        return self._threads.added(body)

    async def _loaded(self) -> list[LoadedModel] | None:
        """The models in the server's memory, or None if it does not say."""
        try:
            async with asyncio.timeout(_LOADED_TIMEOUT_S):
                return read_loaded(await self._ollama.body("GET", "/api/ps"))
        except Exception:
            return None


class _Ollama(AsyncClient):
    """The official client, used below its typed methods. Those copy messages and tools into models of their own, and
    lose unknown fields (nested properties of a tool's schema, the ids of tool calls).

    Private parts in use: `_client` (for its `base_url`) and `_request`.
    """

    @property
    def url(self) -> str:
        return str(self._client.base_url).rstrip("/")

    async def body(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._request(dict, method, path, stream=False, json=body)

    async def parts(self, method: str, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        answer = await self._request(dict, method, path, stream=True, json=body)
        async with aclosing(cast("AsyncGenerator[dict[str, Any], None]", answer)) as parts:
            async for part in parts:
                yield part


def _translated(error: Exception) -> OllamaError:
    if isinstance(error, ResponseError):
        # An error inside a stream has no status. The client gives -1.
        status = error.status_code if error.status_code > 0 else None
        message = error_text(str(error.error)) or f"status {error.status_code}"
        return OllamaError(message, status, away=status in _RETRY_LATER)
    # For a refused connection the client raises its own ConnectionError.
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | ConnectionError):
        return OllamaError(f"the connection failed: {str(error) or type(error).__name__}", away=True)
    if isinstance(error, httpx.TimeoutException):
        return OllamaError("no answer in time")
    if isinstance(error, httpx.TransportError | OSError):
        return OllamaError(f"the connection broke: {str(error) or type(error).__name__}")
    if isinstance(error, BadAnswer):
        return OllamaError(str(error))
    return OllamaError(f"the answer is not Ollama's ({type(error).__name__}: {str(error)[:200]})")
