"""The progress of loading, as the parent hears it."""

from __future__ import annotations

import threading

from consumers.engines.local.child.headway import LoadHeadway
from consumers.engines.local.protocol import Loading


def test_each_step_is_told_at_once_with_the_size_of_the_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(7))
    (tmp_path / "config.json").write_bytes(bytes(9))
    told: list[Loading] = []
    with LoadHeadway(told.append, str(tmp_path)) as headway:
        headway.note("loading the model")
    assert told[0].note == "loading the model"
    assert told[0].total_bytes == 7
    assert 0 <= told[0].done_bytes <= 7


def test_the_bytes_are_told_again_and_again_until_the_model_is_loaded(tmp_path):
    told: list[Loading] = []
    several = threading.Event()

    def tell(frame: Loading) -> None:
        told.append(frame)
        if len(told) > 2:
            several.set()

    with LoadHeadway(tell, str(tmp_path)) as headway:
        headway.note("loading the model")
        assert several.wait(30)
    number = len(told)
    assert {frame.note for frame in told} == {"loading the model"}
    assert not several.wait(0) or len(told) == number


def test_of_a_repository_or_no_model_the_size_is_not_known():
    for path in ("", "owner/name"):
        told: list[Loading] = []
        with LoadHeadway(told.append, path) as headway:
            headway.note("x")
        assert (told[0].done_bytes, told[0].total_bytes) == (0, 0)
