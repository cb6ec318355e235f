"""How programs find the instance that runs on a state folder."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config import Config
from pipeline.up.instance import RUN_FILE, Instance, announced, find
from pipeline.up.server import state_lock


def test_an_instance_is_found_while_it_runs(tmp_path: Path):
    config, here = Config(state_dir=str(tmp_path)), Instance("nats://127.0.0.1:4222", None, os.getpid())
    with state_lock(tmp_path), announced(here, tmp_path / RUN_FILE):
        assert find(config) == here
    assert find(config) is None


def test_a_process_that_has_got_the_id_of_one_that_died_is_no_instance(tmp_path: Path):
    """A machine without power leaves the file, and another broker may have the port by now."""
    config, died = Config(state_dir=str(tmp_path)), Instance("nats://127.0.0.1:4222", None, os.getpid())
    with announced(died, tmp_path / RUN_FILE):
        assert find(config) is None
        with state_lock(tmp_path):
            pass
        assert find(config) is None
