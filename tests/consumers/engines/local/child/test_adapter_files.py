"""Adapters whose files cannot be used. Those that can are read in `test_adapters.py`."""

from __future__ import annotations

import json

import pytest

from consumers.engines.local.child.adapter_files import opened
from consumers.engines.local.child.backend import LoadError

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}


@pytest.mark.parametrize(
    ("file", "config", "reason"),
    [
        ("adapters.safetensors", {"fine_tune_type": "dora"}, "its type is dora"),
        ("adapters.safetensors", {"fine_tune_type": "full"}, "its type is full"),
        ("adapter_model.safetensors", PLAIN | {"use_dora": True}, "PEFT's use_dora cannot be chosen"),
        ("adapter_model.safetensors", PLAIN | {"modules_to_save": ["lm_head"]}, "PEFT's modules_to_save cannot"),
        ("adapter_model.safetensors", PLAIN | {"bias": "all"}, "other kinds than plain LoRA cannot be chosen"),
        ("adapter_model.safetensors", PLAIN | {"peft_type": "IA3"}, "other kinds than plain LoRA cannot be chosen"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path, file, config, reason):
    (tmp_path / file).touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=reason) as caught:
        opened("sql", tmp_path)
    assert f'Adapter "sql" in {tmp_path}' in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"), [(None, "FileNotFoundError"), ("{", "JSONDecodeError"), ("{}", "KeyError")]
)
def test_files_that_cannot_be_read_are_named(tmp_path, config, reason):
    (tmp_path / "adapters.safetensors").touch()
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(LoadError, match=reason) as caught:
        opened("sql", tmp_path)
    assert f'The files of the adapter "sql" in {tmp_path}' in str(caught.value)
