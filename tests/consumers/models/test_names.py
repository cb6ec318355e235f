"""What the setting `model` names."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers.demo_model import PATH
from consumers.models import names


@pytest.mark.parametrize("model", ["demo", "headrace-demo"])
def test_both_names_of_the_demo_model_are_accepted(model: str):
    assert names.located(model) == str(PATH)
    assert names.served_name_of(model) == "headrace-demo"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
        ("~/models/Some Model (Q4).gguf", "Some-Model-Q4"),
        ("./qwen.Q4_K_M.GGUF", "qwen.Q4_K_M"),
        ("https://host/a/b/tiny.gguf?download=true", "tiny"),
        ("/models/llama", "llama"),
        ("../...gguf", "model"),
    ],
)
def test_a_model_has_a_name_in_answers(model: str, name: str):
    assert names.served_name_of(model) == name


def test_a_folder_is_known_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "link").symlink_to("weights")
    monkeypatch.chdir(tmp_path)
    assert names.located("link") == str(tmp_path / "link")
    assert names.served_name_of("link") == "weights"


def test_a_short_name_is_never_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not names.is_folder("smollm2")
    assert names.is_folder("./smollm2")


@pytest.mark.parametrize(("text", "is_one"), [("a/b", True), ("A-b.c/d_e.f-1", True), ("a", False), ("a/b/c", False)])
def test_a_repository_has_an_owner_and_a_name(text: str, is_one: bool):
    assert names.is_repository(text) is is_one


@pytest.mark.parametrize("text", ["../b", "a/..", "a/b..c", "-a/b", "a/-b", "", "a b/c"])
def test_odd_texts_are_no_repositories(text: str):
    assert not names.is_repository(text)
