"""HTTP as clients send it: offers of other protocols, closed sides, slashes, and names and pages of elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Self

import httpx
import pytest

from pipeline.gateway.identity import Admitted, make_key
from tests.pipeline.gateway.conftest import Engine, Serve

ASK = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BODY = json.dumps(CHAT).encode()


def head(*headers: str, version: str = "1.1", path: str = ASK, length: int = len(BODY)) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")


class Connection:
    """A connection on which a test writes bytes."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._port = client.base_url.port

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def response(self) -> tuple[bytes, bytes]:
        """The head and the body of the next final response that has a length."""
        async with asyncio.timeout(30):
            start = b" 100 "
            while b" 100 " in start[:16]:
                start = await self.reader.readuntil(b"\r\n\r\n")
            (length,) = [line for line in start.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            return start, await self.reader.readexactly(int(length.partition(b":")[2]))


@pytest.mark.parametrize("pieces", [1, 2, 7], ids=lambda count: f"in-{count}-pieces")
async def test_an_offer_of_another_protocol_is_ignored_and_the_connection_goes_on(
    serve: Serve, engine: Engine, pieces: int
):
    async with serve() as client, Connection(client) as connection:
        for headers in (OFFER, ("Connection: Upgrade", "Upgrade: websocket"), ()):
            data = head(*headers) + BODY
            size = -(-len(data) // pieces)
            for at in range(0, len(data), size):
                connection.writer.write(data[at : at + size])
                await connection.writer.drain()
            await engine.answer(await engine.next_id())
            start, body = await connection.response()
            assert start.startswith(b"HTTP/1.1 200 ")
            assert json.loads(body)["choices"][0]["message"]["content"] == "Hello there"


async def test_requests_behind_an_offer_are_answered_in_their_order(serve: Serve, engine: Engine):
    async with serve() as client, Connection(client) as connection:
        lists = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        connection.writer.write(lists + head(*OFFER) + BODY + lists)
        await engine.answer(await engine.next_id())
        bodies = [json.loads((await connection.response())[1]) for _ in range(3)]
        assert [body["object"] for body in bodies] == ["list", "chat.completion", "list"]


@pytest.mark.parametrize("connection_header", ["Connection: Upgrade, close", "Connection: close, Upgrade"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_an_offer_in_the_only_request_of_a_connection_is_ignored(
    serve: Serve, engine: Engine, connection_header: str, version: str
):
    async with serve() as client, Connection(client) as connection:
        connection.writer.write(head(connection_header, "Upgrade: websocket", version=version) + BODY)
        await engine.answer(await engine.next_id())
        async with asyncio.timeout(30):
            response = await connection.reader.read()  # to the end, which the client asked for
        assert response.startswith(b"HTTP/1.1 200 ")
        assert b"Hello there" in response


async def test_an_answer_that_comes_soon_comes_without_an_interim_response(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.server._FIRST_PROBE_S", 3600)
    async with serve() as client, Connection(client) as connection:
        connection.writer.write(head() + BODY)
        connection.writer.write_eof()
        await engine.answer(await engine.next_id())
        async with asyncio.timeout(30):
            assert (await connection.reader.read()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_has_ended_its_side_gets_its_answer(serve: Serve, engine: Engine, stream: bool):
    async with serve() as client, Connection(client) as connection:
        body = json.dumps({**CHAT, "stream": stream}).encode()
        connection.writer.write(head(length=len(body)) + body)
        connection.writer.write_eof()
        request_id = await engine.next_id()
        assert (await connection.reader.readline()).startswith(b"HTTP/1.1 100 "), "it is asked whether it is there"
        await engine.answer(request_id)
        async with asyncio.timeout(30):
            answer = await connection.reader.read()
        assert b"HTTP/1.1 200 " in answer
        assert b"connection: close" in answer.lower()
        assert b"Hello" in answer
        assert engine.cancelled.empty()


async def test_a_client_that_has_closed_its_connection_is_not_taken_for_one_that_waits(serve: Serve, engine: Engine):
    async with serve() as client:
        async with Connection(client) as connection:
            connection.writer.write(head() + BODY)
            request_id = await engine.next_id()
        async with asyncio.timeout(30):
            assert await engine.cancelled.get() == request_id


@pytest.mark.parametrize("sent", [b"", head()[:40], head() + BODY[:9]], ids=["nothing", "half-a-head", "half-a-body"])
async def test_a_request_that_will_not_be_complete_ends_its_connection(serve: Serve, engine: Engine, sent: bytes):
    async with serve() as client, Connection(client) as connection:
        connection.writer.write(sent)
        connection.writer.write_eof()
        async with asyncio.timeout(30):
            await connection.reader.read()


async def test_doubled_and_trailing_slashes_are_those_of_a_base_url(serve: Serve, engine: Engine):
    async with serve(http_lists_per_s=0.1) as client:
        port = client.base_url.port
        for path in (
            "//v1/chat/completions",
            "/v1//chat/completions",
            "/v1/chat/completions/",
            "//v1/chat///completions//",
        ):
            call = asyncio.create_task(client.post(f"http://127.0.0.1:{port}{path}", json=CHAT))
            await engine.answer(await engine.next_id())
            assert (await call).status_code == 200, path
        # They are no way around the limit of their kind.
        statuses = [(await client.get(f"http://127.0.0.1:{port}/v1/models{'/' * n}")).status_code for n in range(3)]
        assert statuses[-1] == 429
        assert (await client.get(f"http://127.0.0.1:{port}//nothing//here")).status_code in (404, 429)


async def test_a_base_url_without_v1_serves_openais_paths(serve: Serve, engine: Engine):
    async with serve() as client:
        for path in ("/chat/completions", "/chat/completions/"):
            call = asyncio.create_task(client.post(path, json=CHAT))
            await engine.answer(await engine.next_id())
            assert (await call).status_code == 200, path
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/nothing")).status_code == 404
        refused = await client.post("/chat/completions", json={"messages": []})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/v1/models/", "//v1/models//"])
async def test_a_slash_after_the_path_of_a_list_is_no_entry_of_it(serve: Serve, path: str):
    async with serve() as client:
        response = await client.get(f"http://127.0.0.1:{client.base_url.port}{path}")
        assert (response.status_code, response.json()["object"]) == (200, "list")


APPS = ["app://", "vscode-webview://", "null", "https://chat.example"]


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        *[(origin, True) for origin in ("app://obsidian.md", "vscode-webview://1a2b", "null", "https://chat.example")],
        *[(origin, True) for origin in ("http://mac.local:3000", "http://localhost:3000", "tauri://localhost")],
        *[(origin, False) for origin in ("https://other.example", "http://chat.example", "file://", "moz-app://x")],
    ],
)
async def test_pages_and_names_of_the_settings_are_served_without_keys(
    serve: Serve, engine: Engine, origin: str, allowed: bool
):
    async with serve(http_origins=APPS, http_names=["Mac.local"]) as client:
        answer = await client.get("/v1/models", headers={"Origin": origin})
        assert answer.status_code == (200 if allowed else 403)
        assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
        for host, status in (("mac.local:8411", 200), ("MAC.LOCAL", 200), ("pc.local", 403)):
            assert (await client.get("/v1/models", headers={"Host": host})).status_code == status


def test_no_name_and_no_origin_is_admitted_unless_a_setting_says_so():
    none = Admitted.of([], [])
    assert not any(map(none.origin, ("null", "", "://", "app://x", "http://", "http://mac.local")))
    assert not any(map(none.host, ("mac.local", "192.168.1.2", "")))
    assert not Admitted.of([], ["app://"]).origin("null")


async def test_names_and_origins_open_nothing_where_keys_are_in_use(serve: Serve, engine: Engine):
    _, key = make_key("alice")
    async with serve(http_keys=[key], http_origins=APPS, http_names=["mac.local"]) as client:
        answer = await client.get("/v1/models", headers={"Origin": "null", "Host": "mac.local"})
        assert answer.status_code == 401
