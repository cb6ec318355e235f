from __future__ import annotations

import re

import pytest
from rich.console import Console

from pipeline.commands.stats import engine_line, render
from pipeline.core.statistics import LaneStatistics, QueueStatistics, ServerState
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, StoreReport
from pipeline.wire.pauses import Pause


@pytest.mark.parametrize(
    ("engine", "level", "total", "reason", "line"),
    [
        ("mlx", "saturated", 8, "all slots in use", "MLX: saturated (all slots in use)."),
        ("mlx", "normal", 8, "", "MLX: normal."),
        ("ollama", "normal", 0, "no worker is running", "Ollama: away (no worker is running)."),
    ],
)
def test_an_engine_is_described_in_one_sentence(engine, level, total, reason, line):
    load = Load(engine, level, 1.0, PerPriority(0, 0, 0), PerPriorityCount(0, 0, 0), Slots(0, total), 0.0, reason, 0.0)
    load.available = total > 0
    assert engine_line(engine, load) == line


@pytest.mark.parametrize(
    ("state", "reason", "line"),
    [
        ("ready", "", "http://x (openai): ready, 1 of 4 slots in use."),
        ("down", "no answer in time.", "http://x (openai): down, no answer in time."),
        ("down", "", "http://x (openai): down."),
    ],
)
def test_a_server_beside_ollama_is_described_in_one_sentence(state, reason, line):
    servers = [
        ServerState("w", dialect, "http://x", state, ["m"], Slots(1, 4), 9.0, reason)
        for dialect in ("openai", "ollama")
    ]
    console = Console(width=200)
    with console.capture() as said:
        console.print(render(QueueStatistics(*(LaneStatistics() for _ in range(3)), {}, {}, 0, 1.0, servers=servers)))
    assert said.get().count(line) == 1
    assert "(ollama)" not in said.get()


@pytest.mark.parametrize(
    ("store", "line"),
    [
        (None, ""),
        (StoreReport("ok", "", 5, 10), ""),
        (StoreReport("full", "The disk has [0 MiB]. Make room."), "Store: full. The disk has [0 MiB]. Make room."),
    ],
)
def test_what_is_wrong_with_the_store_is_said(store, line):
    lanes = [LaneStatistics() for _ in range(3)]
    console = Console(width=200)
    with console.capture() as said:
        console.print(render(QueueStatistics(*lanes, {}, {}, 0, 1.0, store=store)))
    assert ("Store:" in said.get()) is bool(line)
    assert line in said.get()


def test_what_a_server_said_neither_ends_the_command_nor_controls_the_terminal():
    said = "http://[fe80::1]:11434: no [/INST] \x1b[2J"
    load = Load("ollama", "normal", 0.0, PerPriority(), PerPriorityCount(), Slots(0, 0), 0.0, said, 0.0)
    servers = [ServerState("w", "openai", "http://x", "down", ["m"], Slots(0, 4), 0.0, said)]
    lanes, store = [LaneStatistics() for _ in range(3)], StoreReport("failed", said)
    statistics = QueueStatistics(*lanes, {"ollama": load}, {"[/x]": 1}, 0, 1.0, servers=servers, store=store)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(statistics))
    assert captured.get().count("http://[fe80::1]:11434: no [/INST] \\x1b[2J") == 3
    assert "[/x] 1" in captured.get()


def test_what_is_paused_is_said():
    lanes = [LaneStatistics() for _ in range(3)]
    paused = [Pause("low", at=0.0, reason="the [demo]")]
    console = Console(width=200)
    with console.capture() as said:
        console.print(render(QueueStatistics(*lanes, {}, {}, 0, 1.0, paused=paused, paused_tenants=2)))
    assert re.search(r"Lane low: paused at \d\d:\d\d on \d\d \w+ \(the \[demo\]\)\.", said.get())
    assert "Pauses of tenants: 2. `headrace paused` lists them." in said.get()


def test_which_model_cannot_be_loaded_is_said():
    lanes = [LaneStatistics() for _ in range(3)]
    console = Console(width=200)
    with console.capture() as said:
        console.print(render(QueueStatistics(*lanes, {}, {}, 0, 1.0, cannot_load={"n": "its [file] is incomplete."})))
    assert "Model n cannot be loaded: its [file] is incomplete.\n" in said.get()
