"""The gateway's process: its socket, its services on the broker, its server, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

from pipeline.broker.asker import Asker
from pipeline.config import Config
from pipeline.gateway.app import Gateway
from pipeline.gateway.ask import Ask
from pipeline.gateway.identity import check_exposure
from pipeline.gateway.late import LateAnswers
from pipeline.gateway.server import HttpServer, url_of
from pipeline.process.lifecycle import Lifecycle, ignores_hangup
from pipeline.process.listening import bind
from pipeline.process.role import role
from pipeline.process.terminal import has_terminal


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        ConfigError: HTTP would be open to other machines without a key.
        StartError: the port is taken.
        Unreachable, TopologyError: as `pipeline.process.role.role`.
    """
    check_exposure(config)
    with bind(config) as listening, contextlib.ExitStack() as stack:
        async with role("gateway", config) as me:
            gateway = Gateway(me, config)
            await gateway.start()
            await Ask(me.bus, me.tracing, Asker(me.bus, me.tracing), me.peers, config.tenants_max_messages).start()
            await LateAnswers(me.bus).start()
            server = HttpServer(gateway.app(), config)
            serving = asyncio.ensure_future(server.serve_on(listening))
            try:
                if config.http_keys_file:
                    stack.enter_context(_rereading(gateway.ring.reread, lifecycle))
                lifecycle.report("ready", url_of(listening), http=url_of(listening))
                stopping = asyncio.ensure_future(lifecycle.stopping.wait())
                await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                server.should_exit = True
                await gateway.drain(lifecycle.drain_left_s())
            finally:
                server.should_exit = server.force_exit = True
                await serving


@contextlib.contextmanager
def _rereading(reread: Callable[[], None], lifecycle: Lifecycle) -> Iterator[None]:
    """Have SIGHUP call reread, unless it tells that the terminal of this process was closed."""
    loop, had_terminal, ignored = asyncio.get_running_loop(), has_terminal(), ignores_hangup()

    def on_hangup() -> None:
        if had_terminal and not ignored and not has_terminal():
            lifecycle.on_hangup()
        else:
            reread()

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        loop.add_signal_handler(signal.SIGHUP, _nothing if ignored else lifecycle.on_hangup)


def _nothing() -> None:
    """What SIGHUP does where it was ignored."""
