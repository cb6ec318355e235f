from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pipeline.commands.options import config_from
from pipeline.config import (
    KEYS,
    SETTINGS,
    Config,
    ConfigError,
    HttpKey,
    ModelEntry,
    Sampling,
    load,
    to_environment,
)
from pipeline.wire.subjects import Priority
from tests.options import parse

# The placeholders of values that any text fits.
TEXTS = ("URL", "DIR", "FILE", "HOST", "MODEL", "NAME_OR_PATH")


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


def test_the_variable_that_names_the_file_is_no_setting():
    assert load(environ={"HEADRACE_CONFIG": "other.toml"}) == Config()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--http-port", "70000"], '--http-port: "70000" is not a port number (0 to 65535).'),
        (["--http-port", "abc"], '--http-port: "abc" is not a port number (0 to 65535).'),
        (["--slots", "-1"], '--slots: "-1" is not a whole number from 0 to 1024.'),
        (["--slots", "1.5"], '--slots: "1.5" is not a whole number from 0 to 1024.'),
        (["--lease-s", "inf"], '--lease-s: "inf" is not a number of seconds, 1 or more.'),
        (["--lease-s", "nan"], '--lease-s: "nan" is not a number of seconds, 1 or more.'),
        (["--default-timeout-s", "0"], '--default-timeout-s: "0" is not a number of seconds greater than 0.'),
        (["--engine", "steam"], '--engine: "steam" is not an engine (mlx or simulated).'),
        (
            ["--weights", "{high = 1}"],
            '--weights: {"high":1} is not a table with a number greater than 0 for each of high, medium and low.',
        ),
        (["--weights", "{high = "], '--weights: "{high = " is neither JSON nor a TOML value.'),
        (["--internal-models", "tinyllama"], '--internal-models: "tinyllama" is not a list of model names.'),
        (["--busy-at", "2"], "saturated_at (1) must be greater than busy_at (2)."),
        (
            ["--http-origins", '["*"]'],
            '--http-origins: ["*"] is not a list of origins, such as https://chat.example, app:// or null.',
        ),
        (["--http-names", '["mac:80"]'], '--http-names: ["mac:80"] is not a list of host names without ports.'),
        (["--http-names", '["http://mac"]'], '--http-names: ["http://mac"] is not a list of host names without ports.'),
        (["--http-keys", "[1]"], "--http-keys: [1] is not a list of tables, one for each API key."),
        (["--http-keys", '[{name = "a"}]'], '--http-keys, entry 1: the key "hash" is missing.'),
        (
            ["--config", "/nowhere/headrace.toml"],
            "Cannot read the settings file /nowhere/headrace.toml: No such file or directory.",
        ),
    ],
)
def test_an_invalid_option_is_refused_in_a_sentence_that_names_it(argv, message):
    with pytest.raises(ConfigError) as refused:
        config_from(parse(*argv), {})
    assert str(refused.value) == message


def test_a_message_names_the_place_where_the_value_was_given(file):
    with pytest.raises(ConfigError, match=r'^HEADRACE_SLOTS: "x" is not a whole number from 0 to 1024\.$'):
        load(environ={"HEADRACE_SLOTS": "x"})
    file.write_text("slots = true")
    with pytest.raises(ConfigError) as refused:
        load(environ={}, file=file)
    assert str(refused.value) == f"slots in {file}: true is not a whole number from 0 to 1024."


@pytest.mark.parametrize("key", [key for key in KEYS if SETTINGS[key].kind.metavar not in (*TEXTS, "")])
@pytest.mark.parametrize("value", ["\x00", "{}"], ids=repr)
def test_no_wording_of_the_decoder_reaches_the_user(key, value):
    if key in ("spill_models", "models", "adapters", "template_arguments", "sampling") and value == "{}":
        return
    with pytest.raises(ConfigError) as refused:
        load({key: value}, environ={})
    said = str(refused.value)
    assert said.startswith(SETTINGS[key].option)
    assert SETTINGS[key].kind.phrase in said
    assert "Expected" not in said
    assert "$" not in said


_KEY = f'[[http_keys]]\nname = "a"\nhash = "sha256:{"0" * 8}:{"0" * 64}"\n'
TABLES = {
    "": (Config, ""),
    "sampling": (Sampling, "[sampling]\n"),
    "models": (ModelEntry, "[models.a]\n"),
    "models.sampling": (Sampling, "[models.a.sampling]\n"),
    "http_keys": (HttpKey, _KEY),
}


def takes_text(field: msgspec.structs.FieldInfo) -> bool:
    try:
        msgspec.convert("1", field.type)
    except msgspec.ValidationError:
        return field.name in ("engine", "log_level", "priority", "highest", "hash")
    return True


@pytest.mark.parametrize(
    ("table", "key"),
    [
        (table, field.name)
        for table, (struct, _) in TABLES.items()
        for field in msgspec.structs.fields(struct)
        if not takes_text(field)
    ],
)
def test_in_a_file_a_text_is_no_number_no_switch_no_list_and_no_table(table: str, key: str, file: Path):
    for text in ("1", "0.5", "32", "true", "[]", "{}", ""):
        file.write_text(f"{TABLES[table][1]}{key} = '{text}'\n")
        with pytest.raises(ConfigError) as refused:
            load(environ={}, file=file)
        said = str(refused.value)
        assert said.startswith(f"{key} in {file}: " if not table else f"{table.partition('.')[0]} in {file}, ")
        assert f'{key}: "{text}" is not ' in said or not table


def test_in_a_table_of_an_option_a_text_is_no_number():
    with pytest.raises(ConfigError) as refused:
        config_from(parse("--weights", '{high = "1", medium = 2, low = 3}'), {})
    assert str(refused.value).startswith('--weights: {"high":"1","medium":2,"low":3} is not a table')


def test_in_a_file_a_whole_number_may_be_written_with_a_fraction_or_an_exponent(file):
    file.write_text("models_bytes = 8e9\ndrain_timeout_s = 3\n[models.a]\nbytes = 1e9\nidle_s = 2.0\n")
    config = load(environ={}, file=file)
    assert (config.models_bytes, config.drain_timeout_s) == (8_000_000_000, 3.0)
    assert (config.models["a"].bytes, config.models["a"].idle_s) == (1_000_000_000, 2.0)


def test_a_list_of_models_in_a_file_is_no_text(file):
    file.write_text("""model = ['["a", "b"]']""")
    assert load(environ={}, file=file).model == '["a", "b"]'


def test_a_long_value_is_shortened():
    with pytest.raises(ConfigError) as refused:
        load({"slots": "9" * 1000}, environ={})
    assert len(str(refused.value)) < 200


def test_an_entry_of_a_key_is_refused_by_its_number_and_field_and_its_hash_is_not_shown():
    good = {"name": "a", "hash": f"sha256:{'0' * 8}:{'0' * 64}"}
    for bad, message in (
        (
            {"name": "a b"},
            ', entry 2, name: "a b" is not a valid key name. Use 1 to 32 letters or digits, except "LLM".',
        ),
        ({"answers_per_s": -1}, ", entry 2, answers_per_s: -1 is not a rate of 0 or more."),
        ({"hash": "s3cret"}, ", entry 2, hash: the value is not a key's hash (sha256:<salt>:<digest>)."),
        ({"colour": 1}, ', entry 2: unknown key "colour". Its keys are name, hash, tenant'),
    ):
        with pytest.raises(ConfigError) as refused:
            load({"http_keys": [good, {**good, **bad}]}, environ={})
        assert str(refused.value).startswith("--http-keys" + message)


def test_an_unknown_variable_is_refused():
    with pytest.raises(ConfigError) as refused:
        load(environ={"HEADRACE_X": "1"})
    assert str(refused.value) == "Unknown setting HEADRACE_X. `headrace up --help` lists the settings."


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name": "a", "hash": f"sha256:{'1' * 8}:{'1' * 64}"}, 'two keys have the name "a". Rename or remove one.'),
        ({"name": "b", "hash": f"sha256:{'0' * 8}:{'0' * 64}"}, '"a" and "b" are the same key. Remove one.'),
        ({"name": "a", "hash": f"sha256:{'0' * 8}:{'0' * 64}"}, 'two keys have the name "a". Rename or remove one.'),
    ],
)
def test_two_keys_of_one_name_or_of_one_hash_are_refused(second, message):
    first = {"name": "a", "hash": f"sha256:{'0' * 8}:{'0' * 64}"}
    with pytest.raises(ConfigError) as refused:
        load({"http_keys": [first, second]}, environ={})
    assert str(refused.value) == f"--http-keys: {message}"


def test_an_unknown_key_in_the_file_is_refused(file):
    file.write_text("htp_port = 1")
    with pytest.raises(ConfigError, match=f'Unknown setting "htp_port" in {file}'):
        load(environ={}, file=file)


def test_for_a_key_of_an_older_version_the_refusal_names_the_key_that_replaces_it(file):
    file.write_text("suspended_kv_bytes = 0")
    with pytest.raises(ConfigError) as refused:
        load(environ={}, file=file)
    instead = "Use kept_kv_bytes instead, which replaces it."
    assert str(refused.value) == f'Unknown setting "suspended_kv_bytes" in {file}. {instead}'
    with pytest.raises(ConfigError) as refused:
        load(environ={"HEADRACE_SUSPENDED_KV_BYTES": "0"})
    assert str(refused.value) == f"Unknown setting HEADRACE_SUSPENDED_KV_BYTES. {instead}"


def test_a_file_that_is_not_toml_is_refused(file):
    file.write_text("= 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(environ={}, file=file)


@pytest.mark.parametrize("text", ["{high = 1, medium = 2, low = 3}", '{"high": 1, "medium": 2, "low": 3}'])
def test_a_table_is_written_as_toml_or_json(text):
    assert config_from(parse("--weights", text), {}).weights == {"high": 1, "medium": 2, "low": 3}


def test_a_list_is_written_as_toml_or_json():
    assert config_from(parse("--internal-models", "['a', 'b']"), {}).internal_models == ["a", "b"]


URLS = ["http://a:1", "https://b/api"]


def test_servers_are_named_by_the_environment_and_by_a_file(file):
    assert load(environ={"HEADRACE_OPENAI": "a:1"}).openai == ["http://a:1"]
    assert load(environ={"HEADRACE_OPENAI": ""}).openai == []
    assert load(environ=to_environment(Config(openai=URLS, openai_key="k"))) == Config(openai=URLS, openai_key="k")
    file.write_text('openai = ["a:1", "https://b/api/v1"]')
    assert load(environ={}, file=file).openai == URLS


@pytest.mark.parametrize("url", ["ftp://a", "http://", "http://a b", "http://a?x", "http://a:99999"])
def test_a_url_of_no_server_is_refused_with_its_place(url):
    with pytest.raises(ConfigError, match=r"^--openai: .* is not the URL of a server"):
        config_from(parse("--openai", url), {})


def test_keys_of_servers_are_not_shown():
    with pytest.raises(ConfigError) as caught:
        load(environ={"HEADRACE_OPENAI_KEY": "se cret"})
    assert "se cret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load(environ={"HEADRACE_OPENAI": "http://me:secret@a"})
    assert "secret" not in str(caught.value)


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


KUBERNETES = {
    "HEADRACE_SERVICE_HOST": "10.96.0.12",
    "HEADRACE_SERVICE_PORT": "8411",
    "HEADRACE_SERVICE_PORT_HTTP": "8411",
    "HEADRACE_PORT": "tcp://10.96.0.12:8411",
    "HEADRACE_PORT_8411_TCP": "tcp://10.96.0.12:8411",
    "HEADRACE_PORT_8411_TCP_PROTO": "tcp",
    "HEADRACE_PORT_8411_TCP_PORT": "8411",
    "HEADRACE_PORT_8411_TCP_ADDR": "10.96.0.12",
    # Of Services named headrace-nats and headrace-http. The first and the last are also names of settings.
    "HEADRACE_NATS_PORT": "tcp://10.96.0.13:4222",
    "HEADRACE_NATS_SERVICE_HOST": "10.96.0.13",
    "HEADRACE_NATS_PORT_4222_UDP_ADDR": "10.96.0.13",
    "HEADRACE_HTTP_PORT": "tcp://10.96.0.14:8411",
    # Of `docker --link`.
    "HEADRACE_NAME": "/me/headrace",
    "HEADRACE_ENV_PATH": "/bin",
}


def test_the_variables_that_announce_a_service_are_no_settings():
    assert load(environ=KUBERNETES) == load(environ={})
    assert load(environ=KUBERNETES | {"HEADRACE_HTTP_PORT": "8411"}).http_port == 8411


@pytest.mark.parametrize("name", ["HEADRACE_HTP_PORT", "HEADRACE_SERVICE", "HEADRACE_PORTS", "HEADRACE_PORT"])
def test_a_misspelt_variable_is_still_refused(name):
    with pytest.raises(ConfigError, match=name):
        load(environ={name: "8411"})
