"""`headrace up` as a process, with its real broker and with trivial roles in place of the real ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.up.reach import jetstream_answers
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from tests import tiny_gguf
from tests.support import NatsServer, wait_until

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 100.0

ROLE = """
import asyncio, os, sys
from pathlib import Path
from pipeline.config import load
from pipeline.process.lifecycle import StartError, run, without_private

name, folder = sys.argv[1], Path(sys.argv[2])

async def main(config, lifecycle):
    (folder / name).write_text(str(os.getpid()))
    if name == "broken":
        raise StartError("Port 7 is taken. Choose another one.")
    lifecycle.report("loading", "50 %")
    facts = {"http": f"http://127.0.0.1:{config.http_port or 8123}"} if name == "gateway" else {}
    lifecycle.report("ready", config.nats_url, **facts)
    await lifecycle.stopping.wait()
    (folder / f"{name}.left_s").write_text(str(lifecycle.drain_left_s()))
    with (folder / "order").open("a") as order:
        print(name, file=order)
    if name == "stuck":
        await asyncio.Event().wait()

sys.exit(run(main, load(environ=without_private(os.environ)), name))
"""

UP = """
import sys
from pathlib import Path
from pipeline.config import load
from pipeline.up import server
from pipeline.up.local import Local, RoleProcess, up

# On a busy machine, a killed server takes longer to end.
server.LOCK_PATIENCE_S = server.START_TIMEOUT_S = 60

folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
roles = [RoleProcess(name, (sys.executable, str(folder / "role.py"), name, str(folder))) for name in names]
config = load()
if gguf := sys.argv[4]:
    find_ollama = Local._find_ollama

    async def with_model(self, group):
        self.gguf = Path(gguf)
        await find_ollama(self, group)

    Local._find_ollama = with_model
sys.exit(up(config, own_broker=sys.argv[3] == "own", roles=roles, ready_file=folder / "ready.json"))
"""

NAMES = "gateway,monitor,router,mlx,ollama"


class Up:
    """One `headrace up` and the folder it works in."""

    def __init__(self, folder: Path, *, names: str, broker: str, gguf: str, settings: dict[str, object]) -> None:
        self.folder = folder
        self.ready_file = folder / "ready.json"
        self.state = folder / "state"
        (folder / "role.py").write_text(ROLE)
        settings = {"state_dir": self.state, "ollama_standin": "false", "drain_timeout_s": 10, **settings}
        environ = {f"HEADRACE_{key.upper()}": str(value) for key, value in settings.items()}
        self.process = subprocess.Popen(
            [sys.executable, "-c", UP, str(folder), names, broker, gguf],
            env={**os.environ, "OLLAMA_HOST": "127.0.0.1:9", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._said = ""

    def ready(self) -> dict[str, Any]:
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None, what="up", timeout_s=TIMEOUT_S)
        assert self.process.poll() is None, self.output()
        return json.loads(self.ready_file.read_text())

    def pid(self, name: str) -> int:
        """The process of a role; `up` is ready without the Ollama consumer."""
        file, said = self.folder / name, ""

        def is_written() -> bool:
            # Read once: a process that starts again empties the file and writes it again.
            nonlocal said
            said = file.read_text() if file.exists() else ""
            return said != ""

        wait_until(is_written, what=name, timeout_s=TIMEOUT_S)
        return int(said)

    def broker_pid(self) -> int:
        (ports,) = (self.state / "nats").glob("*.ports")
        return int(ports.stem.rpartition("_")[2])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)

    def says(self, text: str) -> None:
        """Read what it prints, up to a line that has this text."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said += line
            if text in line:
                return
        raise AssertionError(self._said)

    def output(self) -> str:
        return self._said + self.process.communicate(timeout=TIMEOUT_S)[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(names: str = NAMES, *, broker: str = "own", gguf: str = "", **settings: object) -> Up:
        started.append(Up(tmp_path, names=names, broker=broker, gguf=gguf, settings=settings))
        return started[-1]

    yield start
    for each in started:
        each.close()


class Standin(NamedTuple):
    pid: int
    url: str


def standin_of(running: Up) -> Standin:
    """The stand-in of `up`, and the port in its command line."""
    (pid,) = children_of(running.process.pid, "consumers.standin")
    command = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return Standin(pid, f"http://127.0.0.1:{command.split('--port ')[1].split()[0]}")


def children_of(parent: int, command: str) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", command], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_role_that_cannot_start_ends_it_with_its_reason(up: Callable[..., Up]):
    running = up("broken,monitor")
    said = running.output()
    assert running.process.returncode == 1
    assert said.rstrip().endswith("headrace: Port 7 is taken. Choose another one.")
    assert "Traceback" not in said
    assert "restarting" not in said


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/version", trust_env=False, timeout=60).is_success
    except httpx.HTTPError:
        return False


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return not Path("/proc/self").exists()


def test_the_ready_file_is_there_while_everything_serves_and_then_gone(up):
    running = up()
    ready = running.ready()
    assert ready == {"nats": ready["nats"], "http": "http://127.0.0.1:8123", "pid": running.process.pid}
    assert asyncio.run(jetstream_answers(ready["nats"], timeout_s=TIMEOUT_S))
    assert json.loads((running.state / "run.json").read_text()) == ready
    pids = [running.pid(name) for name in NAMES.split(",")] + [running.broker_pid()]
    assert running.stop() == 0
    assert not running.ready_file.exists()
    assert not (running.state / "run.json").exists()
    assert not any(map(lives, pids))


def test_each_server_of_openais_api_has_a_worker_and_none_of_them_is_waited_for(up):
    running = up(openai='["http://127.0.0.1:9", "127.0.0.1:10/v1"]', ollama_standin="true")
    running.ready()
    logs = [running.state / "logs" / f"{name}.log" for name in ("openai", "openai-2")]
    assert all(log.exists() for log in logs)
    assert len(children_of(running.process.pid, "run openai")) == 2
    assert children_of(running.process.pid, "consumers.standin") == []
    assert running.stop() == 0
    said = running.output()
    assert "http://127.0.0.1:9, http://127.0.0.1:10" in said
    assert said.index("gateway") < said.index("Stopped.")
    assert (running.folder / "order").read_text().split()[0] == "gateway"


def test_interrupting_drains_too(up):
    running = up()
    running.ready()
    assert running.stop(signal.SIGINT) == 0


def test_who_lets_requests_in_stops_first_and_the_monitor_last(up):
    running = up()
    running.ready()
    running.pid("ollama")
    assert running.stop() == 0
    order = (running.folder / "order").read_text().split()
    assert order[:2] == ["gateway", "router"]
    assert set(order[2:4]) == {"mlx", "ollama"}
    assert order[4:] == ["monitor"]


def test_who_lets_requests_in_has_half_of_the_drain_time(up):
    running = up("gateway,batches,router,mlx,monitor", drain_timeout_s=10_000)
    running.ready()
    assert running.stop() == 0
    left_s = {name: float((running.folder / f"{name}.left_s").read_text()) for name in ("gateway", "router", "mlx")}
    assert left_s["gateway"] <= 5_000
    assert left_s["router"] <= 5_000
    assert left_s["mlx"] > 5_000


def test_the_first_screen_says_what_runs_where_and_what_to_try(up):
    running = up(nats_port=0)
    ready = running.ready()
    running.stop()
    said = running.output()
    for text in (
        ready["nats"],
        "embedded nats-server",
        "headrace-demo",
        "this Ollama server does not answer",
        str(running.state),
    ):
        assert text in said
    assert "dashboard http://127.0.0.1:8123   (OpenAI base URL: http://127.0.0.1:8123/v1)\n" in said
    for command in ("send", "stats", "llm.ask.high"):
        assert command in said
    assert "for at most 10 s. Queued requests are kept and resume at the next start.\n" in said
    assert said.endswith("Stopped.\n")
    assert "\x1b" not in said


def test_llama_cpp_runs_where_no_ollama_is_and_comes_back_on_its_port_after_a_crash(up, tmp_path):
    file = tiny_gguf.write(tmp_path / "tiny.gguf")
    running = up(
        "monitor", gguf=str(file), model=str(tmp_path), ollama_host="none", ollama_standin="true", log_level="info"
    )
    running.ready()
    before = standin_of(running)
    (model,) = httpx.get(f"{before.url}/api/tags", trust_env=False).json()["models"]
    assert model["name"] == "tiny:latest"
    os.kill(before.pid, signal.SIGSEGV)
    wait_until(lambda: not lives(before.pid), what="the crash", timeout_s=TIMEOUT_S)
    wait_until(lambda: answers(before.url), what="the next stand-in", timeout_s=TIMEOUT_S)
    assert standin_of(running).pid != before.pid
    running.stop()
    said = running.output()
    assert f"ollama    {before.url}  (llama.cpp with tiny; no Ollama server was found)" in said
    assert f"stand-in  ready  {before.url}, llama.cpp with tiny" in said


def test_an_ollama_that_the_user_named_is_never_replaced(up):
    running = up("monitor", ollama_standin="true")
    running.ready()
    assert not children_of(running.process.pid, "consumers.standin")
    running.stop()
    assert (
        "http://127.0.0.1:9  (this Ollama server does not answer; no request spills until it does)" in running.output()
    )


def test_without_any_second_engine_there_is_no_ollama_worker(up):
    running = up("monitor,ollama", ollama_host="none")
    running.ready()
    assert not (running.folder / "ollama").exists()
    running.stop()
    assert "ollama    none  (no Ollama server was found" in running.output()


def test_a_killed_role_comes_back_and_the_others_do_not_notice(up):
    running = up()
    running.ready()
    mlx, router = running.pid("mlx"), running.pid("router")
    os.kill(mlx, signal.SIGKILL)
    wait_until(lambda: running.pid("mlx") != mlx and lives(running.pid("mlx")), what="mlx again", timeout_s=TIMEOUT_S)
    assert lives(router)
    assert running.pid("router") == router
    assert running.stop() == 0
    assert "killed by SIGKILL" in running.output()


def test_a_gateway_that_comes_back_gets_the_port_it_had(up):
    running = up()
    running.ready()
    gateway = running.pid("gateway")
    (running.folder / "gateway").unlink()
    os.kill(gateway, signal.SIGKILL)
    wait_until((running.folder / "gateway").exists, what="gateway again", timeout_s=TIMEOUT_S)
    environ = Path(f"/proc/{running.pid('gateway')}/environ")
    if environ.exists():
        wait_until(lambda: b"HEADRACE_HTTP_PORT=8123" in environ.read_bytes(), what="its port", timeout_s=TIMEOUT_S)
    assert running.stop() == 0


async def store(url: str, *ids: str) -> None:
    async with Bus.connect(url, name="test") as bus:
        for each in ids:
            await bus.store("llm.request.high", b"hello", headers={MSG_ID: each})


async def stored(url: str) -> int:
    async with Bus.connect(url, name="test") as bus:
        return (await bus.js.stream_info(STREAM_REQUESTS)).state.messages


async def streams_are_there(url: str) -> bool:
    async with Bus.connect(url, name="test") as bus:
        return await topology.apply(bus.js, Config()) == []


def test_a_killed_broker_comes_back_where_it_was_with_its_queue_and_all_streams(up):
    running = up()
    url = running.ready()["nats"]
    asyncio.run(store(url, "a", "b", "c"))
    broker = running.broker_pid()
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: not lives(broker), what="the end of the broker", timeout_s=TIMEOUT_S)
    wait_until(lambda: asyncio.run(_answers_whole(url)), what="the broker again", timeout_s=TIMEOUT_S)
    assert asyncio.run(stored(url)) == 3
    # The streams are on the disk: they are there a moment before `up` has looked at them and says so.
    running.says("ready again")
    assert running.stop() == 0
    said = running.output()
    assert said.index("killed by SIGKILL") < said.index(f"ready again  {url}")


async def _answers_whole(url: str) -> bool:
    """Whether the broker is back and `up` has put its streams there: looked at, not made."""
    if not await jetstream_answers(url):
        return False
    async with Bus.connect(url, name="test") as bus:
        names = {info.config.name for info in await bus.js.streams_info()}
    return {stream.name for stream in topology.streams(Config())} <= names


def test_what_was_queued_is_there_after_a_restart_on_the_same_port(up):
    first = up()
    url = first.ready()["nats"]
    asyncio.run(store(url, "a", "b"))
    assert first.stop() == 0
    second = up()
    assert second.ready()["nats"] == url
    assert asyncio.run(stored(url)) == 2
    assert second.stop() == 0


def test_a_second_one_on_the_same_state_folder_is_refused(up):
    first = up()
    ready = first.ready()
    second = up()
    assert second.process.wait(TIMEOUT_S) == 1
    assert f"process {first.process.pid}" in second.output()
    assert json.loads(first.ready_file.read_text()) == ready
    assert asyncio.run(jetstream_answers(ready["nats"], timeout_s=TIMEOUT_S))
    assert first.stop() == 0


def test_one_can_follow_at_once_on_one_that_was_killed(up):
    first = up()
    first.ready()
    roles = [first.pid(name) for name in NAMES.split(",")]
    broker = first.broker_pid()
    first.process.kill()
    first.process.wait()
    first.ready_file.unlink()
    second = up()
    second.ready()
    wait_until(lambda: not any(map(lives, [*roles, broker])), what="the end of the orphans", timeout_s=TIMEOUT_S)
    assert second.stop() == 0


def test_a_taken_port_is_refused_with_a_clear_message(up, nats_server: NatsServer):
    running = up(nats_port=nats_server.port)
    assert running.process.wait(TIMEOUT_S) == 1
    assert running.output() == (
        f"headrace: Port {nats_server.port} is taken. Choose another --nats-port, or 0 for a free one.\n"
    )


def test_a_taken_http_port_is_found_before_anything_starts(up):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = up(http_port=port)
        assert running.process.wait(TIMEOUT_S) == 1
    assert running.output() == (
        f"headrace: Cannot serve HTTP at 127.0.0.1:{port}: Address already in use. "
        "Choose another --http-host or --http-port.\n"
    )
    assert not (running.state / "nats").exists()


def test_without_a_gateway_the_http_port_is_not_looked_at(up):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = up("monitor", http_port=taken.getsockname()[1])
        running.ready()
        assert running.stop() == 0


def test_a_broker_elsewhere_is_used_and_left_alone(up, nats_server: NatsServer):
    running = up(broker="elsewhere", nats_url=nats_server.url)
    assert running.ready()["nats"] == nats_server.url
    assert not (running.state / "nats").exists()
    assert running.stop() == 0
    assert asyncio.run(jetstream_answers(nats_server.url, timeout_s=TIMEOUT_S))


def test_a_broker_elsewhere_that_does_not_answer_is_told(up):
    running = up(broker="elsewhere", nats_url="nats://127.0.0.1:9")
    assert running.process.wait(TIMEOUT_S) == 1
    assert "No NATS server at nats://127.0.0.1:9." in running.output()


def test_a_role_that_does_not_drain_is_killed_at_the_deadline(up):
    running = up("stuck", drain_timeout_s=1)
    running.ready()
    assert running.stop() == 0
    assert not lives(running.pid("stuck"))


def test_a_second_signal_kills_everything_at_once(up):
    running = up("stuck", drain_timeout_s=3600)
    running.ready()
    pids = [running.pid("stuck"), running.broker_pid()]
    running.process.send_signal(signal.SIGTERM)
    wait_until((running.folder / "order").exists, what="draining", timeout_s=TIMEOUT_S)
    assert running.stop() == 128 + signal.SIGTERM
    wait_until(lambda: not any(map(lives, pids)), what="their end", timeout_s=TIMEOUT_S)
    assert not running.ready_file.exists()


def test_stopping_while_it_starts_exits_0(up):
    running = up()
    wait_until((running.state / "nats" / "port").exists, what="the broker", timeout_s=TIMEOUT_S)
    assert running.stop() == 0
    assert not running.ready_file.exists()
