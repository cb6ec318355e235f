"""Calls to a server of OpenAI's API. Exceptions of httpx are translated here."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import msgspec

from consumers.engines.openai.models import OpenAIModel, read_list
from consumers.engines.openai.wire import read_error, read_event
from consumers.engines.server.errors import BadAnswer, ServerError
from consumers.engines.server.http import (
    CONNECT_TIMEOUT_S,
    LOOK_TIMEOUT_S,
    RETRY_LATER,
    Patience,
    lines,
    translated,
)
from pipeline.config import ConfigError, base_url
from pipeline.machine import is_local
from pipeline.wire.errors import quoted
from pipeline.wire.validation import UNREADABLE

_MODELS = "/v1/models"
_CHAT = "/v1/chat/completions"
_RAW = "/v1/completions"
_EMBEDDINGS = "/v1/embeddings"
# What a web framework says of a path that the server does not have. An unknown model is named in words of its own.
_NO_PATH = frozenset({404, 405})
_SAYS_NO_PATH = re.compile(r"((404 )?(page |file )?not found|method not allowed|status 40[45])\.?", re.IGNORECASE)
# vLLM answers so to each call between the death of its engine and its own end. The call has reached no engine: one
# whose engine dies over it gets an event of its stream instead.
_DEAD = re.compile(r"EngineCore encountered an issue|EngineDeadError")
# Of what the server said in place of an answer, characters.
_SHOWN = 200
# How the lines of a stream of events begin.
_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")


class OpenAIClient:
    """A client of one server, with any number of connections.

    Args:
        url: the server's base URL, with or without `/v1`.
        key: its API key; empty for none.
        idle_timeout_s: the longest silence in an answer. Before its first part, the longest time for which the server
            answers no other call either.
        load_timeout_s: the longest time before the first part, in which the server may load the model.
    """

    def __init__(self, url: str, *, key: str = "", idle_timeout_s: float, load_timeout_s: float) -> None:
        self.url = base_url(url)
        self.is_local = is_local(httpx.URL(self.url).host)
        self._patience = Patience(idle_timeout_s, load_timeout_s, self._is_there)
        try:
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers={"authorization": f"Bearer {key}"} if key else {},
                # A server on this machine is called directly.
                trust_env=not self.is_local,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                limits=httpx.Limits(max_connections=None),
            )
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"The key or the proxy settings of the environment cannot be used for {self.url}: {error} "
                "Add its host to NO_PROXY, or install headrace[socks] for a SOCKS proxy."
            ) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def models(self) -> list[OpenAIModel]:
        """The models of the server; raises ServerError."""
        try:
            return read_list(await self._body("GET", _MODELS))
        except Exception as error:
            raise _translated(error) from None

    async def embed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The vectors of texts; raises ServerError. Cancelling disconnects."""
        return await self._whole(_EMBEDDINGS, body)

    async def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer; raises ServerError. Cancelling disconnects."""
        return await self._whole(_path(body), body)

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer, and at its end an empty object. Events that say nothing are left out.

        Closing or cancelling the iterator disconnects, on which servers stop.

        Raises:
            ServerError: at any event. It is the end of the answer.
        """
        try:
            async with aclosing(self._events(body)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            raise _translated(error) from None

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        begun, strange = False, bytearray()
        async with aclosing(self._lines(body)) as sent, aclosing(self._patience.parts(sent)) as timed:
            async for line in timed:
                event = read_event(line)
                begun = begun or event is not None
                if not line.startswith(_FIELDS) and len(strange) < _SHOWN:
                    strange += line[:_SHOWN]
                if event == {} or (event is not None and _says(event)):
                    yield event
                if event == {}:
                    return
        if strange and not begun:  # a page of a proxy, or a whole answer of a server that does not stream
            raise BadAnswer(f"The server sent no stream of events: {quoted(strange.decode(errors='replace'), _SHOWN)}.")
        yield {}

    async def _lines(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        async with self._http.stream("POST", _path(body), json=body) as response:
            await _check(response)
            async with aclosing(lines(response.aiter_bytes(), sender="The server")) as said:
                async for line in said:
                    yield line

    async def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return await self._patience.begun(self._body("POST", path, body))
        except Exception as error:
            raise _translated(error) from None

    async def _body(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        response = await self._http.request(method, path, json=body)
        await _check(response)
        try:
            return msgspec.json.decode(response.content, type=dict[str, Any])
        except UNREADABLE:
            raise BadAnswer("The server sent a body that is not a JSON object.") from None

    async def _is_there(self) -> bool:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._body("GET", _MODELS)
        except Exception:
            return False
        return True


def _path(body: dict[str, Any]) -> str:
    """Where an answer to a body is asked for."""
    return _RAW if "prompt" in body else _CHAT


def _says(event: dict[str, Any]) -> bool:
    """Whether an event adds something to the answer. Servers send a first one with the role alone."""
    choices = event.get("choices")
    if event.get("usage") or not isinstance(choices, list):
        return True
    return any(
        not isinstance(choice, dict)
        or choice.get("finish_reason")
        or choice.get("text")
        or not isinstance(choice.get("delta"), dict)
        or any(value for name, value in choice["delta"].items() if name != "role")
        for choice in choices
    )


async def _check(response: httpx.Response) -> None:
    """Raise the server's error, if the response is one."""
    if not response.is_success:
        body, status = await response.aread(), response.status_code
        if response.has_redirect_location:
            to = quoted(response.headers["location"], _SHOWN)
            raise ServerError(f"status {status}, a redirect to {to}. Name that address in place of this one.", status)
        error = read_error(body, status, away=status in RETRY_LATER)
        if status in _NO_PATH and _SAYS_NO_PATH.fullmatch(error.message):
            call = f"{response.request.method} {response.request.url.path}"
            raise ServerError(f"it does not support `{call}` ({error.message})", status, code=error.code)
        if _DEAD.search(error.message):
            raise ServerError(error.message, away=True)
        raise error


def _translated(error: Exception) -> ServerError:
    return translated(error, kind="one of OpenAI's API")
