"""The ports of `headrace up`: looked at before anything starts, and held for a child that starts again and again."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from pipeline.config import Config
from pipeline.process.lifecycle import StartError
from pipeline.process.listening import bind
from pipeline.up.children import LaunchError

_LOOK_EVERY_S: Final = 0.1


async def check_ports(config: Config, *, broker: bool, gateway: bool, patience_s: float = 0.0) -> None:
    """See whether the ports that the settings name are free. The processes that need them start much later.

    Args:
        config: the settings.
        broker: whether the embedded broker is started.
        gateway: whether the gateway is started.
        patience_s: how long processes of an `up` that was killed have to end.

    Raises:
        LaunchError: a port is taken, or the host is not an address of this machine.
    """
    give_up_at = asyncio.get_running_loop().time() + patience_s
    while trouble := _trouble(config, broker=broker, gateway=gateway):
        if asyncio.get_running_loop().time() >= give_up_at:
            raise LaunchError(trouble)
        await asyncio.sleep(_LOOK_EVERY_S)


def taken(port: int) -> str:
    """What is said of a taken port of the broker."""
    return f"Port {port} is taken. Choose another --nats-port, or 0 for a free one."


def _trouble(config: Config, *, broker: bool, gateway: bool) -> str:
    if broker and config.nats_port:
        try:
            socket.create_server(("127.0.0.1", config.nats_port)).close()
        except OSError:
            return taken(config.nats_port)
    if gateway:
        try:
            bind(config).close()
        except StartError as error:
            return str(error)
    return ""


def held_port() -> socket.socket:
    """A socket that is bound to a free loopback port and does not listen: the port is kept for a child.

    A child that binds it with `SO_REUSEPORT` can listen on it. Until it does, connections are refused. No other
    program gets the port, not even between two lives of the child.
    """
    held = socket.socket()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        held.setsockopt(socket.SOL_SOCKET, option, 1)
    held.bind(("127.0.0.1", 0))
    return held
