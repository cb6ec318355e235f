from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.process.lifecycle import REPORT_FD, Lifecycle, OneLineFormatter, StartError

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 60.0

# Each says that it is ready before it does what its name says.
ROLES = {
    "drains": "await lifecycle.stopping.wait()",
    "ends_by_itself": "pass",
    "fails": "raise RuntimeError('two\\nlines')",
    "cannot_start": "raise StartError('The port is taken. Choose another.')",
    "ignores_stop": "await asyncio.sleep(3600)",
    "says_whether_it_drains": (
        "asyncio.get_running_loop().add_signal_handler("
        "signal.SIGUSR1, lambda: lifecycle.report('loading', str(lifecycle.stopping.is_set())));"
        "lifecycle.report('ready'); await lifecycle.stopping.wait()"
    ),
    "counts_down": "await lifecycle.stopping.wait(); lifecycle.report('ready', str(lifecycle.drain_left_s()))",
}

PROGRAM = """
import asyncio, os, signal, sys
from pipeline.config import load
from pipeline.process.lifecycle import StartError, run, without_private

async def main(config, lifecycle):
    lifecycle.report("loading", "half", share=0.5)
    lifecycle.report("ready")
    {body}

sys.exit(run(main, load(environ=without_private(os.environ)), "role"))
"""


class Child:
    """A role's process and the parent's end of its line."""

    def __init__(self, body: str, *, ignores_hangup: bool, **settings: object) -> None:
        self.line, theirs = socket.socketpair()
        self.line.settimeout(TIMEOUT_S)
        with theirs:
            settings = {"drain_timeout_s": 3600, **settings}
            hangup = signal.SIG_IGN if ignores_hangup else signal.SIG_DFL
            environ = {f"HEADRACE_{key.upper()}": str(value) for key, value in settings.items()}
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM.format(body=body)],
                env={**os.environ, **environ, REPORT_FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),  # noqa: PLW1509 - there are no threads here
            )
        self.reports = (json.loads(text) for text in self.line.makefile())

    def until(self, state: str) -> dict[str, Any]:
        return next(report for report in self.reports if report["state"] == state)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def order(self, drain_s: float) -> None:
        self.line.sendall(json.dumps({"drain_s": drain_s}).encode() + b"\n")

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def log(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.line.close()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(role: str, *, ignores_hangup: bool = False, **settings: object) -> Child:
        children.append(Child(ROLES[role], ignores_hangup=ignores_hangup, **settings))
        return children[-1]

    yield start
    for each in children:
        each.close()


def test_a_role_reports_what_it_does(child):
    role = child("drains")
    assert next(role.reports) == {"state": "loading", "detail": "half", "facts": {"share": 0.5}}
    assert next(role.reports) == {"state": "ready"}
    role.signal()
    assert [report["state"] for report in role.reports] == ["draining", "down"]
    assert role.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_drains_and_exits_0(child, number):
    role = child("drains")
    role.until("ready")
    role.signal(number)
    assert role.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once(child, number):
    role = child("ignores_stop", drain_timeout_s=3600)
    role.until("ready")
    role.signal(number)
    role.until("draining")
    role.signal(number)
    assert role.wait() == 128 + number


def test_several_signals_tell_of_one_closed_terminal(child):
    role = child("ignores_stop", drain_timeout_s=3600)
    role.until("ready")
    role.signal(signal.SIGHUP)
    role.until("draining")
    role.signal(signal.SIGHUP)
    role.signal()
    role.order(0)
    assert role.wait() == 1


def test_where_the_closing_of_the_terminal_is_ignored_it_stays_ignored(child):
    role = child("says_whether_it_drains", ignores_hangup=True)
    role.until("ready")
    role.until("ready")
    role.signal(signal.SIGHUP)
    role.signal(signal.SIGUSR1)
    assert role.until("loading")["detail"] == "False"
    role.signal()
    assert role.wait() == 0


def test_a_role_that_does_not_drain_in_time_is_stopped(child):
    role = child("ignores_stop", drain_timeout_s=0.1)
    role.until("ready")
    role.signal()
    assert role.wait() == 1
    assert "Draining took too long" in role.log()


def test_the_parent_sets_the_drain_time(child):
    role = child("counts_down", drain_timeout_s=3600)
    role.until("ready")
    role.order(1800)
    role.until("draining")
    assert 0 < round(float(role.until("ready")["detail"]), 6) <= 1800
    assert role.wait() == 0


def test_an_order_and_a_signal_together_are_one_stop(child):
    role = child("drains")
    role.until("ready")
    role.order(1800)
    role.signal()
    assert role.wait() == 0


def test_a_role_stops_when_its_parent_is_gone(child):
    role = child("drains", drain_timeout_s=3600)
    role.until("ready")
    role.line.shutdown(socket.SHUT_RDWR)
    assert role.wait() == 0
    assert "The parent process has ended." in role.log()


def test_a_role_may_end_by_itself(child):
    role = child("ends_by_itself")
    assert role.wait() == 0


def test_a_failure_is_one_line_in_the_log_and_exit_code_1(child):
    role = child("fails")
    assert role.wait() == 1
    (line,) = role.log().splitlines()
    assert "RuntimeError: two | lines" in line


def test_a_failure_that_people_can_mend_is_told_without_a_traceback(child):
    role = child("cannot_start")
    assert role.wait() == 1
    assert role.log().endswith("The port is taken. Choose another.\n")


def test_without_a_parent_a_role_says_its_state_in_the_log():
    program = PROGRAM.format(body="pass")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == ["half", "ready", "down"]


async def test_stopping_before_the_start_and_twice_is_harmless():
    lifecycle = Lifecycle("role", drain_timeout_s=3600)
    lifecycle.stop()
    deadline = lifecycle.drain_deadline
    lifecycle.stop()
    assert lifecycle.drain_deadline >= deadline
    assert await lifecycle.serve(_returns_when_stopped, Config()) == 0


async def test_the_earliest_drain_deadline_holds():
    lifecycle = Lifecycle("role", drain_timeout_s=3600)
    assert lifecycle.drain_left_s() == 3600
    lifecycle.stop(drain_s=5)
    deadline = lifecycle.drain_deadline
    lifecycle.stop(drain_s=500)
    assert lifecycle.drain_deadline == deadline
    lifecycle.stop(drain_s=0)
    assert lifecycle.drain_left_s() == 0


async def test_aborted_before_the_start_nothing_runs():
    lifecycle = Lifecycle("role", drain_timeout_s=3600)
    lifecycle.abort(130)
    assert await lifecycle.serve(_must_not_run, Config()) == 130


async def _returns_when_stopped(config: Config, lifecycle: Lifecycle) -> None:
    await lifecycle.stopping.wait()


async def _must_not_run(config: Config, lifecycle: Lifecycle) -> None:
    await asyncio.sleep(3600)
    raise StartError("it ran")


def test_every_record_is_one_line():
    error = ValueError("a\nb")
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "c\nd", None, (ValueError, error, None))
    text = OneLineFormatter("%(message)s").format(record)
    assert text.startswith("c | d | ")
    assert text.endswith("ValueError: a | b")


def test_no_record_controls_the_terminal_on_which_the_log_is_read():
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "it said %s", ("\x1b[2J\x9b\x07 naïve ✓",), None)
    assert OneLineFormatter("%(message)s").format(record) == "it said \\x1b[2J\\x9b\\x07 naïve ✓"


# Leaves garbage that says when it is searched for, and then runs a module as `python -m` does.
LEAVES_GARBAGE = """
import gc, runpy, sys

class Cycle:
    def __del__(self):
        print("collected", flush=True)

gc.disable()
cycle = Cycle()
cycle.itself = cycle
del cycle
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command",
    [
        ("pipeline.cli", "auth", "tenant"),
        ("consumers.standin", "--gguf", "absent.gguf"),
        ("consumers.engines.local.child", "", ""),
    ],
    ids=lambda command: command[0],
)
def test_a_process_searches_for_no_garbage_at_its_end(command: tuple[str, ...]):
    environ = {**os.environ, "HEADRACE_ENGINE": "simulated"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_GARBAGE, *command],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert b"collected" not in done.stdout + done.stderr, done
