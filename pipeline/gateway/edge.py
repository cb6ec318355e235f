"""What every HTTP request passes first: is the name right, who calls, how often; and what is counted of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from enum import StrEnum

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import Config
from pipeline.core.limits import Limits, Rate, Verdict
from pipeline.gateway.files import PARTS
from pipeline.gateway.identity import Caller, identify, is_local_name, is_loopback, is_page_of_this_machine
from pipeline.gateway.metrics import Metrics
from pipeline.gateway.responses import error_response
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, HeadraceError

# So many seconds' worth of calls fit at once.
_BURST_S = 10.0


class Kind(StrEnum):
    """What a call is for. Each kind has limits of its own."""

    ANSWERS = "answers"
    LISTS = "lists"
    STATISTICS = "statistics"
    PROBES = "probes"


_ANSWERS = re.compile(r"/v1/(chat/completions|completions|embeddings)|/api/(chat|generate|embed|embeddings)")
_STATISTICS = re.compile(r"/(queue/.*|load|metrics)")
_PROBES = frozenset({"/healthz", "/readyz"})
# What needs no key: whether it lives, and pages that hold nothing of anybody's.
_OPEN = _PROBES | {"/", "/docs", "/openapi.json"}


# Of a response's headers, what a script in a page may read besides those that it always may.
_READABLE_HEADERS = (
    *("location", "preference-applied", "retry-after", "x-request-id", "x-should-retry"),
    *(f"x-ratelimit-{name}-requests" for name in ("limit", "remaining", "reset")),
)


def kind_of(path: str) -> Kind:
    """The kind of a call; what is not known counts as a list."""
    path = path.removesuffix("\n")  # with which it has the same route: their patterns end with `$`
    if _ANSWERS.fullmatch(path):
        return Kind.ANSWERS
    if path in _PROBES:
        return Kind.PROBES
    return Kind.STATISTICS if _STATISTICS.fullmatch(path) else Kind.LISTS


class Pages(CORSMiddleware):
    """Lets scripts of web pages call what is behind it, and read the answers.

    Where keys are in use every page may: no browser sends a key by itself. Without, only pages of this machine.
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        super().__init__(
            app, allow_methods=("GET", "POST", "DELETE"), allow_headers=("*",), expose_headers=_READABLE_HEADERS
        )
        self._every = bool(config.http_keys)

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether a page may call."""
        return self._every or is_page_of_this_machine(origin)


class Edge:
    """An ASGI application around another one.

    It puts the caller (`caller`) and the headers (`headers`, names in lower case) into the request's state.

    Args:
        app: gets what may pass.
        config: keys and rates.
        metrics: where requests are counted.
    """

    def __init__(self, app: ASGIApp, config: Config, metrics: Metrics) -> None:
        self._app = app
        self._keys = config.http_keys
        self._metrics = metrics
        self._limits = Limits()
        self._rates = {
            Kind.ANSWERS: config.http_answers_per_s,
            Kind.LISTS: config.http_lists_per_s,
            Kind.STATISTICS: config.http_statistics_per_s,
            Kind.PROBES: 0.0,
        }
        self._local_only = not self._keys and is_loopback(config.http_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        path: str = scope["path"]
        kind = kind_of(path)
        now = asyncio.get_running_loop().time
        began_at = now()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        verdict = Verdict(allowed=True)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_limit_headers(verdict)]
                self._metrics.count("headrace_http_requests_total", kind=kind, status=str(message["status"]))
                self._metrics.observe("headrace_http_first_byte_seconds", now() - began_at, kind=kind)
            await send(message)

        try:
            caller = self._admitted(path, headers, scope)
            verdict = self._limits.take(caller.name, kind, self._rate(caller, kind), began_at)
            if not verdict.allowed:
                raise HttpError(
                    429,
                    ErrorCode.RATE_LIMITED,
                    f"too many calls for {kind}: one more fits in {verdict.retry_after_s:.2f} s",
                    retry_after_s=verdict.retry_after_s,
                )
        except HeadraceError as error:
            await error_response(error, path)(scope, receive, counted)
            return
        scope["state"].update(caller=caller, headers=headers)
        await self._app(scope, receive, counted)

    def _admitted(self, path: str, headers: Mapping[str, str], scope: Scope) -> Caller:
        address = (scope["client"] or ("unknown", 0))[0]
        if self._local_only:
            _check_names(headers)
        if path in _OPEN or path.startswith(PARTS):
            return Caller(address)
        return identify(self._keys, headers, address)

    def _rate(self, caller: Caller, kind: Kind) -> Rate:
        own = getattr(caller.key, f"{kind}_per_s", None)
        return Rate.of(self._rates[kind] if own is None else own, burst_s=_BURST_S)


def _check_names(headers: Mapping[str, str]) -> None:
    origin = headers.get("origin", "")
    host = headers.get("host", "")
    if (host and not is_local_name(host)) or (origin and not is_local_name(origin.partition("://")[2])):
        raise HttpError(
            403,
            ErrorCode.UNAUTHORIZED,
            "without API keys the gateway answers to this machine's own names only: localhost, 127.0.0.1",
        )


def _limit_headers(verdict: Verdict) -> list[tuple[bytes, bytes]]:
    if not verdict.limit:
        return []
    return [
        (b"x-ratelimit-limit-requests", b"%d" % verdict.limit),
        (b"x-ratelimit-remaining-requests", b"%d" % verdict.remaining),
        (b"x-ratelimit-reset-requests", b"%.3fs" % verdict.reset_s),
    ]
