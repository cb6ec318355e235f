"""The private parts of libraries that headrace overrides or relies on.

Each test names the library and what has changed in it. A failure after an upgrade means: read the library's new code,
adapt the module that `WHERE` names, then this test, and only then raise the cap in `pyproject.toml`. The tests with
"still" in their names fail when an override has become unnecessary.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import json
import logging
import re
import signal
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
import uvicorn
from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from packaging.requirements import Requirement
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from consumers.engines.ollama.client import OllamaClient
from pipeline.broker.client import MendedClient
from pipeline.config import Config
from pipeline.gateway.server import HttpConnection, HttpServer
from pipeline.gateway.turns import Beginnings
from tests.support import wait_until
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parent.parent
# The libraries with private parts that are relied on, and the modules that do.
WHERE = {
    "uvicorn": "pipeline/gateway/server.py",
    "nats-py": "pipeline/broker/client.py",
    "ollama": "consumers/engines/ollama/client.py",
    "opentelemetry-sdk": "pipeline/telemetry/recording.py",
    "opentelemetry-exporter-otlp-proto-http": "pipeline/telemetry/recording.py",
    "mlx-lm": "consumers/engines/local/child/batch.py",
}
# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 60.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def changed(library: str, what: str) -> str:
    return f"{library} {importlib.metadata.version(library)} has changed {what}: see {WHERE[library]}"


# ---- versions


def requirement(library: str) -> Requirement:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(each for each in map(Requirement, dependencies) if each.name == library)


@pytest.mark.parametrize("library", WHERE)
def test_the_version_has_a_cap(library: str):
    assert any(each.operator in ("<", "<=", "~=", "==") for each in requirement(library).specifier)


@pytest.mark.parametrize("library", WHERE)
@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_the_pinned_version_is_below_its_cap(library: str, file: str):
    pinned = re.findall(rf"^{library}(?:\[\w+\])?==(\S+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned, f"{library} is missing in {file}"
    assert all(requirement(library).specifier.contains(version) for version in pinned)


@pytest.mark.parametrize("library", WHERE)
def test_the_module_that_relies_on_it_exists(library: str):
    assert (ROOT / WHERE[library]).is_file()


# ---- signatures

SIGNATURES = [
    ("uvicorn", HttpToolsProtocol, "_start_asgi_task", ["self", "cycle", "app"]),
    ("uvicorn", HttpToolsProtocol, "connection_made", ["self", "transport"]),
    ("uvicorn", HttpToolsProtocol, "connection_lost", ["self", "exc"]),
    ("uvicorn", HttpToolsProtocol, "data_received", ["self", "data"]),
    ("uvicorn", HttpToolsProtocol, "on_message_begin", ["self"]),
    ("uvicorn", HttpToolsProtocol, "on_headers_complete", ["self"]),
    ("uvicorn", HttpToolsProtocol, "pause_writing", ["self"]),
    ("uvicorn", HttpToolsProtocol, "resume_writing", ["self"]),
    ("uvicorn", uvicorn.Server, "capture_signals", ["self"]),
    ("uvicorn", uvicorn.Server, "serve", ["self", "sockets"]),
    ("nats-py", Client, "_send_ping", ["self", "future"]),
    ("nats-py", Client, "_process_pong", ["self"]),
    ("nats-py", Client, "close", ["self"]),
    ("nats-py", Client, "_connect_to_server", ["self", "s"]),
    ("nats-py", Client, "_process_headers", ["self", "headers"]),
    ("nats-py", Client, "_process_msg", ["self", "sid", "subject", "reply", "data", "headers"]),
    ("ollama", ollama.AsyncClient, "_request", ["self", "cls", "args", "stream", "kwargs"]),
    ("opentelemetry-exporter-otlp-proto-http", OTLPSpanExporter, "export", ["self", "spans"]),
    ("opentelemetry-exporter-otlp-proto-http", OTLPSpanExporter, "shutdown", ["self"]),
]


@pytest.mark.parametrize(
    ("library", "owner", "name", "parameters"),
    SIGNATURES,
    ids=[f"{library}: {owner.__name__}.{name}" for library, owner, name, _ in SIGNATURES],
)
def test_the_method_that_is_overridden_or_called_has_its_signature(library, owner, name, parameters):
    method = getattr(owner, name, None)
    assert method is not None, changed(library, f"{owner.__name__}.{name}")
    assert list(inspect.signature(method).parameters) == parameters, changed(library, f"{owner.__name__}.{name}")


# ---- uvicorn


class Transport(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def answers(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def never_answers(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


def connected(kind: type[HttpToolsProtocol], app: Any, **settings: Any) -> tuple[HttpToolsProtocol, Transport]:
    state = ServerState()
    if issubclass(kind, HttpConnection):
        kind = type(kind.__name__, (kind,), {"beginnings": Beginnings()})
    protocol = kind(config=uvicorn.Config(app, ws="none", lifespan="off", **settings), server_state=state, app_state={})
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


async def close(protocol: HttpToolsProtocol) -> None:
    protocol.connection_lost(None)
    for task in list(protocol.tasks):
        task.cancel()
    await asyncio.gather(*protocol.tasks, return_exceptions=True)


async def test_uvicorn_still_writes_head_and_body_apart_and_our_transport_joins_them():
    for kind, writes in ((HttpToolsProtocol, 2), (HttpConnection, 1)):
        protocol, transport = connected(kind, answers)
        protocol.data_received(GET)
        await eventually(lambda written=transport.written: b"".join(written).endswith(b"\r\n\r\nok"))
        assert len(transport.written) == writes, changed("uvicorn", "how it writes a response")
        await close(protocol)


async def test_uvicorn_keeps_its_state_in_the_attributes_that_are_read():
    protocol, _ = connected(HttpToolsProtocol, never_answers)
    protocol.data_received(GET)
    cycle = protocol.cycle
    for owner, names in (
        (protocol, ("loop", "transport", "flow", "tasks", "connections")),
        (cycle, ("response_complete", "disconnected", "message_event", "scope")),
    ):
        for name in names:
            assert hasattr(owner, name), changed("uvicorn", f"{type(owner).__name__}.{name}")
    assert isinstance(cycle, RequestResponseCycle)
    assert not cycle.response_complete
    await close(protocol)
    assert cycle.disconnected
    assert cycle.message_event.is_set()


async def test_uvicorn_starts_each_request_by_start_asgi_task():
    started: list[Any] = []

    class Watched(HttpToolsProtocol):
        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            started.append(app)
            super()._start_asgi_task(cycle, app)

    for limit, app in ((None, never_answers), (1, service_unavailable)):
        protocol, _ = connected(Watched, never_answers, limit_concurrency=limit)
        protocol.data_received(GET)
        if limit is None:
            started[-1] = never_answers if started[-1] is protocol.app else started[-1]
        assert started[-1] is app, changed("uvicorn", "how it starts requests, or answers above limit_concurrency")
        await close(protocol)


async def test_uvicorn_calls_the_hooks_of_a_request_head_in_order():
    called: list[str] = []

    class Watched(HttpToolsProtocol):
        def on_message_begin(self) -> None:
            called.append("begin")
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            called.append("complete")
            super().on_headers_complete()

    protocol, _ = connected(Watched, never_answers)
    protocol.data_received(GET[:10])
    assert called == ["begin"], changed("uvicorn", "when it calls on_message_begin")
    protocol.data_received(GET[10:])
    assert called == ["begin", "complete"], changed("uvicorn", "when it calls on_headers_complete")
    await close(protocol)


async def test_uvicorn_still_tells_only_the_last_pipelined_request_that_its_client_is_gone():
    for kind, told in ((HttpToolsProtocol, False), (HttpConnection, True)):
        protocol, _ = connected(kind, never_answers)
        protocol.data_received(GET)
        first = protocol.cycle
        protocol.data_received(GET)
        assert protocol.cycle is not first
        await close(protocol)
        assert first.disconnected is told, changed("uvicorn", "which requests connection_lost tells")


async def test_uvicorn_serves_within_capture_signals_which_we_replace():
    class Entered(Exception):
        pass

    class Watched(uvicorn.Server):
        def capture_signals(self) -> Any:
            raise Entered

    with pytest.raises(Entered):
        await Watched(uvicorn.Config(answers, lifespan="off")).serve()
    before = signal.getsignal(signal.SIGTERM)
    with uvicorn.Server(uvicorn.Config(answers)).capture_signals():
        assert signal.getsignal(signal.SIGTERM) is not before, changed("uvicorn", "Server.capture_signals")
    with HttpServer(answers, Config()).capture_signals():
        assert signal.getsignal(signal.SIGTERM) is before


def test_uvicorn_ends_by_the_attributes_that_are_set():
    server = uvicorn.Server(uvicorn.Config(answers))
    assert (server.should_exit, server.force_exit) == (False, False), changed("uvicorn", "how a server is ended")


# ---- nats-py


def with_pending(kind: type[Client]) -> tuple[Client, list[bytes]]:
    """A client that is connected to nothing, with a command that waits to be written."""
    written: list[bytes] = []

    class Wire:
        def write(self, data: bytes) -> None:
            written.append(data)

        def writelines(self, lines: list[bytes]) -> None:
            written.extend(lines)

    async def flush() -> None:
        """Without the client's tasks, waiting for a flush would not end."""

    client = kind()
    for name, value in (("_transport", Wire()), ("_pending", [b"UNSUB"]), ("_pending_data_size", 5)):
        assert hasattr(client, name), changed("nats-py", f"Client.{name}")
        setattr(client, name, value)
    client._status = Client.CONNECTED
    client._flush_pending = flush
    return client, written


async def test_the_ping_of_nats_py_still_overtakes_what_is_pending_and_ours_does_not():
    theirs, written = with_pending(Client)
    await theirs._send_ping()
    assert [line.strip() for line in written] == [b"PING"], changed("nats-py", "the order of PING and pending commands")
    ours, written = with_pending(MendedClient)
    await ours._send_ping()
    assert [line.strip() for line in written] == [b"UNSUB", b"PING"]


async def test_nats_py_still_fails_on_the_pong_of_a_flush_that_was_given_up_and_ours_does_not():
    for kind in (Client, MendedClient):
        client = kind()
        given_up, waiting = asyncio.Future(), asyncio.Future()
        given_up.cancel()
        client._pongs = [given_up, waiting]
        if kind is Client:
            with pytest.raises(asyncio.InvalidStateError):
                await client._process_pong()
        else:
            await client._process_pong()
            assert not waiting.done(), changed("nats-py", "Client._process_pong")
            await client._process_pong()
            assert waiting.result() is True


class Failing(TcpTransport):
    """Fails as it is first cancelled, so that the cancel is lost, as `asyncio.wait_for` can lose it."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0

    def __bool__(self) -> bool:
        return True

    async def wait_closed(self) -> None:
        """It is."""

    async def connect(self, *_: object, **__: object) -> None:
        self.attempts += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if self.attempts == 1:
                raise ConnectionRefusedError from None
            raise


async def closed_while_it_connects(kind: type[Client]) -> tuple[asyncio.Task[None], Failing]:
    """The task that connects again, and its transport."""
    client, transport = kind(), Failing()
    client._transport = transport
    client._setup_server_pool("nats://127.0.0.1:9")
    client._current_server = client._server_pool[0]
    client.options |= {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.001, "connect_timeout": 1}
    client._error_cb = client._disconnected_cb = quiet
    client._status, client._flush_queue = Client.RECONNECTING, asyncio.Queue()
    client._reconnection_task = asyncio.create_task(client._attempt_reconnect())
    await eventually(lambda: transport.attempts == 1)
    await client.close()
    return client._reconnection_task, transport


async def quiet(_: Exception | None = None) -> None:
    """Say nothing."""


async def test_nats_py_still_goes_on_connecting_if_a_cancel_is_lost_and_ours_does_not():
    connecting, transport = await closed_while_it_connects(Client)
    await eventually(lambda: transport.attempts == 2 or connecting.done())
    assert not connecting.done(), changed("nats-py", "Client._attempt_reconnect")
    connecting.cancel()
    await asyncio.wait([connecting], timeout=TIMEOUT_S)
    connecting, transport = await closed_while_it_connects(MendedClient)
    await asyncio.wait([connecting], timeout=TIMEOUT_S)
    assert connecting.done()
    assert transport.attempts == 1


@pytest.mark.parametrize(
    ("headers", "error"),
    [(b"NATS/1.0", IndexError), (b"NATS/1.0 \xff\xff\xff\r\n\r\n", UnicodeDecodeError)],
    ids=["cut off", "not UTF-8"],
)
async def test_nats_py_still_fails_on_headers_that_ours_survives(headers: bytes, error: type[Exception]):
    with pytest.raises(error):
        await Client()._process_headers(headers)
    assert await MendedClient()._process_headers(headers) is None
    good = b"NATS/1.0\r\na: b\r\n\r\n"
    assert await MendedClient()._process_headers(good) == {"a": "b"}, changed("nats-py", "Client._process_headers")


# ---- ollama


def served_by(handler: Callable[[httpx.Request], httpx.Response]) -> ollama.AsyncClient:
    return ollama.AsyncClient("http://x:1", transport=httpx.MockTransport(handler))


async def test_the_request_of_ollama_sends_and_returns_bodies_unchanged():
    body = {"unknown": {"nested": [1]}, "messages": [{"tool_calls": [{"id": "call-1"}]}]}

    def echo(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"method": request.method, "sent": json.loads(request.content)})

    answer = await served_by(echo)._request(dict, "POST", "/api/chat", stream=False, json=body)
    assert answer == {"method": "POST", "sent": body}, changed("ollama", "AsyncClient._request")


async def test_the_streamed_request_of_ollama_yields_the_lines_and_raises_their_error():
    def lines(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=b'{"a": 1}\n{"error": "broken"}\n')

    parts = await served_by(lines)._request(dict, "POST", "/api/chat", stream=True, json={})
    assert await anext(parts) == {"a": 1}
    with pytest.raises(ollama.ResponseError, match="broken") as raised:
        await anext(parts)
    assert raised.value.status_code == -1, changed("ollama", "the status of an error inside a stream")


async def test_ollama_tells_a_status_and_a_refused_connection_as_we_translate_them():
    def refused(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ollama.ResponseError) as raised:
        await served_by(lambda _: httpx.Response(404, text="no model"))._request(dict, "GET", "/", stream=False)
    assert (raised.value.status_code, raised.value.error) == (404, "no model")
    with pytest.raises(OSError):
        await served_by(refused)._request(dict, "GET", "/", stream=False)


async def test_the_typed_methods_of_ollama_still_lose_what_they_do_not_know():
    sent: list[Any] = []

    def record(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return httpx.Response(200, json={"message": {"role": "assistant", "content": ""}})

    call = {"id": "call-1", "function": {"name": "f", "arguments": {}}}
    await served_by(record).chat("m", messages=[{"role": "assistant", "tool_calls": [call]}])
    (message,) = sent[0]["messages"]
    assert "id" not in message["tool_calls"][0], "ollama keeps the ids of tool calls: `_request` may be unnecessary"


async def test_ollama_passes_our_options_to_httpx_and_keeps_its_client():
    client = OllamaClient("somewhere:1", idle_timeout_s=7, load_timeout_s=7)
    inner = client._ollama._client
    assert client.url == "http://somewhere:1", changed("ollama", "AsyncClient._client")
    assert isinstance(inner, httpx.AsyncClient)
    assert (inner.timeout.read, inner.timeout.connect) == (None, 5)
    await client.close()


# ---- OpenTelemetry

LOGGERS = {
    "opentelemetry.exporter.otlp.proto.http.trace_exporter": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk._shared_internal": "opentelemetry-sdk",
    "opentelemetry.trace.span": "opentelemetry-sdk",
    "opentelemetry.trace.propagation.tracecontext": "opentelemetry-sdk",
}


@pytest.mark.parametrize("name", LOGGERS)
def test_opentelemetry_logs_to_the_loggers_that_are_filtered(name: str):
    module = importlib.import_module(name)
    assert module._logger.name == name, changed(LOGGERS[name], f"the logger of {name}")


def spans() -> list[ReadableSpan]:
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("test").start_as_current_span("span") as span:
        pass
    return [span]


@pytest.fixture
def unfiltered(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log without the filters of headrace, which another test may have set."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        for each in list(logger.filters):
            logger.removeFilter(each)
        caplog.set_level(logging.DEBUG, name)
    return caplog


def logged(caplog: pytest.LogCaptureFixture, name: str) -> bool:
    return any(record.name == name for record in caplog.records)


def test_the_exporter_logs_a_failed_delivery_and_its_shutdown_ends_the_pause_between_tries(unfiltered):
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    exporter = OTLPSpanExporter(endpoint="http://127.0.0.1:9/v1/traces", timeout=3600)
    results: list[SpanExportResult] = []
    exporting = threading.Thread(target=lambda: results.append(exporter.export(spans())), daemon=True)
    exporting.start()
    wait_until(lambda: logged(unfiltered, name) or not exporting.is_alive(), what="a log record", timeout_s=TIMEOUT_S)
    assert logged(unfiltered, name), changed("opentelemetry-exporter-otlp-proto-http", "what it logs")
    exporter.shutdown()
    exporting.join(TIMEOUT_S)
    assert results == [SpanExportResult.FAILURE], changed("opentelemetry-exporter-otlp-proto-http", "its shutdown")


def test_the_exporter_still_complains_about_a_second_shutdown(unfiltered):
    exporter = OTLPSpanExporter(endpoint="http://127.0.0.1:9/v1/traces")
    exporter.shutdown()
    unfiltered.clear()
    exporter.shutdown()
    assert unfiltered.records, "a second shutdown is silent: `_Exporter.shutdown` is unnecessary"


def test_the_batch_processor_logs_spans_that_it_drops(unfiltered):
    go_on = threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            go_on.wait(TIMEOUT_S)
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Stuck(), max_queue_size=1, max_export_batch_size=1))
    tracer = provider.get_tracer("test")
    try:
        for _ in range(10):
            tracer.start_span("span").end()
        assert logged(unfiltered, "opentelemetry.sdk._shared_internal"), changed("opentelemetry-sdk", "what it logs")
    finally:
        go_on.set()
        provider.shutdown()


def test_opentelemetry_still_logs_a_publishers_tracestate(unfiltered):
    carrier = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "tracestate": "s3cret"}
    TraceContextTextMapPropagator().extract(carrier)
    assert "s3cret" in unfiltered.text, "a malformed tracestate is not logged: the level need not be raised"


# ---- mlx-lm

# What a `GenerationBatch` holds. A sequence that goes on is put into one without its constructor, which takes a step.
OF_DECODING = {
    *("model", "uids", "prompt_cache", "tokens", "samplers", "fallback_sampler", "logits_processors"),
    *("stop_sequences", "max_tokens"),
    *("_current_tokens", "_current_logprobs", "_next_tokens", "_next_logprobs"),
    *("_token_context", "_num_tokens", "_matchers"),
}


@pytest.fixture
def halves() -> Any:
    """The two halves of mlx-lm's batch generator."""
    return pytest.importorskip("mlx_lm.generate", reason="MLX is not installed")


@pytest.mark.parametrize(
    ("half", "name", "parameters"),
    [
        ("PromptProcessingBatch", "prompt", ["self", "tokens"]),
        ("PromptProcessingBatch", "generate", ["self", "tokens"]),
        ("PromptProcessingBatch", "extract_cache", ["self", "idx"]),
        ("PromptProcessingBatch", "filter", ["self", "keep"]),
        ("GenerationBatch", "next", ["self"]),
        ("GenerationBatch", "extend", ["self", "batch"]),
        ("GenerationBatch", "extract_cache", ["self", "idx"]),
        ("GenerationBatch", "filter", ["self", "keep"]),
        ("GenerationBatch", "empty", ["model", "fallback_sampler"]),
    ],
)
def test_the_halves_of_the_generator_have_the_methods_that_are_called(halves, half, name, parameters):
    method = getattr(getattr(halves, half), name)
    assert list(inspect.signature(method).parameters) == parameters, changed("mlx-lm", f"{half}.{name}")


def test_a_prompt_batch_takes_the_arguments_that_are_given(halves):
    given = ["model", "uids", "caches", "tokens", "prefill_step_size", "samplers", "logits_processors", "max_tokens"]
    taken = inspect.signature(halves.PromptProcessingBatch).parameters
    assert set(given) <= set(taken), changed("mlx-lm", "PromptProcessingBatch")
    assert list(taken)[:3] == given[:3], changed("mlx-lm", "PromptProcessingBatch")


def test_a_generation_batch_holds_what_a_sequence_that_goes_on_sets(halves):
    batch = halves.GenerationBatch.empty(None, lambda logprobs: logprobs)
    assert set(vars(batch)) == OF_DECODING, changed("mlx-lm", "the attributes of GenerationBatch")


def test_mlx_lm_still_takes_a_step_when_a_generation_batch_is_made(halves):
    source = inspect.getsource(halves.GenerationBatch.__init__)
    assert "self._step()" in source, "a GenerationBatch takes no step: `_going_on` may be unnecessary"


def test_mlx_lm_has_its_stream_and_its_wired_limit(halves):
    assert halves.generation_stream is not None, changed("mlx-lm", "generation_stream")
    assert callable(halves.maybe_set_recommended_wired_limit), changed("mlx-lm", "maybe_set_recommended_wired_limit")


@pytest.mark.parametrize("kind", ["KVCache", "RotatingKVCache", "ArraysCache", "CacheList"])
def test_the_caches_that_are_suspended_merge(halves, kind):
    caches = importlib.import_module("mlx_lm.models.cache")
    assert hasattr(getattr(caches, kind), "merge"), changed("mlx-lm", f"{kind}.merge")


def test_a_token_buffer_is_made_from_tokens(halves):
    caches = importlib.import_module("mlx_lm.models.cache")
    assert caches.TokenBuffer([1, 2]).tokens.tolist() == [1, 2], changed("mlx-lm", "TokenBuffer")
