"""Repositories of the hub, from a server on loopback that speaks as much of its API as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from consumers.models.getting import LocalModel, get, pull
from consumers.models.store import ModelError, Store
from consumers.models.watched import Headway

COMMIT = "c" * 40


class Hub:
    """The repositories, as the content of files by name."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            owner, name = path.split("/")[2:4]
            files = self.repositories.get(f"{owner}/{name}")
            if files is None:
                self.send(handler, b"{}", status=404)
                return
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                self.send(handler, json.dumps(tree).encode())
                return
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            self.send(handler, json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}).encode())
            return
        owner, name, _, _, file = path.split("/", 4)
        self.send(handler, self.repositories[f"{owner}/{name}"][file])

    def send(self, handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    running = Hub()
    thread = threading.Thread(target=running.server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


def ignore(_: Headway) -> None:
    pass


def test_a_repository_is_pulled_into_the_store(hub: Hub, tmp_path: Path):
    wanted = {"config.json": b"{}", "model.safetensors": b"weights" * 999, "tokenizer.json": b"{}"}
    hub.repositories["owner/name"] = wanted | {"README.md": b"text", "pytorch_model.bin": b"much"}
    store = Store(str(tmp_path / "store"))
    model = pull("owner/name", store, ignore)
    folder = store.root / "owner--name" / "mlx"
    assert model == LocalModel("owner/name", str(folder), None)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    assert get("owner/name", store, ignore, offline=True) == model
    assert [(stored.name, stored.origin) for stored in store.models()] == [("owner/name", "owner/name")]
    assert store.remove("owner/name") > 0
    assert get("owner/name", store, ignore) == LocalModel("owner/name", "owner/name")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.gguf": b"GGUF"}, r"owner/name is not a model that MLX can load: .* pull one by its address \(a.gguf\)"),
        (
            {"config.json": b"{}"},
            r"owner/name is not a model .*: it has no config.json or no safetensors",
        ),
        (None, r"Cannot fetch owner/name from the Hugging Face hub \(.*404"),
    ],
)
def test_what_cannot_be_pulled_is_refused_by_name(hub: Hub, files, said: str, tmp_path: Path):
    if files is not None:
        hub.repositories["owner/name"] = files
    store = Store(str(tmp_path / "store"))
    with pytest.raises(ModelError, match=said):
        pull("owner/name", store, ignore)
    assert store.models() == []
