"""mlx-lm's own HTTP server (`mlx_lm.server`), which knows no priority: a peer that the benchmarks run beside headrace.

It runs in a process of its own (`python -m bench.peer`), with the BLAS library, the threads and the type of weights
that headrace's engine has on this machine.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.bare import CORES
from bench.running import ROOT, START_TIMEOUT_S, ended
from consumers.engines.local.blas import selected, threads_environment
from consumers.engines.local.child import float32
from consumers.engines.local.child.speed import load_blas, on_cpu


@contextmanager
def mlx_lm_server(model: Path, threads: int = CORES, niceness: int = 0) -> Iterator[str]:
    """Run the server for the duration of the block, with its priority lowered by niceness; yields its URL."""
    library = asyncio.run(selected("auto", threads))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "nice",
        "-n",
        str(niceness),
        sys.executable,
        "-m",
        "bench.peer",
        library.library if library else "",
        str(model),
        str(port),
    ]
    environment = os.environ | threads_environment(threads)
    with ended(
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ) as started:
        url = f"http://127.0.0.1:{port}"
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            if started.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit("mlx_lm.server did not start")
            time.sleep(0.1)
        yield url


def _answers(url: str) -> bool:
    body = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    try:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START_TIMEOUT_S, trust_env=False).is_success
    except httpx.TransportError:
        return False


def main() -> None:
    """Load the BLAS library, then run `mlx_lm.server` with the weights converted as headrace does it."""
    blas, model, port = sys.argv[1:]
    load_blas(blas)
    import mlx.core as mx
    from mlx_lm import server

    if on_cpu():
        mx.disable_compile()
        load = server.load

        def converted(*args: Any, **options: Any) -> Any:
            loaded = load(*args, **options)
            float32.convert(loaded[0])
            return loaded

        server.load = converted
    sys.argv[1:] = ["--model", model, "--port", port, "--host", "127.0.0.1", "--log-level", "ERROR"]
    server.main()


if __name__ == "__main__":
    main()
