"""Keys and limits are read again while a gateway runs."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.commands.options import with_keys_file
from pipeline.config import ConfigError, load
from tests.waiting import eventually

OPEN = {"http_answers_per_s": 0, "http_statistics_per_s": 0, "http_lists_per_s": 0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "headrace.toml"


@pytest.fixture
def command(file: Path, capsys):
    """Runs `headrace key` on the file; gives the key that it prints, if it makes one."""

    def run(action: str, name: str, *more: str) -> dict[str, str]:
        assert main(["key", action, name, *more, "--config", str(file)]) == 0
        return {"authorization": f"Bearer {capsys.readouterr().out.strip()}"}

    return run


@pytest.fixture
def running(serve, file: Path):
    """A gateway with the keys of the file."""

    def start(**settings):
        keys = load(environ={}, file=file).http_keys if file.exists() else []
        return serve(http_keys=keys, http_keys_file=str(file), **OPEN, **settings)

    return start


async def status(web, by) -> int:
    return (await web.get("/v1/models", headers=by)).status_code


async def becomes(web, by, code: int) -> None:
    async def is_so() -> bool:
        return await status(web, by) == code

    await eventually(is_so, what=f"status {code}", every_s=0.05)


async def test_a_key_is_added_limited_and_removed_while_the_gateway_runs(command, running):
    alice = command("add", "alice")
    async with running() as web:
        assert await status(web, alice) == 200
        bob = command("add", "bob")
        await becomes(web, bob, 200)
        assert "x-ratelimit-limit-tokens" not in (await web.get("/v1/models", headers=bob)).headers
        command("limit", "bob", "--tokens-per-minute", "100")

        async def limited() -> bool:
            return "x-ratelimit-limit-tokens" in (await web.get("/v1/models", headers=bob)).headers

        await eventually(limited, what="the limit applies", every_s=0.05)
        command("remove", "bob")
        await becomes(web, bob, 401)
        assert await status(web, alice) == 200


async def test_a_request_in_flight_ends_as_it_began(command, running, engine):
    command("add", "alice")
    bob = command("add", "bob")
    async with running() as web:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        answering = asyncio.create_task(web.post("/v1/chat/completions", json=body, headers=bob))
        request_id = await engine.next_id()
        command("remove", "bob")
        await becomes(web, bob, 401)
        await engine.answer(request_id)
        assert "[DONE]" in (await answering).text


async def test_a_broken_file_leaves_the_keys_and_is_reported_until_it_is_mended(command, running, file, caplog):
    alice = command("add", "alice")
    good = file.read_text()
    async with running() as web:

        async def said() -> str:
            return (await web.get("/readyz")).json().get("keys", "")

        assert not await said()
        for broken in ('http_keys = "', "slots = -1\n", None):
            if broken is None:
                file.unlink()
            else:
                file.write_text(broken)
            assert "earlier keys are in force" in await eventually(said, what="the fault is reported", every_s=0.05)
            assert await status(web, alice) == 200
            file.write_text(good)

            async def mended() -> bool:
                return not await said()

            await eventually(mended, what="the file is read again", every_s=0.05)
    assert "The API keys stay as they were" in caplog.text


async def test_once_there_was_a_key_a_call_needs_one(command, running, file):
    async with running() as web:
        assert await status(web, {}) == 200
        alice = command("add", "alice")
        await becomes(web, {}, 401)
        assert await status(web, alice) == 200
        command("remove", "alice")
        await becomes(web, alice, 401)
        assert await status(web, {}) == 401


async def test_a_hangup_has_the_file_read_at_once_and_does_not_end_the_gateway(command, running, monkeypatch):
    monkeypatch.setattr("pipeline.gateway.keyring._LOOK_EVERY_S", 3600.0)
    alice = command("add", "alice")
    async with running() as web:
        assert await status(web, alice) == 200
        bob = command("add", "bob")
        os.kill(os.getpid(), signal.SIGHUP)
        await becomes(web, bob, 200)


def test_the_file_of_the_keys_is_the_settings_file_unless_they_come_from_elsewhere(file, command, tmp_path):
    command("add", "alice")
    one = file.read_text()

    def named(environ: dict[str, str], **options) -> str:
        from argparse import Namespace

        args = Namespace(config=str(file), **options)
        config = load(options, environ=environ, file=file)
        return with_keys_file(config, args, environ).http_keys_file

    assert named({}) == str(file)
    assert named({"HEADRACE_HTTP_KEYS": "[]"}) == ""
    assert named({"HEADRACE_HTTP_KEYS_FILE": "other.toml"}) == "other.toml"
    file.write_text("slots = 1\n")
    assert named({}) == str(file)
    file.write_text(one + "nonsense = 1\n")
    with pytest.raises(ConfigError):
        named({})
