"""The first stop of every HTTP request: checks its host, its key and its rate, and counts it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import Config
from pipeline.core.limits import Allowance, Limits, Rate
from pipeline.gateway.endpoint import Access, Directory, Endpoint, Kind
from pipeline.gateway.identity import Admitted, Caller, identify, sender_of
from pipeline.gateway.keyring import KeyRing
from pipeline.gateway.metrics import Metrics
from pipeline.gateway.quotas import KeyQuotas
from pipeline.gateway.responses import error_response
from pipeline.gateway.statuses import HttpError
from pipeline.machine import is_loopback
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted

_SLASHES = re.compile("/{2,}")
# `mlx_lm.server`, vLLM and llama.cpp's server have this path. The first and the last serve paths without `/v1` as well.
_HEALTH = {"/health": "/healthz"}
# A client can use this many seconds' worth of calls at once.
_BURST_S = 10.0
# Calls of one address that are refused for want of a valid key.
_REFUSED = Rate(per_s=1.0, burst=20.0)
# The response headers that a script in a page can read, beside those that it always can.
_READABLE_HEADERS = (
    *("location", "preference-applied", "retry-after", "request-id", "x-request-id", "x-should-retry"),
    *(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{name}-tokens" for name in ("limit", "remaining", "reset")),
)


class Pages(CORSMiddleware):
    """CORS: lets scripts in web pages call the application and read the responses.

    With keys every page can call, because no browser sends a key by itself. Without keys only pages of this machine
    can, and those of `http_origins` and `http_names`.
    """

    def __init__(self, app: ASGIApp, config: Config, ring: KeyRing) -> None:
        super().__init__(
            app, allow_methods=("GET", "POST", "DELETE"), allow_headers=("*",), expose_headers=_READABLE_HEADERS
        )
        self._ring = ring
        self._admitted = Admitted.of(config.http_names, config.http_origins)

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether scripts of a page with this origin can call."""
        return self._ring.locked or self._admitted.origin(origin)


class Edge:
    """An ASGI application around another one.

    It puts the caller (`caller`) and the headers (`headers`, names in lower case) into the request's state.

    Args:
        app: gets the requests that pass.
        config: rates.
        metrics: counts the requests.
        directory: finds the endpoint of a path.
        quotas: of the keys.
        ring: has the keys.
    """

    def __init__(
        self, app: ASGIApp, config: Config, metrics: Metrics, directory: Directory, quotas: KeyQuotas, ring: KeyRing
    ) -> None:
        self._quotas = quotas
        self._app = app
        self._directory = directory
        self._ring = ring
        self._metrics = metrics
        self._limits = Limits()
        self._rates = {
            Kind.ANSWERS: config.http_answers_per_s,
            Kind.LISTS: config.http_lists_per_s,
            Kind.STATISTICS: config.http_statistics_per_s,
            Kind.PROBES: 0.0,
        }
        self._names = Admitted.of(config.http_names, config.http_origins)
        self._on_loopback = is_loopback(config.http_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        endpoint = self._endpoint(scope)
        path: str = scope["path"]
        kind = Kind.LISTS if endpoint is None else endpoint.kind
        now = asyncio.get_running_loop().time
        began_at = now()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        allowance = Allowance(allowed=True)
        caller: Caller | None = None

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._limit_headers(allowance, caller, path)]
                self._metrics.count("headrace_http_requests_total", kind=kind, status=str(message["status"]))
                self._metrics.observe("headrace_http_first_byte_seconds", now() - began_at, kind=kind)
            await send(message)

        try:
            _check_host(scope)
            caller = self._admitted(endpoint, headers, scope)
            allowance = self._limits.take(caller.name, kind, self._rate(caller, kind), began_at)
            if not allowance.allowed:
                raise HttpError(
                    429,
                    ErrorCode.RATE_LIMITED,
                    f"Rate limit for {kind} exceeded. Retry in {allowance.retry_after_s:.2f} s.",
                    retry_after_s=allowance.retry_after_s,
                )
        except HeadraceError as error:
            await error_response(error, path)(scope, receive, counted)
            return
        scope["state"].update(caller=caller, headers=headers)
        await self._app(scope, receive, counted)

    def _endpoint(self, scope: Scope) -> Endpoint[Any] | None:
        """The endpoint of a request. Its path becomes the endpoint's, where the client has another spelling of it."""
        plain = _plain(scope["path"])
        for path in (plain, _HEALTH.get(plain, f"/v1{plain}")):
            if (endpoint := self._directory.find(path)) is not None:
                scope["path"] = path
                return endpoint
        return None

    def _admitted(self, endpoint: Endpoint[Any] | None, headers: Mapping[str, str], scope: Scope) -> Caller:
        address = (scope["client"] or ("unknown", 0))[0]
        if not self._ring.locked and self._on_loopback:
            _check_names(headers, self._names)
        if endpoint is not None and endpoint.access is Access.OPEN:
            return Caller(address)
        try:
            return identify(self._ring.keys, headers, address, locked=self._ring.locked)
        except HttpError as error:
            allowance = self._limits.take(sender_of(address), _REFUSED, _REFUSED, asyncio.get_running_loop().time())
            if allowance.allowed:
                raise
            raise HttpError(
                429,
                ErrorCode.RATE_LIMITED,
                f"Too many calls without a valid API key. Retry in {allowance.retry_after_s:.2f} s.",
                retry_after_s=allowance.retry_after_s,
            ) from error

    def _limit_headers(self, allowance: Allowance, caller: Caller | None, path: str) -> list[tuple[bytes, bytes]]:
        """The limits of the caller. Quotas of its key are more telling than the rate of this kind of call."""
        key = None if caller is None else caller.key
        quotas = self._quotas.headers(key, anthropic=path.startswith("/v1/messages"))
        headers = _rate_headers(allowance) | quotas
        return [(name.encode(), value.encode()) for name, value in headers.items()]

    def _rate(self, caller: Caller, kind: Kind) -> Rate:
        own = getattr(caller.key, f"{kind}_per_s", None)
        return Rate.of(self._rates[kind] if own is None else own, burst_s=_BURST_S)


def _plain(path: str) -> str:
    """A path without doubled and trailing slashes, which come from base URLs that end with one."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def _check_host(scope: Scope) -> None:
    """Refuse a request without one `Host`: with two, a proxy and this gateway may take it for different ones.

    Raises:
        HttpError: 400.
    """
    hosts = [value for name, value in scope["headers"] if name == b"host"]
    if len(hosts) > 1 or (not any(hosts) and scope.get("http_version") != "1.0"):
        raise HttpError(400, ErrorCode.INVALID_REQUEST, "Send exactly one Host header.", param="Host")


def _check_names(headers: Mapping[str, str], admitted: Admitted) -> None:
    origin = headers.get("origin", "")
    host = headers.get("host", "")
    if host and not admitted.host(host):
        message = (
            f"Without API keys, this gateway does not serve the host name {quoted(host)}. Call localhost or 127.0.0.1, "
            "add the name to `http_names`, or set `http_keys`."
        )
        raise HttpError(403, ErrorCode.UNAUTHORIZED, message)
    if origin and not admitted.origin(origin):
        message = (
            f"Without API keys, this gateway does not serve pages from {quoted(origin)}. Add the origin to "
            "`http_origins`, or set `http_keys`."
        )
        raise HttpError(403, ErrorCode.UNAUTHORIZED, message)


def _rate_headers(allowance: Allowance) -> dict[str, str]:
    if not allowance.limit:
        return {}
    return {
        "x-ratelimit-limit-requests": str(allowance.limit),
        "x-ratelimit-remaining-requests": str(allowance.remaining),
        "x-ratelimit-reset-requests": f"{allowance.reset_s:.3f}s",
    }
