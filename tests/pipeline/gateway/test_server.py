"""What is written in one turn of the event loop leaves in one piece; the address that is printed answers."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import pytest

from pipeline.config import Config
from pipeline.gateway.gathering import Gathering
from pipeline.gateway.server import url_of
from pipeline.process.lifecycle import StartError
from pipeline.process.listening import bind
from tests.waiting import eventually


class Received(asyncio.Protocol):
    """The other end of a connection."""

    def __init__(self) -> None:
        self.data = b""
        self.over = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set()


class Counting:
    """A real transport whose writes are counted."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str):
        return getattr(self._transport, name)


@pytest.fixture
async def ends():
    """A gathering transport, what counts its writes, and the protocol at the other end."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Queue[Received] = asyncio.Queue()

    def accept() -> Received:
        accepted.put_nowait(received := Received())
        return received

    server = await loop.create_server(accept, "127.0.0.1", 0)
    async with server:
        transport, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        counting = Counting(transport)
        yield Gathering(counting, loop), counting, await accepted.get()
        transport.abort()


async def test_a_head_and_its_body_are_one_piece(ends):
    gathering, counting, received = ends
    gathering.write(b"head ")
    gathering.write(b"body")
    await eventually(lambda: received.data == b"head body")
    assert counting.pieces == [b"head body"]
    gathering.write(b", more")
    await eventually(lambda: received.data == b"head body, more")
    assert len(counting.pieces) == 2


async def test_what_is_much_does_not_gather(ends):
    gathering, counting, received = ends
    for _ in range(10):
        gathering.write(b"x" * 10_000)
    assert len(counting.pieces) == 2
    await eventually(lambda: len(received.data) == 100_000)


async def test_closing_sends_what_is_held_first(ends):
    gathering, _, received = ends
    gathering.write(b"last words")
    gathering.close()
    assert gathering.is_closing()
    await received.over.wait()
    assert received.data == b"last words"


async def test_an_abort_drops_what_is_held_and_later_writes(ends):
    gathering, counting, received = ends
    gathering.write(b"never")
    gathering.abort()
    gathering.write(b"seen")
    await received.over.wait()
    assert (counting.pieces, received.data) == ([], b"")


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::", "0.0.0.0", "::1", "127.0.0.1"])
def test_the_printed_address_is_one_that_answers(host: str):
    try:
        listening = bind(Config(http_host=host, state_dir="x"))
    except StartError:
        pytest.skip("IPv6 is switched off")
    with listening:
        address = urlsplit(url_of(listening))
        socket.create_connection((address.hostname, address.port), timeout=10).close()
        if host == "::":
            socket.create_connection(("127.0.0.1", address.port), timeout=10).close()
