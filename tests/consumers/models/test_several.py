"""Which models the settings name, and how much memory they will take."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import msgspec
import pytest

from consumers.demo_model import PATH
from consumers.engines.local.process import EngineProcess
from consumers.mlx import fleet_of
from consumers.models.getting import LocalModel
from consumers.models.obtain import about
from consumers.models.several import draft_config_of, wanted_models
from consumers.models.sizes import expected_bytes, files_bytes
from pipeline.config import Config, ConfigError, ModelEntry, Sampling, load, to_environment
from pipeline.process.lifecycle import StartError
from tests.consumers.engines.conformance import until_ready


def names(config: Config) -> list[str]:
    return [model.name for model in wanted_models(config)]


def folder_of(tmp_path: Path, *models: str) -> Path:
    for model in models:
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
    return tmp_path


def test_one_model_is_that_of_the_setting():
    assert names(load({"model": ["demo"]}, environ={})) == ["headrace-demo"]


def test_several_options_are_several_models_and_the_first_is_the_default():
    config = load({"model": ["owner/b", "demo", "owner/a"]}, environ={})
    assert config.model == "owner/b"
    assert names(config) == ["owner/b", "headrace-demo", "owner/a"]
    assert names(load(environ={"HEADRACE_MODEL": '["demo", "owner/a"]'})) == ["headrace-demo", "owner/a"]


def test_tables_name_models_and_the_first_is_the_default_unless_one_is_named(tmp_path):
    file = tmp_path / "headrace.toml"
    file.write_text('[models.chat]\npath = "demo"\naliases = ["gpt-4o"]\n[models."owner/a"]\npinned = true\n')
    config = load(environ={}, file=file)
    assert [(model.name, model.place) for model in wanted_models(config)] == [("chat", "demo"), ("owner/a", "owner/a")]
    assert names(load({"model": ["owner/a"]}, environ={}, file=file)) == ["owner/a", "chat"]
    assert load(environ=to_environment(config)) == config


def test_a_folder_of_models_is_all_of_them(tmp_path):
    folder = folder_of(tmp_path, "b", "a")
    assert names(load({"model": [str(folder)]}, environ={})) == ["a", "b"]
    (folder / "config.json").write_text("{}")
    assert names(load({"model": [str(folder)]}, environ={})) == [folder.name]


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ConfigError) as refused:
        wanted_models(Config(model="demo", models={"demo": ModelEntry(aliases=["x"]), "x": ModelEntry(path="owner/x")}))
    assert str(refused.value) == 'Two models have the name "x": headrace-demo (demo) and x (owner/x). Rename one.'


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"a": ModelEntry(path="demo", aliases=["b"])}, {"b": ModelEntry(path="demo", slots=1)}),
        ({"a": ModelEntry(path="demo", aliases=["c"])}, {"b": ModelEntry(path="demo", aliases=["c"])}),
        ({"a": ModelEntry(path="demo")}, {"b": ModelEntry(path="owner/b", aliases=["A"])}),
        ({"Chat": ModelEntry(path="demo")}, {"chat": ModelEntry(path="owner/chat")}),
        ({"chat": ModelEntry(path="demo")}, {"chat:latest": ModelEntry(path="owner/chat")}),
    ],
)
def test_names_are_compared_as_a_request_is_matched_with_them_also_of_models_with_one_place(first, second):
    """Else one of the two would be dropped, and a request that names it would be answered by the other."""
    with pytest.raises(ConfigError, match="Two models have the name"):
        wanted_models(Config(model=next(iter(first)), models=first | second))


def test_a_model_may_repeat_its_own_name():
    entry = ModelEntry(path="demo", aliases=["CHAT", "chat:latest"])
    assert names(Config(model="chat", models={"chat": entry})) == ["chat"]


@pytest.mark.parametrize("name", ["auto", "Auto", "auto:latest"])
def test_the_name_that_stands_for_any_model_is_no_model_s(name):
    for models in ({name: ModelEntry(path="demo")}, {"chat": ModelEntry(path="demo", aliases=[name])}):
        with pytest.raises(ConfigError, match=f'"{name}" stands for any model'):
            wanted_models(Config(model=next(iter(models)), models=models))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"x": {"idle": 1}}, 'models, x: unknown key "idle"'),
        ({"x": {"idle_s": 0}}, "models, x, idle_s: 0 is not a number of seconds greater than 0"),
        ({"x": 1}, "is not a table with a table for each model"),
    ],
)
def test_a_wrong_table_is_named(tables, message):
    with pytest.raises(ConfigError, match=message):
        load({"models": tables}, environ={})


def test_the_settings_of_a_model_take_the_place_of_the_others():
    entry = ModelEntry(slots=3, sampling=Sampling(temperature=0.0))
    own = entry.over(Config(slots=8, default_max_tokens=7))
    assert (own.slots, own.sampling.temperature, own.default_max_tokens) == (3, 0.0, 7)


def test_each_model_has_its_own_draft_model_and_adapters():
    tables = {"a": ModelEntry(path="demo"), "b": ModelEntry(path="owner/b", draft_model="owner/c", adapter_path="~/d")}
    config = Config(model="a", models=tables, draft_model="owner/e", adapters={"sql": "~/sql"})
    first, second = wanted_models(config)
    assert [draft_config_of(model, config).model for model in (first, second)] == ["owner/e", "owner/c"]
    (_, plain) = wanted_models(msgspec.structs.replace(config, models={"a": tables["a"], "b": ModelEntry()}))
    assert draft_config_of(plain, config) is None
    own = [model.entry.over(config) for model in (first, second)]
    assert [(each.adapter_path, each.adapters) for each in own] == [("", {"sql": "~/sql"}), ("~/d", {})]


def safetensors(folder: Path, **tensors: tuple[str, list[int], int]) -> None:
    at, header = 0, {}
    for name, (dtype, shape, size) in tensors.items():
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def test_quantized_and_half_weights_count_as_float32_on_a_cpu(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization": {"bits": 4, "group_size": 32}}')
    safetensors(
        tmp_path,
        a__weight=("U32", [2, 4], 32),
        a__scales=("F16", [2, 1], 4),
        a__biases=("F16", [2, 1], 4),
        b__weight=("BF16", [8], 16),
        c=("I32", [4], 16),
    )
    assert expected_bytes(tmp_path, float32=True) == 2 * 32 * 4 + 8 * 4 + 16
    assert expected_bytes(tmp_path, float32=False) == files_bytes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert expected_bytes(tmp_path, float32=True) == 9


async def test_what_is_expected_is_what_the_model_takes():
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    async with EngineProcess(Config(model="demo"), model_path=str(PATH), served_name="m") as engine:
        await until_ready(engine)
        measured = engine.memory_bytes
    assert 0.98 < expected_bytes(PATH, float32=True) / measured < 1.02


def test_a_model_that_can_never_fit_is_refused_by_name():
    tables = {"a": ModelEntry(bytes=60, pinned=True), "b": ModelEntry(bytes=50)}
    config = Config(engine="simulated", model="a", models=tables, models_bytes=100)
    wanted = wanted_models(config)
    with pytest.raises(StartError, match="Model b needs 0 MB beside the pinned models and can never be loaded"):
        fleet_of(config, wanted, [LocalModel(model.name, "") for model in wanted])


def test_doctor_names_each_model_and_the_one_that_is_missing():
    good = Config(model="a", models={"a": ModelEntry(path="demo")})
    assert about(good)[0]
    usable, said, _ = about(Config(model="demo", models={"b": ModelEntry(path="./no-such-folder")}))
    assert not usable
    assert "demo model" in said
    assert "no-such-folder" in said


def test_an_internal_model_is_no_default():
    config = Config(model="./models/TinyLlama-1.1B")
    with pytest.raises(ConfigError, match=r"TinyLlama-1.1B .* is internal and answers no request"):
        wanted_models(config)
    assert [each.name for each in wanted_models(msgspec.structs.replace(config, internal_models=[]))] == [
        "TinyLlama-1.1B"
    ]
    second = Config(model="demo", models={"./models/TinyLlama-1.1B": ModelEntry()})
    assert [each.name for each in wanted_models(second)] == ["headrace-demo", "TinyLlama-1.1B"]
