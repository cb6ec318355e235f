"""llama.cpp's own HTTP server in a process of its own: a real server of OpenAI's API, which tests can kill.

`python -m tests.consumers.llama_server GGUF KEY PORT` runs it; port 0 is any free one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

KEY = "the-key-of-the-test"


class LlamaProcess:
    """A server that is started again on the same port."""

    def __init__(self, gguf: Path, log: Path) -> None:
        self._gguf = gguf
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> None:
        """Start, and wait until the model is loaded."""
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "tests.consumers.llama_server", str(self._gguf), KEY, port]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        with self._process.stdout as said:
            self.url = next((line.strip() for line in said if line.startswith("http://")), "")
        assert self.url, self._log.read_text()

    def freeze(self) -> None:
        """Stop the process where it is."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it with SIGKILL, frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


@contextlib.contextmanager
def llama_server(gguf: Path, log: Path) -> Iterator[LlamaProcess]:
    """Run a server for the time of the block."""
    server = LlamaProcess(gguf, log)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def main() -> None:
    """Run the server until the process is killed, or the process that started it has ended."""
    import xllamacpp

    from consumers.engines.llamacpp import native

    gguf, key, port = sys.argv[1:]
    parameters = native._parameters(xllamacpp, Path(gguf), 4, 1, key)
    parameters.port = int(port)
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    os.close(1)
    parent = os.getppid()
    while os.getppid() == parent:
        signal.sigtimedwait([signal.SIGTERM], 1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
