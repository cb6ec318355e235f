from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from pipeline.commands.options import HELP, add_options, config_from, names_a_broker
from pipeline.config import KEYS, Config, ConfigError, load, to_environment
from pipeline.wire.subjects import Priority


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(argv)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "headrace.toml"
    path.write_text('http_port = 1\nslots = 2\nmodel = "from-file"\n[weights]\nhigh = 5\nmedium = 4\nlow = 1\n')
    return path


def test_an_option_wins_over_the_environment_and_that_over_the_file(file):
    environ = {"HEADRACE_SLOTS": "3", "HEADRACE_HTTP_PORT": "2"}
    config = config_from(parse("--config", str(file), "--http-port", "4"), environ)
    assert (config.http_port, config.slots, config.model) == (4, 3, "from-file")
    assert config.weights[Priority.HIGH] == 5
    assert config.busy_at == Config().busy_at


def test_the_file_may_be_named_by_the_environment(file):
    assert config_from(parse(), {"HEADRACE_CONFIG": str(file)}).slots == 2


def test_every_setting_has_an_option_with_help():
    documented = {key for entries in HELP.values() for key in entries}
    assert documented == set(KEYS)
    assert all(text for entries in HELP.values() for _, text in entries.values())


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--http-port", "70000"], "http_port"),
        (["--http-port", "many"], "http_port"),
        (["--slots", "0"], "slots"),
        (["--engine", "steam"], "engine"),
        (["--weights", "{high = 1}"], "weights"),
        (["--weights", "{high = "], "WEIGHTS"),
        (["--weights", "[1]"], "weights"),
        (["--busy-at", "2"], "saturated_at"),
        (["--config", "/nowhere/headrace.toml"], "/nowhere/headrace.toml"),
    ],
)
def test_a_bad_option_is_refused_by_name(argv, told):
    with pytest.raises(ConfigError, match=told):
        config_from(parse(*argv), {})


def test_an_unknown_variable_of_ours_is_refused():
    with pytest.raises(ConfigError, match="HEADRACE_HTP_PORT"):
        load(environ={"HEADRACE_HTP_PORT": "1"})


def test_an_unknown_key_in_the_file_is_refused(file):
    file.write_text("htp_port = 1")
    with pytest.raises(ConfigError, match="htp_port"):
        load(environ={}, file=file)


def test_a_file_that_is_not_toml_is_refused(file):
    file.write_text("= 1")
    with pytest.raises(ConfigError, match="not TOML"):
        load(environ={}, file=file)


@pytest.mark.parametrize("text", ["{high = 1, medium = 2, low = 3}", '{"high": 1, "medium": 2, "low": 3}'])
def test_a_table_is_written_as_toml_or_json(text):
    assert config_from(parse("--weights", text), {}).weights == {"high": 1, "medium": 2, "low": 3}


def test_a_list_is_written_as_toml_or_json():
    assert config_from(parse("--internal-models", "['a', 'b']"), {}).internal_models == ["a", "b"]


def test_a_switch_has_a_yes_and_a_no():
    assert config_from(parse("--engine-faults", "--no-ollama-standin"), {}).engine_faults
    assert not config_from(parse("--no-ollama-standin"), {}).ollama_standin


def test_a_child_reads_from_its_environment_what_the_parent_has():
    config = Config(
        http_port=8080,
        model='odd "name" {x}',
        weights={Priority.HIGH: 8.0, Priority.MEDIUM: 1.5, Priority.LOW: 0.5},
        spill_models={"a": "b", "{": "}"},
        internal_models=["tinyllama", "x y"],
        engine_faults=True,
        default_timeout_s=None,
        ollama_host="http://127.0.0.1:1",
    )
    assert load(environ=to_environment(config)) == config


def test_ollama_host_is_taken_from_where_ollama_itself_looks():
    assert load(environ={"OLLAMA_HOST": "somewhere:1"}).ollama_host == "somewhere:1"
    assert load(environ={"OLLAMA_HOST": "a", "HEADRACE_OLLAMA_HOST": "b"}).ollama_host == "b"


def test_a_broker_is_named_by_option_environment_or_file(file):
    assert not names_a_broker(parse("--config", str(file)), {})
    assert names_a_broker(parse("--nats-url", "nats://127.0.0.1:4222"), {})
    assert names_a_broker(parse(), {"HEADRACE_NATS_URL": "nats://127.0.0.1:4222"})
    file.write_text('nats_url = "nats://127.0.0.1:4222"')
    assert names_a_broker(parse("--config", str(file)), {})
