"""A connection comes about within seconds or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
import uvloop

from pipeline.broker import connection
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from tests.support import ROOT, NatsServer
from tests.waiting import TIMEOUT_S, eventually


async def test_where_nobody_answers_connecting_fails_and_leaves_nothing_running(monkeypatch):
    monkeypatch.setattr(connection, "_CONNECT_PATIENCE_S", 0.3)
    before = asyncio.all_tasks()
    with pytest.raises(Unreachable, match=r"No NATS server at 127\.0\.0\.1:9"):
        async with asyncio.timeout(60), Bus.connect("nats://user:secret@127.0.0.1:9", name="test"):
            pass
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_who_gives_up_connecting_leaves_no_socket_open():
    reached, left = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await reader.read()
        writer.close()
        left.set()

    async def connect() -> None:
        async with Bus.connect(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", name="test"):
            pass

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        connecting = asyncio.create_task(connect())
        await reached.wait()
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
        await asyncio.wait_for(left.wait(), TIMEOUT_S)


async def test_a_flush_that_is_given_up_leaves_the_connection_reading(nats_server: NatsServer):
    async with Bus.connect(nats_server.url, name="test") as bus:
        for _ in range(20):
            given_up = asyncio.create_task(bus.nc.flush())
            await asyncio.sleep(0)  # its PING is sent
            given_up.cancel()
            await asyncio.wait([given_up])
            await bus.nc.flush(5)
        await bus.request("$JS.API.INFO")


async def nothing(*_):
    return b""


async def drained(bus: Bus) -> None:
    await bus.drain(await bus.subscribe("some.subject", nothing))


async def served(bus: Bus) -> None:
    await (await bus.serve("some-service", "for the test", {"some.subject": nothing}))()


@pytest.mark.parametrize("call", [drained, served])
async def test_a_call_that_is_cancelled_as_the_broker_answers_is_cancelled(nats_server: NatsServer, monkeypatch, call):
    async with Bus.connect(nats_server.url, name="test") as bus:
        flush = bus.nc.flush

        async def cancelled_meanwhile(*args: object) -> None:
            # Before Python 3.12 `asyncio.wait_for` returns the result if it is there when the task is cancelled.
            await flush(*args)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)

        monkeypatch.setattr(bus.nc, "flush", cancelled_meanwhile)
        calling = asyncio.create_task(call(bus))
        await asyncio.wait([calling], timeout=TIMEOUT_S)
        assert calling.cancelled()


@pytest.mark.parametrize("loop_factory", [uvloop.new_event_loop, asyncio.SelectorEventLoop])
def test_a_connection_that_was_lost_closes_with_messages_that_wait_to_be_sent(nats_server: NatsServer, loop_factory):
    async def lose() -> None:
        async with Bus.connect(nats_server.url, name="test") as bus:
            nats_server.kill()
            await eventually(lambda: not bus.is_connected, what="the connection is lost")
            await bus.nc.publish("a", b"b")
        assert bus.nc.is_closed

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(lose())


async def test_closing_a_lost_connection_does_not_look_like_a_cancel(nats_server: NatsServer, monkeypatch):
    async with Bus.connect(nats_server.url, name="test") as bus:
        nats_server.kill()
        await eventually(lambda: not bus.is_connected, what="the connection is lost")

        async def waiting_with_the_next_attempt() -> None:
            # The client cancels that attempt first, and with it the future for which both wait.
            end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            end.cancel()
            await end

        monkeypatch.setattr(bus.nc._transport, "wait_closed", waiting_with_the_next_attempt)
    assert bus.nc.is_closed


async def test_a_cancel_while_a_connection_closes_is_kept(nats_server: NatsServer, monkeypatch):
    never = asyncio.Event()

    async def closing() -> None:
        async with Bus.connect(nats_server.url, name="test") as bus:
            monkeypatch.setattr(bus.nc._transport, "wait_closed", waits)

    closes = asyncio.Event()

    async def waits() -> None:
        closes.set()
        await never.wait()

    task = asyncio.create_task(closing())
    await asyncio.wait_for(closes.wait(), TIMEOUT_S)
    task.cancel()
    await asyncio.wait([task], timeout=TIMEOUT_S)
    assert task.cancelled()


async def test_a_user_that_the_server_refuses_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_CONNECT_PATIENCE_S", 3600.0)
    conf = tmp_path / "one-user.conf"
    conf.write_text((ROOT / "nats" / "embedded.conf").read_text() + "authorization { user: me, password: right }\n")
    server = NatsServer(tmp_path, conf=str(conf))
    server.start()
    try:
        with pytest.raises(Unreachable, match=r"refuses the connection: .*Authorization Violation"):
            async with asyncio.timeout(TIMEOUT_S), Bus.connect(f"nats://me:wrong@127.0.0.1:{server.port}", name="test"):
                pass
        async with Bus.connect(f"nats://me:right@127.0.0.1:{server.port}", name="test") as bus:
            assert bus.is_connected
    finally:
        server.kill()


async def test_a_connection_to_a_server_that_stands_still_ends_and_leaves_nothing_running(nats_server: NatsServer):
    before = asyncio.all_tasks()
    async with asyncio.timeout(20), Bus.connect(nats_server.url, name="test") as bus:
        await bus.request("$JS.API.INFO")
        os.kill(nats_server.pid, signal.SIGSTOP)
        await bus.publish("somewhere", b"x" * 1_000_000)
    os.kill(nats_server.pid, signal.SIGCONT)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert bus.nc.is_closed
