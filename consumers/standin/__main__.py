"""The stand-in's process: `python -m consumers.standin --port 0 --ready-file PATH [--gguf FILE --name NAME]`."""

from __future__ import annotations

from pipeline.process.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # before the other imports, which take most of the time of a start

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import uvicorn

from consumers.demo_model import MODEL_NAME
from consumers.engines.llamacpp import LlamaEngine, LlamaError
from consumers.engines.local.process import EngineProcess
from consumers.models.names import located
from consumers.models.unpacked import for_llama
from consumers.standin.server import Server
from consumers.standin.shown import of_demo, of_llama
from pipeline.config import Config, ConfigError, ModelOptions, load
from pipeline.engine import Engine
from pipeline.process.lifecycle import end_quickly, ignores_hangup

DRAIN_S = 2

log = logging.getLogger("standin")


class _UnusableError(Exception):
    """The model cannot be used. The message is a sentence."""


def main() -> int:
    """Serve until SIGTERM or SIGINT; the settings come from the environment (`HEADRACE_*`).

    Returns:
        0, or 2 if the settings or the model cannot be used.
    """
    end_quickly()
    options = _parse(sys.argv[1:])
    try:
        config = load()
    except ConfigError as error:
        log.critical("%s", error)
        return 2
    logging.basicConfig(level=config.log_level.upper(), format="standin: %(levelname)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Before the server, because it takes seconds the first time.
    options.file = options.gguf and for_llama(options.gguf)
    return asyncio.run(_serve(options, config))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m consumers.standin", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="the port on loopback; 0 is any free port")
    parser.add_argument("--held", action="store_true", help="another process holds the port, with SO_REUSEPORT")
    parser.add_argument("--gguf", type=Path, help="run this file on llama.cpp, not the demo model")
    parser.add_argument("--name", help=f"the name of the model; the default is the file's, or {MODEL_NAME}-mini")
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp; 0 takes the setting ollama_threads")
    parser.add_argument("--parallel", type=int, help="answers at once; the default is the setting ollama_slots")
    parser.add_argument("--ready-file", type=Path, help="write the URL here, as JSON, when the server is ready")
    return parser.parse_args(arguments)


async def _serve(options: argparse.Namespace, config: Config) -> int:
    parallel = options.parallel or config.ollama_slots
    if options.gguf is not None:
        name = options.name or options.gguf.stem
        threads = options.threads or config.ollama_threads
        serving = _llama(options.file, config, name=name, parallel=parallel, threads=threads)
    else:
        serving = _demo(config, name=options.name or f"{MODEL_NAME}-mini", parallel=parallel)
    try:
        async with serving as server:
            with _bound(options.port, held=options.held) as listening:
                await _Uvicorn(server, options.ready_file).serve([listening])
    except _UnusableError as error:
        log.critical("%s", error)
        return 2
    return 0


@contextlib.asynccontextmanager
async def _llama(gguf: Path, config: Config, *, name: str, parallel: int, threads: int) -> AsyncIterator[Server]:
    """A GGUF file on llama.cpp. The first of the internal models is the same weights."""
    try:
        async with LlamaEngine(gguf, slots=parallel, threads=threads) as engine:
            model = of_llama(name, gguf, engine.facts)
            internal = next(iter(config.internal_models), None)
            yield Server(
                engine,
                model=model,
                behind="llama.cpp",
                parallel=parallel,
                internal=of_llama(internal, gguf, engine.facts, parent=model.name) if internal else None,
            )
    except LlamaError as error:
        raise _UnusableError(str(error)) from None


@contextlib.asynccontextmanager
async def _demo(config: Config, *, name: str, parallel: int) -> AsyncIterator[Server]:
    """The demo model, whatever the first engine runs."""
    # As Ollama does, an answer without a limit goes on until the model stops or the context is full.
    own = {"model": MODEL_NAME, "slots": parallel, "default_max_tokens": 2**31 - 1, "chat_template": ""}
    config = msgspec.structs.replace(config, **own, **msgspec.structs.asdict(ModelOptions()))
    path = Path(located(config.model))
    async with EngineProcess(config, model_path=str(path), served_name=name) as engine:
        if not await _is_ready(engine):
            raise _UnusableError(f"The model cannot be used: {engine.status().reason}")
        folder = None if config.engine == "simulated" else path
        model = of_demo(name, config.model, folder, simulated=engine.simulated)
        yield Server(engine, model=model, behind="the demo model", parallel=parallel, hashes=True)


async def _is_ready(engine: Engine) -> bool:
    changed = asyncio.Event()
    engine.on_change(changed.set)
    while (state := engine.status().state) == "loading":
        await changed.wait()
        changed.clear()
    return state == "ready"


def _bound(port: int, *, held: bool) -> socket.socket:
    listening = socket.socket()
    for option in (socket.SO_REUSEADDR, *([socket.SO_REUSEPORT] if held else [])):
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise _UnusableError(f"Port {port} cannot be used: {error.strerror}") from None
    return listening


class _Uvicorn(uvicorn.Server):
    """uvicorn on loopback. It writes the ready file when it serves.

    Overridden parts of uvicorn: `Server.startup` and `Server.capture_signals`. `started`, `servers` and `handle_exit`
    are used.
    """

    def __init__(self, server: Server, ready_file: Path | None) -> None:
        super().__init__(
            uvicorn.Config(
                server.app(),
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._ready_file = ready_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        port = self.servers[0].sockets[0].getsockname()[1]
        ready = {"url": f"http://127.0.0.1:{port}", "pid": os.getpid()}
        if self._ready_file is not None:
            # Written beside and renamed, so that no reader sees half of the file.
            draft = self._ready_file.with_name(f"{self._ready_file.name}.part")
            draft.write_bytes(msgspec.json.encode(ready))
            draft.replace(self._ready_file)
        log.info("serving at %s", ready["url"])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP drain. uvicorn would raise them again, and end the process before the engine."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, *(() if ignores_hangup() else (signal.SIGHUP,))):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield


if __name__ == "__main__":
    sys.exit(main())
