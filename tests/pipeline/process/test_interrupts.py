from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pipeline.process.interrupts import INTERRUPTED, end_at_interrupt, raise_at_interrupt

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 60.0

# Sends SIGINT to itself when it begins to import a module, or when it begins to import the first one that is neither
# Python's nor part of the entry (`first`). Then it runs what the arguments say, as a module or as the console script.
STRUCK = """
import os, runpy, signal, sys
from importlib.metadata import entry_points

class Striker:
    ENTRY = {"pipeline", "pipeline.cli", "pipeline.cli.run", "pipeline.cli.__main__", "pipeline.process",
             "pipeline.process.interrupts", "pipeline.process.terminal", "consumers", "consumers.models",
             "consumers.standin"}

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0] not in sys.stdlib_module_names and name not in self.ENTRY
        if name == at or (at == "first" and first and name != module and name != module + ".__main__"):
            self.find_spec = lambda *_: None
            print("struck", flush=True)
            os.kill(os.getpid(), signal.SIGINT)

at, ignored, module = sys.argv[1], sys.argv[2] == "ignored", sys.argv[3]
del sys.argv[1:4]
signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
sys.meta_path.insert(0, Striker())
if module == "headrace":
    (script,) = entry_points(group="console_scripts", name="headrace")
    sys.exit(script.load()())
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def struck(at: str, *command: str, ignored: bool = False) -> subprocess.CompletedProcess[str]:
    arguments = [at, "ignored" if ignored else "", *command]
    return subprocess.run(
        [sys.executable, "-c", STRUCK, *arguments],
        env={**os.environ, "HEADRACE_ENGINE": "simulated"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",  # an engine's child writes frames
        timeout=TIMEOUT_S,
        check=False,
    )


RUN = ("run", "monitor", "--nats-url", "nats://127.0.0.1:9")
UP = ("up", "--http-host", "0.0.0.0")


@pytest.mark.parametrize(
    ("at", "command"),
    [
        ("first", ("headrace", *RUN)),
        ("pipeline.process.lifecycle", ("headrace", *RUN)),
        ("first", ("pipeline.cli", *RUN)),
        ("consumers.monitor", ("pipeline.cli", *RUN)),  # the command imports it
        ("first", ("pipeline.cli", *UP)),
        ("pipeline.up.local", ("pipeline.cli", *UP)),  # the command imports it
    ],
)
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_word(at: str, command: tuple[str, ...]):
    done = struck(at, *command)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "struck\n", "")


@pytest.mark.parametrize("at", ["first", "pipeline.config"])
@pytest.mark.parametrize("module", ["consumers.models", "consumers.models.pulling", "consumers.standin"])
def test_ctrl_c_while_a_child_is_imported_ends_it_without_a_word(at: str, module: str):
    done = struck(at, module)
    assert (done.returncode, done.stdout, done.stderr) == (INTERRUPTED, "struck\n", "")


def test_the_parent_alone_ends_an_engine_that_is_being_imported():
    done = struck("pipeline.config", "consumers.engines.local.child", "", "")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_where_ctrl_c_is_ignored_it_stays_ignored():
    done = struck("pipeline.config", "pipeline.cli", "--version", ignored=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "headrace" in done.stdout


def test_code_that_handles_the_exception_gets_it():
    end_at_interrupt()
    raise_at_interrupt()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
