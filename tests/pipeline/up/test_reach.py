from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from consumers.engines.ollama.client import OllamaClient
from pipeline.commands.doctor import doctor
from pipeline.config import Config, ConfigError
from pipeline.up.local import up
from pipeline.up.reach import broker_trouble, ollama_url, port_answers
from pipeline.up.server import find_server
from tests.support import NatsServer, wait_until


@pytest.fixture
def without_jetstream(tmp_path: Path) -> Iterator[str]:
    """The address of a NATS server without JetStream."""
    # The server takes a free port itself: one that was looked for before could be another process's by then.
    command = [find_server(), "-a", "127.0.0.1", "-p", "-1", "--ports_file_dir", str(tmp_path)]
    server = subprocess.Popen(command)
    ports = tmp_path / f"nats-server_{server.pid}.ports"
    try:
        # The last byte of the file is the closing brace.
        wait_until(lambda: ports.exists() and ports.read_bytes().endswith(b"}"), what="nats-server")
        (url,) = msgspec.json.decode(ports.read_bytes())["nats"]
        yield url.removeprefix("nats://")
    finally:
        server.terminate()
        server.wait()


async def test_a_missing_server_is_named_without_its_password():
    assert await broker_trouble("nats://me:secret@127.0.0.1:9") == "No NATS server at 127.0.0.1:9."


async def test_a_server_without_jetstream_is_told_apart(without_jetstream):
    trouble = await broker_trouble(f"nats://me:secret@{without_jetstream}")
    assert trouble == f"The NATS server at {without_jetstream} runs without JetStream. Start it with -js."


async def test_one_server_with_jetstream_is_enough(nats_server: NatsServer, without_jetstream):
    assert await broker_trouble(f"127.0.0.1:9,{without_jetstream},{nats_server.url}") is None


async def test_it_waits_for_a_server_that_is_starting(tmp_path):
    server = NatsServer(tmp_path)
    server.start()
    server.stop()
    waiting = asyncio.create_task(broker_trouble(server.url, patience_s=60))
    await asyncio.to_thread(server.start)
    try:
        assert await waiting is None
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("somewhere", "http://somewhere:11434"),
        (":8080", "http://127.0.0.1:8080"),
        ("somewhere:1", "http://somewhere:1"),
        ("0.0.0.0:1", "http://127.0.0.1:1"),
        ("[::1]:1", "http://[::1]:1"),
        ("http://somewhere", "http://somewhere:80"),
        ("https://somewhere/path/", "https://somewhere:443/path"),
    ],
)
def test_the_address_of_ollama_is_read_as_its_own_tools_read_it(host, url):
    assert ollama_url(host) == url


@pytest.mark.parametrize("host", ["http://[::1", "[bad", "ftp://somewhere", "somewhere:port", "somewhere:99999"])
def test_what_is_no_address_of_ollama_is_refused_before_anything_starts(host):
    said = (
        r"is not the address of an Ollama server, such as 127\.0\.0\.1:11434\. Correct --ollama-host or OLLAMA_HOST\."
    )
    with pytest.raises(ConfigError, match=said):
        up(Config(ollama_host=host), own_broker=True)
    with pytest.raises(ConfigError, match=said):
        doctor(Config(ollama_host=host), "nats://127.0.0.1:9", (True, "", ""))
    with pytest.raises(ConfigError, match=said):
        OllamaClient(host, idle_timeout_s=1.0, load_timeout_s=1.0)


@pytest.mark.parametrize(
    "url", ["nats://[::1", "http://somewhere", "nats://somewhere:port", "nats://me:secret@", "nats://"]
)
async def test_what_is_no_url_of_a_nats_server_is_told_at_once(url):
    urls = f"nats://127.0.0.1:9,{url}"
    with pytest.raises(ConfigError, match=r"is not the URL of a NATS server, such as .* Correct --nats-url") as caught:
        await broker_trouble(urls, patience_s=3600)
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="is not the URL of a NATS server"):
        up(Config(nats_url=urls), own_broker=False)


async def test_nothing_answers_at_what_is_no_url():
    assert not await port_answers("http://[::1")
