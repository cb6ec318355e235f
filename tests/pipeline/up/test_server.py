from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pipeline.broker import topology
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.up.children import Process
from pipeline.up.instance import private_file, process_lives
from pipeline.up.reach import jetstream_answers
from pipeline.up.screen import shown
from pipeline.up.server import Broker, BrokerError, find_conf, find_server, state_lock
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from tests.disks import small_disk

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 60.0

Start = Callable[..., "asyncio.Future[tuple[Broker, Process]]"]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a broker on the test's state folder."""
    processes: list[Process] = []
    with state_lock(tmp_path) as lock:

        async def start(**options: int) -> tuple[Broker, Process]:
            broker = Broker(tmp_path, lock=lock, log=tmp_path / "log", **options)
            processes.append(await broker.start())
            return broker, processes[-1]

        yield start
        for process in processes:
            process.kill()
            await ended(process)


async def ended(process: Process) -> int:
    return await asyncio.wait_for(process.wait(lambda report: None), TIMEOUT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def options_of_all_processes() -> str:
    return subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True).stdout


def test_the_server_and_its_settings_are_found():
    assert os.access(find_server(), os.X_OK)
    assert "jetstream" in find_conf().read_text()


async def test_a_started_broker_answers_on_loopback(start):
    broker, process = await start()
    assert broker.url == f"nats://127.0.0.1:{broker.port}"
    assert await jetstream_answers(broker.url, timeout_s=TIMEOUT_S)
    process.drain(1)
    assert await ended(process) == 0
    assert not await jetstream_answers(broker.url)


async def test_a_killed_broker_comes_back_on_its_port_with_what_it_had_stored(start):
    broker, process = await start()
    config = Config(nats_url=broker.url)
    async with Bus.connect(broker.url, name="test") as bus:
        await topology.apply(bus.js, config)
        for number in range(20):
            await bus.store("llm.request.high", b"hello", headers={MSG_ID: f"r{number}"})
        os.kill(process.pid, signal.SIGKILL)
        assert await ended(process) == -signal.SIGKILL
        port = broker.port
        await broker.start()
        assert broker.port == port
    async with Bus.connect(broker.url, name="test") as bus:
        await topology.apply(bus.js, config)
        assert (await bus.js.stream_info(STREAM_REQUESTS)).state.messages == 20


async def test_the_port_is_the_one_of_the_last_run(start):
    first, process = await start()
    process.drain(1)
    await ended(process)
    second, _ = await start()
    assert second.port == first.port


async def test_a_port_that_was_taken_since_is_replaced(start):
    first, process = await start()
    process.drain(1)
    await ended(process)
    with socket.create_server(("127.0.0.1", first.port)):
        second, _ = await start()
        assert second.port != first.port


async def test_the_preferred_port_is_used_where_it_is_free(start):
    port = free_port()
    broker, _ = await start(preferred_port=port)
    assert broker.port == port


async def test_a_port_that_was_asked_for_and_is_taken_is_refused_with_a_clear_message(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"Port {port} is taken"):
            await start(port=port)


async def test_a_server_that_cannot_start_says_why(start, tmp_path):
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "jetstream").write_text("in the way")
    with pytest.raises(BrokerError, match="ended with code 1"):
        await start()


async def test_on_a_full_disk_it_says_so_and_starts_once_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", "24m") as disk, state_lock(disk.folder) as lock:
        disk.fill()
        broker = Broker(disk.folder, lock=lock, log=tmp_path / "log")
        with pytest.raises(BrokerError, match=r"has 0 MiB of 24 MiB free\. Make room"):
            await broker.start()
        disk.empty()
        process = await broker.start()
        process.kill()
        await ended(process)


def test_a_state_folder_in_use_is_refused_with_the_pid_of_its_user(tmp_path):
    refused = pytest.raises(BrokerError, match=rf"process {os.getpid()}.*--state-dir")
    with state_lock(tmp_path), refused, state_lock(tmp_path):
        pass


def test_a_state_folder_is_free_again_after_its_user(tmp_path):
    for _ in range(2):
        with state_lock(tmp_path / "new"):
            pass


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BrokerError, match="Cannot use the state folder"), state_lock(tmp_path / "file"):
        pass


OWNER = """
import asyncio, sys
from pathlib import Path
from pipeline.up.server import Broker, state_lock

async def main(folder):
    with state_lock(folder) as lock:
        process = await Broker(folder, lock=lock, log=folder / "log").start()
        print(process.pid, flush=True)
        await asyncio.sleep(3600)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_the_server_ends_when_its_owner_is_killed_and_only_then_is_the_folder_free(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.up.server.LOCK_PATIENCE_S", TIMEOUT_S)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        owner.kill()
    with state_lock(tmp_path):
        # A process that has ended and is not collected still has its id; its log tells.
        assert not process_lives(server) or "Server Exiting" in (tmp_path / "log").read_text()


async def test_a_locked_broker_takes_only_who_knows_the_password_that_it_keeps(start, tmp_path):
    broker, process = await start(locked=True)
    password = tmp_path / "nats" / "password"
    assert password.stat().st_mode & 0o777 == 0o600
    assert broker.url == f"nats://headrace:{password.read_text()}@127.0.0.1:{broker.port}"
    async with Bus.connect(broker.url, name="test") as bus:
        assert bus.is_connected
    for stranger in ("", "headrace:wrong@", "headrace@"):
        with pytest.raises(Unreachable, match="Authorization Violation"):
            async with Bus.connect(f"nats://{stranger}127.0.0.1:{broker.port}", name="stranger"):
                pass
    process.drain(1)
    assert await ended(process) == 0
    again, _ = await start(locked=True)
    assert again.url == broker.url
    # Other users of this machine can read the options of a process.
    assert password.read_text() not in options_of_all_processes()


@pytest.mark.parametrize("left", [b"", bytes(41), b"\xff" * 41, b"p12", b"p1234 56789@:/x"])
async def test_a_damaged_password_is_set_aside_and_leaves_no_broker_open(start, tmp_path, left):
    password = tmp_path / "nats" / "password"
    password.parent.mkdir()
    password.write_bytes(left)
    broker, _ = await start(locked=True)
    assert len(password.read_text()) == 41
    assert password.stat().st_mode & 0o777 == 0o600
    assert password.with_name("password.damaged").read_bytes() == left
    async with Bus.connect(broker.url, name="test") as bus:
        assert bus.is_connected
    with pytest.raises(Unreachable, match="Authorization Violation"):
        async with Bus.connect(f"nats://127.0.0.1:{broker.port}", name="stranger"):
            pass


async def test_a_password_that_others_may_read_is_closed_to_them(start, tmp_path):
    password = tmp_path / "nats" / "password"
    password.parent.mkdir()
    password.write_text("my-own-password\n")
    password.chmod(0o644)
    broker, _ = await start(locked=True)
    assert broker.url == f"nats://headrace:my-own-password@127.0.0.1:{broker.port}"
    assert password.stat().st_mode & 0o777 == 0o600


def test_a_file_with_a_secret_is_no_file_that_another_user_had_opened(tmp_path):
    file = tmp_path / "ready"
    before = tmp_path / f".ready.{os.getpid()}"
    before.touch(0o666)
    with before.open() as opened:
        private_file(file, b"secret")
        assert opened.read() == ""
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"secret", 0o600)
    assert sorted(path.name for path in tmp_path.iterdir()) == [before.name, "ready"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
        ("nats://me:secret@a:1,tls://other:word@b:2", "nats://a:1,tls://b:2"),
        ("nats://me:s@c/r@a:1", "nats://a:1"),
        ("me:secret@a:1", "a:1"),
    ],
)
def test_the_screen_shows_no_password(url, expected):
    assert shown(url) == expected
