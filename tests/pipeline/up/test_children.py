from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from pipeline.process.lifecycle import Report
from pipeline.up.children import Kept, LaunchError, Process, keep_bounded, last_line, open_log, spawn
from tests.waiting import eventually

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 60.0
ROLE = """
import os, sys
from pipeline.config import load
from pipeline.process.lifecycle import run, without_private

async def main(config, lifecycle):
    lifecycle.report("ready", pid=os.getpid())
    {body}

sys.exit(run(main, load(environ=without_private(os.environ)), "role"))
"""
DRAINS = "await lifecycle.stopping.wait()"
STUCK = "import time; time.sleep(3600)"
DIES = "os._exit(7)"


class Watched:
    """A kept process and all that it reported."""

    def __init__(self, launch: Callable[[], object]) -> None:
        self.reports: asyncio.Queue[Report] = asyncio.Queue()
        self.deaths: asyncio.Queue[str] = asyncio.Queue()
        self.kept = Kept(
            "role",
            launch,
            lambda _, report: self.reports.put_nowait(report),
            lambda _, how: self.deaths.put_nowait(how),
        )
        self.task = asyncio.create_task(self.kept.run())

    async def until(self, state: str) -> Report:
        async with asyncio.timeout(TIMEOUT_S):
            while (report := await self.reports.get()).state != state:
                pass
        return report

    async def death(self) -> str:
        return await asyncio.wait_for(self.deaths.get(), TIMEOUT_S)

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, TIMEOUT_S)


@pytest.fixture
async def keep(tmp_path: Path) -> AsyncIterator[Callable[[str], Watched]]:
    watched: list[Watched] = []

    def start(body: str) -> Watched:
        async def launch() -> Process:
            return await spawn([sys.executable, "-c", ROLE.format(body=body)], os.environ, tmp_path / "role.log")

        watched.append(Watched(launch))
        return watched[-1]

    yield start
    for each in watched:
        each.kept.kill()
        await each.ended()


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_process_is_started_again(keep):
    role = keep(DRAINS)
    first = await role.until("ready")
    os.kill(first.facts["pid"], signal.SIGKILL)
    assert "killed by SIGKILL" in await role.death()
    second = await role.until("ready")
    assert second.facts["pid"] != first.facts["pid"]
    assert role.kept.restarts == 1


async def test_a_process_that_keeps_dying_is_started_again_and_again(keep):
    role = keep(DIES)
    for _ in range(3):
        assert "ended with code 7" in await role.death()


async def test_a_restarted_process_says_why_and_comes_back(keep):
    role = keep(DRAINS)
    first = await role.until("ready")
    restarting = asyncio.create_task(role.kept.restart("the disk was full."))
    assert await role.death() == "the disk was full; restarting in 0.2 s"
    assert (await role.until("ready")).facts["pid"] != first.facts["pid"]
    await restarting
    assert role.kept.pid is not None


async def test_draining_ends_it_and_it_stays_ended(keep):
    role = keep(DRAINS)
    await role.until("ready")
    await role.kept.stop(drain_s=TIMEOUT_S)
    await role.ended()
    assert role.kept.restarts == 0
    assert role.kept.pid is None


async def test_one_that_does_not_drain_is_killed(keep):
    role = keep(STUCK)
    pid = (await role.until("ready")).facts["pid"]
    await role.kept.stop(drain_s=0.1)
    await role.ended()
    assert not lives(pid)


async def test_stopping_twice_and_before_the_start_is_harmless(keep):
    role = keep(DRAINS)
    await role.kept.stop(drain_s=1)
    await role.kept.stop(drain_s=1)
    await role.ended()


async def test_stopping_while_it_is_launched_ends_the_launch():
    launching = asyncio.Event()

    async def launch() -> Process:
        launching.set()
        await asyncio.Event().wait()
        raise AssertionError

    role = Watched(launch)
    await launching.wait()
    await role.kept.stop(drain_s=TIMEOUT_S)
    await role.ended()
    assert role.deaths.empty()


async def test_cancelling_kills_it(keep):
    role = keep(DRAINS)
    pid = (await role.until("ready")).facts["pid"]
    role.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await role.ended()
    assert not lives(pid)
    role.task = asyncio.create_task(asyncio.sleep(0))


async def test_what_it_has_started_ends_with_it(keep, tmp_path):
    pid_file = tmp_path / "pid"
    role = keep(
        "import subprocess; "
        f"open({str(pid_file)!r}, 'w').write(str(subprocess.Popen(['sleep', '3600']).pid)); "
        "lifecycle.report('ready'); os.abort()"
    )
    await role.death()
    role.kept.kill()
    pid = int(pid_file.read_text())
    await until(lambda: not lives(pid) or _is_zombie(pid))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - a process that is not a child does not tell when it ends
            await asyncio.sleep(0.01)


def _is_zombie(pid: int) -> bool:
    """Killed, but not collected: the init process of a container can omit it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return False


async def test_a_program_that_cannot_be_started_counts_as_a_death(tmp_path):
    async def launch() -> Process:
        return await spawn(["/nowhere/program"], os.environ, tmp_path / "log")

    role = Watched(launch)
    assert "/nowhere/program" in await role.death()
    await role.kept.stop(drain_s=1)
    await role.ended()


async def test_a_log_in_no_folder_of_ours_is_an_error_of_the_launch(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError):
        await spawn([sys.executable, "-V"], os.environ, tmp_path / "file" / "log")


async def test_the_pause_doubles_up_to_ten_seconds_and_is_short_again_after_half_a_minute():
    kept = Kept("role", asyncio.Future, lambda *_: None, lambda *_: None)
    assert [kept.died(lived_s=0) for _ in range(8)] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert kept.died(lived_s=30) == 0.2
    assert kept.died(lived_s=29.9) == 0.4
    assert kept.restarts == 10


async def test_a_stop_ends_the_pause_before_a_restart(monkeypatch):
    monkeypatch.setattr("pipeline.up.children._FIRST_PAUSE_S", 3600)
    monkeypatch.setattr("pipeline.up.children._MOST_PAUSE_S", 3600)

    async def launch() -> Process:
        raise LaunchError("It does not start.")

    role = Watched(launch)
    assert await role.death() == "It does not start; restarting in 3600.0 s"
    await role.kept.stop(drain_s=1)
    await role.ended()


async def test_a_listener_that_fails_is_logged_and_the_process_still_ends(tmp_path, caplog):
    process = await spawn([sys.executable, "-c", ROLE.format(body="pass")], os.environ, tmp_path / "role.log")

    def on_report(report: Report) -> None:
        raise RuntimeError(report.state)

    assert await asyncio.wait_for(process.wait(on_report), TIMEOUT_S) == 0
    assert f"listening to process {process.pid} failed" in caplog.text


async def test_a_report_that_cannot_be_read_ends_the_contact_and_not_the_process(tmp_path, caplog):
    command = "import os; os.write(int(os.environ['HEADRACE_REPORT_FD']), b'nonsense\\n')"
    process = await spawn([sys.executable, "-c", command], os.environ, tmp_path / "role.log")
    assert await asyncio.wait_for(process.wait(lambda _: None), TIMEOUT_S) == 0
    assert f"Lost contact with process {process.pid}" in caplog.text


async def test_a_process_that_ends_without_reading_its_order_loses_no_contact(tmp_path, caplog):
    tells = """import os, time; os.write(int(os.environ["HEADRACE_REPORT_FD"]), b'{"state": "ready"}\\n')"""
    command = f"{tells}; time.sleep(3600)"
    process = await spawn([sys.executable, "-c", command], os.environ, tmp_path / "role.log")
    reports = list[Report]()

    def on_report(report: Report) -> None:
        reports.append(report)
        process.drain(1)  # which also ends it

    assert await asyncio.wait_for(process.wait(on_report), TIMEOUT_S) == -signal.SIGTERM
    assert [report.state for report in reports] == ["ready"]
    assert "Lost contact" not in caplog.text


def test_a_log_that_has_grown_too_large_is_put_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.up.children.LOG_MAX_BYTES", 3)
    log = tmp_path / "x.log"
    for text in (b"1234", b"5"):
        with open_log(log) as file:
            file.write(text)
    assert (log.read_bytes(), (tmp_path / "x.old.log").read_bytes()) == (b"5", b"1234")


async def test_a_log_is_bounded_while_a_process_writes_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.up.children.LOG_MAX_BYTES", 3)
    log, old = tmp_path / "x.log", tmp_path / "x.old.log"
    (tmp_path / "z.old.log").write_bytes(b"12345")
    with open_log(log) as file:
        file.write(b"1234")
        file.flush()
        bounding = asyncio.create_task(keep_bounded(tmp_path, every_s=0.01))
        await eventually(lambda: old.exists() and log.stat().st_size == 0)
        bounding.cancel()
        await asyncio.wait([bounding])
        file.write(b"5")
    assert (log.read_bytes(), old.read_bytes()) == (b"5", b"1234")
    assert not (tmp_path / "z.old.old.log").exists()


def test_the_last_line_of_a_log_is_found_or_empty(tmp_path):
    (tmp_path / "log").write_text("a\nb\n\n")
    assert last_line(tmp_path / "log") == "b"
    assert last_line(tmp_path / "none") == ""
