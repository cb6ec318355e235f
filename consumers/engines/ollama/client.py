"""Calls to an Ollama server. Only this module uses the `ollama` client, and it translates the client's exceptions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import msgspec
from ollama import AsyncClient, ResponseError

from consumers.engines.ollama.threads import Threads
from consumers.engines.ollama.wire import (
    LoadedModel,
    OllamaModel,
    ShownModel,
    error_text,
    read_line,
    read_loaded,
    read_models,
    read_shown,
)
from consumers.engines.server.errors import ServerError
from consumers.engines.server.http import (
    CONNECT_TIMEOUT_S,
    LOOK_TIMEOUT_S,
    RETRY_LATER,
    Patience,
    lines,
    translated,
)
from pipeline.config import ConfigError
from pipeline.machine import is_local

_LOADED_TIMEOUT_S = 1.0
_SHOW_TIMEOUT_S = 1.0
# How many models are asked about in one look. The others follow in the next.
_PER_LOOK = 8
_ANSWER_TOKENS = 8


class OllamaClient:
    """A client of one server, with any number of connections.

    Args:
        host: as `OLLAMA_HOST`: `host`, `host:port`, `:port` or a URL; empty for `OLLAMA_HOST` or the default.
        idle_timeout_s: the longest silence in an answer. Before its first part, the longest time for which the server
            answers no other call either.
        load_timeout_s: the longest time before the first part, in which the server may load the model.
        threads: how many threads the server uses for a model on its CPU; 0 leaves that to the server.
    """

    def __init__(self, host: str, *, idle_timeout_s: float, load_timeout_s: float, threads: int = 0) -> None:
        self._threads = Threads(threads)
        self._shown: dict[tuple[str, str], ShownModel] = {}
        self._patience = Patience(idle_timeout_s, load_timeout_s, self._is_there)
        self._ollama = _Ollama(
            host,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
        )

    @property
    def url(self) -> str:
        """The URL of the server."""
        return self._ollama.url

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return is_local(httpx.URL(self.url).host)

    async def close(self) -> None:
        """Close all connections."""
        await self._ollama.close()  # type: ignore[no-untyped-call]

    async def models(self) -> list[OllamaModel]:
        """The models of the server, with the capabilities that it tells of each; raises ServerError."""
        try:
            found = read_models(await self._ollama.body("GET", "/api/tags"))
        except Exception as error:
            raise _translated(error) from None
        await self._complete(found)
        return found

    async def _complete(self, models: list[OllamaModel]) -> None:
        """Add what the list lacks. Each model is asked about once: its files do not change unless its digest does."""
        unknown = [model for model in models if model.identity not in self._shown][:_PER_LOOK]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHOW_TIMEOUT_S):
                await asyncio.gather(*map(self._show, unknown))
        self._shown = {model.identity: self._shown[model.identity] for model in models if model.identity in self._shown}
        for model in models:
            if (shown := self._shown.get(model.identity)) is not None:
                model.context_tokens = shown.context_tokens
                model.capabilities = shown.capabilities if model.capabilities is None else model.capabilities

    async def _show(self, model: OllamaModel) -> None:
        """Note what the server tells of a model, if it does."""
        with contextlib.suppress(Exception):
            self._shown[model.identity] = read_shown(
                await self._ollama.body("POST", "/api/show", {"model": model.name})
            )

    async def loaded(self) -> list[LoadedModel] | None:
        """The models in the server's memory, or None if it does not say. Never raises."""
        try:
            async with asyncio.timeout(_LOADED_TIMEOUT_S):
                found = read_loaded(await self._ollama.body("GET", "/api/ps"))
        except Exception:
            return None
        if self._threads.wanted:
            self._threads.review(found)
        return found

    async def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The vectors of texts. Cancelling disconnects, and the server stops.

        Raises:
            ServerError: the call failed.
        """
        try:
            body = await self._with_threads(body)
            return await self._patience.begun(self._ollama.body("POST", "/api/embed", body))
        except Exception as error:
            raise _translated(error) from None

    async def answer(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The parts of a streamed answer, of `/api/chat` or `/api/generate`. Closing or cancelling the iterator
        disconnects, and the server stops.

        Raises:
            ServerError: at any part. It is the end of the answer.
        """
        try:
            body = await self._with_threads(body)
            async with aclosing(self._ollama.parts(path, body)) as sent, aclosing(self._patience.parts(sent)) as parts:
                async for part in parts:
                    yield part
        except Exception as error:
            raise _translated(error) from None

    async def pull(self, model: str) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of the server's progress while it pulls a model. Closing the iterator disconnects, and the server
        stops. Between two lines, a server checks many gigabytes: nothing limits the time.

        Raises:
            ServerError: at any line. The server has not pulled the model.
        """
        try:
            async with aclosing(self._ollama.parts("/api/pull", {"model": model, "stream": True})) as said:
                async for line in said:
                    yield line
        except Exception as error:
            raise _translated(error) from None

    async def load_internal(self, model: str) -> bool:
        """Load a model for the pipeline's own work. Returns whether it is loaded; never raises.

        A server that is disconnected stops loading, so do not cancel this to save time.
        """
        return await self._internal(model, []) is not None

    async def ask_internal(self, model: str, prompt: str) -> str | None:
        """A short answer of a model for the pipeline's own work, or None if there is none. Never raises.

        The caller checks that the model is an internal one. A server that is disconnected stops loading the model, so
        do not cancel this to save time.
        """
        answer = await self._internal(model, [{"role": "user", "content": prompt}])
        return (answer or "").strip() or None

    async def _internal(self, model: str, messages: list[dict[str, str]]) -> str | None:
        """The text of an answer; without messages, Ollama loads the model and answers with an empty text."""
        body = {
            "model": model,
            "messages": messages,
            "stream": False,
            "think": False,
            "options": {"temperature": 0, "num_predict": _ANSWER_TOKENS},
        }
        try:
            answer = await self._patience.begun(self._ollama.body("POST", "/api/chat", await self._with_threads(body)))
            text = answer["message"]["content"]
        except Exception:
            return None
        return text if isinstance(text, str) else None

    async def _is_there(self) -> bool:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._ollama.body("GET", "/api/tags")
        except Exception:
            return False
        return True

    # ---- threads -----------------------------------------------------------------------------------------------------

    async def _with_threads(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body with the threads for its model. While the server does not say what it has, without."""
        model = body["model"]
        if not self._threads.knows(model) and (loaded := await self.loaded()) is not None:
            self._threads.choose(model, loaded)
        return self._threads.added(body)


class _Ollama(AsyncClient):
    """The official client, used below its typed methods. Those copy messages and tools into models of their own, and
    lose unknown fields (nested properties of a tool's schema, the ids of tool calls). Its streams end lines at U+2028
    and other characters that a text may contain, and fail at an empty line.

    A server on this machine is called directly. httpx would read the environment's proxies, and send the calls there.

    Private parts in use: `_client`, its `base_url`, and `_request`.
    """

    def __init__(self, host: str, **options: Any) -> None:
        try:
            super().__init__(host, trust_env=False, **options)
            is_http = self._client.base_url.scheme in ("http", "https")
        except (ValueError, httpx.InvalidURL):
            is_http = False
        if not is_http:
            raise ConfigError(
                f'"{host}" is not the address of an Ollama server, such as 127.0.0.1:11434. Correct --ollama-host or '
                "OLLAMA_HOST."
            )
        if not is_local(self._client.base_url.host):
            url = str(self._client.base_url)
            try:
                super().__init__(url, **options)
            except (ImportError, ValueError) as error:
                raise ConfigError(
                    f"The proxy settings of the environment cannot be used for Ollama at {url}: {error} "
                    "Add its host to NO_PROXY, or install headrace[socks] for a SOCKS proxy."
                ) from None

    @property
    def url(self) -> str:
        return str(self._client.base_url).rstrip("/")

    async def body(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._request(dict, method, path, stream=False, json=body)

    async def parts(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        async with self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                await response.aread()
                raise ResponseError(response.text, response.status_code)
            async with aclosing(lines(response.aiter_bytes(), sender="Ollama")) as said:
                async for line in said:
                    part = read_line(line)
                    if error := part.get("error"):
                        raise ResponseError(error if isinstance(error, str) else msgspec.json.encode(error).decode())
                    yield part


def _translated(error: Exception) -> ServerError:
    if isinstance(error, ResponseError):
        # An error inside a stream has no status. The client gives -1.
        status = error.status_code if error.status_code > 0 else None
        message = error_text(str(error.error)) or f"status {error.status_code}"
        return ServerError(message, status, away=status in RETRY_LATER)
    return translated(error, kind="Ollama's")
