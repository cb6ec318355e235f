"""The socket on which the gateway listens. `headrace up` binds it once before it starts anything, to see if it can."""

from __future__ import annotations

import os
import socket
from typing import Final

from pipeline.config import Config
from pipeline.process.lifecycle import StartError

HTTP_PORT: Final = 8411
"""The gateway's port if no other is set."""

_BACKLOG: Final = 16_384
"""The kernel holds back this many connections at most, less if its own limit (net.core.somaxconn) is lower."""


def bind(config: Config) -> socket.socket:
    """The listening socket.

    Raises:
        StartError: the port is in use, or the host is not an address of this machine.
    """
    host, port = config.http_host, config.http_port
    ports = [port] if port or config.state_dir else [HTTP_PORT, 0]
    for last, each in [(each == ports[-1], each) for each in ports]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            both = host == "::" and socket.has_dualstack_ipv6()
            return socket.create_server((host, each), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            if last:
                why = os.strerror(error.errno or 0)
                raise StartError(
                    f"Cannot serve HTTP at {host}:{each}: {why}. Choose another --http-host or --http-port."
                ) from None
    raise AssertionError
