"""What `headrace up` prints of what its processes report."""

from __future__ import annotations

import io

from pipeline.config import Config
from pipeline.process.lifecycle import Report
from pipeline.up.screen import Screen


def test_a_model_that_cannot_be_loaded_is_shown_once_with_the_reason():
    out = io.StringIO()
    screen = Screen(Config(), out=out)
    failed = {"cannot_load": {"n": "its [file] is incomplete."}}
    for report in (Report("ready"), Report("ready", facts=failed), Report("loading", facts=failed)):
        screen.report("mlx", report)
    assert out.getvalue().count("model n cannot be loaded: its [file] is incomplete.") == 1
    screen.report("mlx", Report("ready"))
    screen.report("mlx", Report("ready", facts=failed))
    assert out.getvalue().count("model n cannot be loaded") == 2, "it failed again"


def test_what_a_process_reports_does_not_control_the_terminal():
    out = io.StringIO()
    screen = Screen(Config(), out=out)
    screen.report("ollama", Report("down", "the server said [/INST] \x1b[2J"))
    screen.death("mlx", "\x1b[2J ended")
    assert "the server said [/INST] \\x1b[2J" in out.getvalue()
    assert "\x1b" not in out.getvalue()
