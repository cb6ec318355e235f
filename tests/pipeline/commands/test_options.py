from __future__ import annotations

import argparse

import pytest

from pipeline.commands.options import add_options, config_from, given_options, names_a_broker
from pipeline.config import KEYS, SETTINGS, Config
from tests.options import parse

URLS = ["http://a:1", "https://b/api"]


def test_the_file_may_be_named_by_the_environment(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("slots = 2")
    assert config_from(parse(), {"HEADRACE_CONFIG": str(file)}).slots == 2


def test_a_file_in_the_current_folder_is_read_if_no_other_one_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_from(parse(), {}).slots == Config().slots
    (tmp_path / "headrace.toml").write_text("slots = 3")
    (tmp_path / "other.toml").write_text("slots = 5")
    assert config_from(parse(), {}).slots == 3
    assert config_from(parse("--config", "other.toml"), {}).slots == 5
    assert config_from(parse(), {"HEADRACE_CONFIG": "other.toml"}).slots == 5
    assert config_from(parse(), {"HEADRACE_CONFIG": ""}).slots == Config().slots
    assert config_from(parse(), {"HEADRACE_SLOTS": "7"}).slots == 7


def test_every_setting_has_an_option_with_its_help():
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = {option: action.help for action in parser._actions for option in action.option_strings}
    assert [key for key in KEYS if not options[SETTINGS[key].option].startswith(SETTINGS[key].setting.help)] == []


def test_a_command_that_takes_some_settings_shows_them_below_the_right_headings():
    parser = argparse.ArgumentParser()
    add_options(parser, keys=("state_dir", "slots"))
    titles = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups}
    assert titles["Broker"] == ["state_dir"]
    assert titles["MLX engine"] == ["slots"]
    assert "HTTP" not in titles


@pytest.mark.parametrize(
    "given",
    [
        ["--openai", "a:1/v1/", "--openai", "https://b/api/v1"],
        ["--openai", "['a:1', 'https://b/api']"],
        ["--openai", "http://a:1", "--openai", "https://b/api", "--openai", "a:1"],
    ],
)
def test_servers_are_named_one_by_one_or_as_a_list(given):
    args = parse(*given)
    assert config_from(args, {}).openai == URLS
    assert config_from(parse(*given_options(args)), {}).openai == URLS


def test_a_switch_has_a_yes_and_a_no():
    assert config_from(parse("--engine-faults", "--no-ollama-standin"), {}).engine_faults
    assert not config_from(parse("--no-ollama-standin"), {}).ollama_standin


def test_a_broker_is_named_by_option_environment_or_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("slots = 2")
    assert not names_a_broker(parse("--config", str(file)), {})
    assert names_a_broker(parse("--nats-url", "nats://127.0.0.1:4222"), {})
    assert names_a_broker(parse(), {"HEADRACE_NATS_URL": "nats://127.0.0.1:4222"})
    file.write_text('nats_url = "nats://127.0.0.1:4222"')
    assert names_a_broker(parse("--config", str(file)), {})


def test_the_options_given_to_one_command_can_be_given_to_another(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("slots = 3")
    args = parse("--config", str(file), "--model", "a b", "--no-ollama-standin", "--engine-faults")
    given = given_options(args)
    assert set(given) == {"--config", str(file), "--model", "a b", "--no-ollama-standin", "--engine-faults"}
    assert config_from(parse(*given), {}) == config_from(args, {})
    assert given_options(parse()) == []
