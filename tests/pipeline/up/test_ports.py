"""The ports of `headrace up`: a taken one is waited for where it may come free, and one is held for a child."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest

from pipeline.config import Config
from pipeline.up.children import LaunchError
from pipeline.up.ports import check_ports, held_port


async def test_a_port_that_the_roles_of_a_killed_up_leave_in_time_is_used():
    taken = socket.create_server(("127.0.0.1", 0))
    config = Config(http_port=taken.getsockname()[1])
    looking = asyncio.create_task(check_ports(config, broker=False, gateway=True, patience_s=60))
    await asyncio.sleep(0)
    assert not looking.done()
    taken.close()
    await looking


async def test_only_the_ports_of_what_is_started_are_looked_at():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(http_port=port, nats_port=port)
        await check_ports(config, broker=False, gateway=False)
        with pytest.raises(LaunchError, match=f"Port {port} is taken. Choose another --nats-port"):
            await check_ports(config, broker=True, gateway=False)
        any_port = msgspec.structs.replace(config, nats_port=0)
        with pytest.raises(LaunchError, match=f"Cannot serve HTTP at 127.0.0.1:{port}"):
            await check_ports(any_port, broker=True, gateway=True)


def bound(port: int, *options: int) -> socket.socket:
    one = socket.socket()
    for option in options:
        one.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        one.bind(("127.0.0.1", port))
    except OSError:
        one.close()
        raise
    return one


def test_a_held_port_is_for_the_child_alone_and_refuses_until_the_child_listens():
    with held_port() as held:
        port = held.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            bound(port)
        for _ in range(2):  # lives of the child
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            with bound(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT) as child:
                child.listen()
                with socket.create_connection(("127.0.0.1", port)):
                    child.accept()[0].close()
