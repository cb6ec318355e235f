"""Run real nats-servers for benchmarks, with the shipped configurations, on free loopback ports.

Each server is stopped at the end of its block.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from pipeline.up.children import last_line, spawn_tied
from pipeline.up.reach import broker_trouble
from pipeline.up.server import find_conf, find_server

_START_TIMEOUT_S = 30.0

Edit = Callable[[str], str]


def unchanged(conf: str) -> str:
    return conf


@asynccontextmanager
async def single(folder: Path, edit: Edit = unchanged) -> AsyncIterator[str]:
    """Run one server with `embedded.conf`, as changed by edit; yields its URL."""
    (port,) = _free_ports(1)
    async with _server(
        folder, "embedded.conf", edit, ["--port", str(port), "--store_dir", str(folder)], {}, port
    ) as url:
        yield url


@asynccontextmanager
async def cluster(folder: Path, edit: Edit = unchanged) -> AsyncIterator[str]:
    """Run three servers with `cluster.conf`, as changed by edit; yields their URLs, separated by commas."""
    ports, routes = _free_ports(3), _free_ports(3)
    async with AsyncExitStack() as stack:
        starting = []
        for number, (port, route) in enumerate(zip(ports, routes, strict=True), 1):
            store = folder / f"n{number}"
            environment = {
                "NATS_NAME": f"n{number}",
                "NATS_PORT": str(port),
                "NATS_CLUSTER": f"127.0.0.1:{route}",
                "NATS_ROUTES": f"[{', '.join(f'nats://127.0.0.1:{one}' for one in routes)}]",
                "NATS_STORE_DIR": str(store),
            }
            starting.append(_server(store, "cluster.conf", edit, [], environment, port))
        yield ",".join([await stack.enter_async_context(server) for server in starting])


@asynccontextmanager
async def _server(
    folder: Path, conf: str, edit: Edit, options: list[str], environment: dict[str, str], port: int
) -> AsyncIterator[str]:
    log, url = folder / "log", f"nats://127.0.0.1:{port}"
    command = [str(find_server()), "-c", str(_edited(folder, conf, edit)), *options]
    server = await spawn_tied(command, {**os.environ, **environment}, log)
    try:
        # In a cluster, JetStream answers before it has elected a leader; the caller retries its first store.
        if await broker_trouble(url, patience_s=_START_TIMEOUT_S):
            raise SystemExit(f"nats-server did not start at {url}: {last_line(log)}")
        yield url
    finally:
        server.kill()
        await asyncio.shield(server.wait(lambda _: None))


def _edited(folder: Path, conf: str, edit: Edit) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / conf
    path.write_text(edit(find_conf(conf).read_text()))
    return path


def _free_ports(count: int) -> list[int]:
    """Distinct free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
