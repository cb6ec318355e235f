from __future__ import annotations

import pytest

from pipeline.commands.stats import engine_line
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots


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
