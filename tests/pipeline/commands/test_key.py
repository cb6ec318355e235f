"""`headrace key`: what it makes is let in, what it removes is not, and the rest of the settings stays as it was."""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import load
from pipeline.gateway.identity import identify
from pipeline.gateway.statuses import HttpError

SETTINGS = """\
# Ours.
slots = 4  # as many as fit

[weights]
high = 5
medium = 3
low = 2
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "headrace.toml"


def key(*arguments: object) -> int:
    return main(["key", *map(str, arguments)])


def name_behind(secret: str, file: Path) -> str:
    """The name that the gateway gives to the bearer of a key."""
    keys = load(environ={}, file=file).http_keys
    return identify(keys, {"authorization": f"Bearer {secret.strip()}"}, "1.2.3.4").name


def test_a_key_that_is_made_is_let_in_and_stands_in_the_file_as_a_hash_only(file: Path, capsys):
    assert key("add", "alice", "--config", file) == 0
    secret = capsys.readouterr().out
    assert secret.startswith("hr-")
    assert secret.strip() not in file.read_text()
    assert name_behind(secret, file) == "alice"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_byte_order_mark_before_the_settings_is_no_part_of_them(file: Path, capsys):
    file.write_bytes(b"\xef\xbb\xbf" + SETTINGS.replace("\n", "\r\n").encode())
    assert load(environ={}, file=file).slots == 4
    assert key("add", "alice", "--config", file) == 0
    assert name_behind(capsys.readouterr().out, file) == "alice"
    assert "slots = 4  # as many as fit" in file.read_text()


def test_a_key_may_what_it_was_made_for(file: Path):
    more = ("--tenant", "lab", "--priority", "low", "--highest", "medium", "--answers-per-s", "2.5", "--operator")
    assert key("add", "bob", *more, "--config", file) == 0
    (entry,) = load(environ={}, file=file).http_keys
    assert (entry.tenant, entry.priority, entry.highest, entry.operator) == ("lab", "low", "medium", True)
    assert (entry.answers_per_s, entry.lists_per_s) == (2.5, None)


@pytest.mark.parametrize("written", [SETTINGS, SETTINGS.replace("[weights]", 'log_level = "debug"\n\n[weights]'), ""])
def test_the_rest_of_the_file_stays_as_it_was(file: Path, written: str):
    file.write_text(written)
    file.chmod(0o640)
    for name in ("alice", "bob"):
        assert key("add", name, "--config", file) == 0
    assert file.read_text().startswith(written)
    assert [entry.name for entry in load(environ={}, file=file).http_keys] == ["alice", "bob"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    for name in ("alice", "bob"):
        assert key("remove", name, "--config", file) == 0
    assert file.read_text().rstrip() == written.rstrip()


def test_keys_that_stand_in_one_line_are_kept(file: Path, capsys):
    assert key("add", "alice", "--config", file) == 0
    first = capsys.readouterr().out
    (entry,) = tomllib.loads(file.read_text())["http_keys"]
    file.write_text('http_keys = [{{name = "alice", hash = "{hash}"}}]\nslots = 2\n'.format(**entry))
    assert key("add", "bob", "--config", file) == 0
    assert name_behind(first, file) == "alice"
    assert name_behind(capsys.readouterr().out, file) == "bob"
    assert load(environ={}, file=file).slots == 2
    assert key("remove", "alice", "--config", file) == 0
    assert [entry.name for entry in load(environ={}, file=file).http_keys] == ["bob"]


def test_a_removed_key_is_not_let_in(file: Path, capsys):
    for name in ("alice", "bob"):
        key("add", name, "--config", file)
    alice, bob = capsys.readouterr().out.split()
    assert key("remove", "alice", "--config", file) == 0
    assert name_behind(bob, file) == "bob"
    with pytest.raises(HttpError):
        name_behind(alice, file)


def test_without_a_file_the_entry_is_printed_to_be_put_into_one(file: Path, capsys, monkeypatch):
    monkeypatch.delenv("HEADRACE_CONFIG", raising=False)
    assert key("add", "alice") == 0
    printed = capsys.readouterr()
    file.write_text(printed.err.partition("settings file:")[2])
    assert name_behind(printed.out, file) == "alice"
    assert key("remove", "alice") == 2


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch):
    monkeypatch.setenv("HEADRACE_CONFIG", str(file))
    assert key("add", "alice") == 0
    assert [entry.name for entry in load(environ={}, file=file).http_keys] == ["alice"]


def test_the_list_shows_every_key_and_no_hash(file: Path, capsys):
    key("add", "alice", "--config", file)
    key("add", "bob", "--highest", "low", "--lists-per-s", "0", "--config", file)
    capsys.readouterr()
    assert key("list", "--config", file) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == ["name", "alice", "bob"]
    assert "sha256" not in listed


def test_one_name_is_one_key(file: Path, capsys):
    assert key("add", "alice", "--config", file) == 0
    before = file.read_text()
    assert key("add", "alice", "--config", file) == 1
    assert key("remove", "bob", "--config", file) == 1
    assert file.read_text() == before
    assert "alice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a b",), '"a b" is not a valid key name. Use 1 to 32 letters or digits, except "LLM".'),
        (("x" * 33,), f'"{"x" * 33}" is not a valid key name. Use 1 to 32 letters or digits, except "LLM".'),
        (("alice", "--answers-per-s", "-1"), "--answers-per-s: -1.0 is not a rate of 0 or more."),
        (
            ("a", "--tenant", "/"),
            '--tenant: "/" is not a valid tenant. Use at most 64 letters, digits, `_`, `.` or `-`.',
        ),
    ],
)
def test_an_invalid_key_is_refused_in_a_sentence(file: Path, capsys, arguments: tuple[str, ...], message: str):
    assert key("add", *arguments, "--config", file) == 2
    assert not file.exists()
    assert capsys.readouterr().err == f"headrace: {message}\n"


def test_it_says_that_a_running_gateway_applies_the_change_and_that_the_first_key_protects_no_broker(
    file: Path, capsys
):
    key("add", "alice", "--config", file)
    said = capsys.readouterr().err
    assert f"A gateway that runs with --config {file} applies the change within seconds." in said
    assert "Restart it as well, so that its broker is protected too." in said
    key("add", "bob", "--config", file)
    assert "Restart it" not in capsys.readouterr().err
    key("remove", "bob", "--config", file)
    assert "within seconds" in capsys.readouterr().err


def test_the_limits_of_a_key_are_changed_and_taken_away(file: Path, capsys):
    key("add", "alice", "--tokens-per-minute", "1000", "--config", file)
    key("add", "bob", "--config", file)
    assert key("limit", "alice", "--tokens-per-day", "5000", "--answers-per-s", "2", "--config", file) == 0
    alice, bob = load(environ={}, file=file).http_keys
    assert (alice.tokens_per_minute, alice.tokens_per_day, alice.answers_per_s) == (1000, 5000, 2.0)
    assert bob.tokens_per_day == 0
    assert key("limit", "alice", "--tokens-per-minute", "0", "--config", file) == 0
    assert load(environ={}, file=file).http_keys[0].tokens_per_minute == 0
    capsys.readouterr()
    assert key("limit", "carol", "--tokens-per-day", "1", "--config", file) == 1
    assert key("limit", "alice", "--config", file) == 2
    assert key("limit", "alice", "--tokens-per-day", "-1", "--config", file) == 2
    assert "--tokens-per-day: -1 is not a whole number of 0 or more." in capsys.readouterr().err
    assert key("list", "--config", file) == 0
    assert "5000" in capsys.readouterr().out


def test_without_keys_the_list_says_what_that_means(file: Path, capsys):
    file.write_text("")
    assert key("list", "--config", file) == 0
    assert "Without keys, anyone on this machine can do anything" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["slots = ", "slots = -1", "unknown = 1"])
def test_a_file_that_is_no_settings_file_is_left_alone(file: Path, written: str):
    file.write_text(written)
    assert key("add", "alice", "--config", file) == 2
    assert file.read_text() == written


def test_a_priority_above_the_highest_is_refused(file: Path, capsys: pytest.CaptureFixture[str]):
    assert key("add", "alice", "--priority", "high", "--highest", "low", "--config", file) == 2
    assert capsys.readouterr().err == "headrace: --priority high is above --highest low. Change one of them.\n"
    assert not file.exists()
    assert key("add", "alice", "--highest", "low", "--config", file) == 0
