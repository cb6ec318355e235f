"""`headrace batch`: a file in, two files out."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from pipeline import cli
from pipeline.broker.files import Files
from pipeline.core.statistics import LaneStatistics, QueueStatistics
from pipeline.wire.messages import StoreReport, encode
from pipeline.wire.subjects import QUEUE_STATS
from tests.consumers.batches.conftest import batches, desk, line, names, player

__all__ = ["batches", "desk", "player"]  # fixtures


@pytest.fixture
def batch(config, capsys):
    """Runs `headrace batch ...` against the test's broker; gives the exit code, stdout and stderr."""

    async def run(*args: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(cli.main, ["batch", *args, "--nats-url", config.nats_url])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def custom_ids(path):
    return sorted(json.loads(row)["custom_id"] for row in path.read_text().splitlines())


async def test_the_results_are_written_beside_the_file(batch, batches, player, tmp_path):
    player.play()
    await batches()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([*map(line, names(5)), line("bad", "fail")]))
    code, out, err = await batch(str(source))
    assert code == 1
    output, errors = tmp_path / "in.output.jsonl", tmp_path / "in.errors.jsonl"
    assert out.splitlines() == [str(output), str(errors)]
    assert (custom_ids(output), custom_ids(errors)) == (names(5), ["bad"])
    assert "5 of 6 lines were answered, 1 failed" in err


async def test_a_running_batch_is_followed_by_its_id(batch, batches, desk, player, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    player.play()
    await batches()
    order = await desk.create(*map(line, names(3)))
    code, out, _ = await batch(order.id)
    assert (code, out) == (0, f"{order.id}.output.jsonl\n")
    assert custom_ids(tmp_path / out.strip()) == names(3)


@pytest.mark.parametrize(("state", "code"), [("full", "queue_full"), ("failed", "unavailable")])
async def test_no_file_is_stored_on_a_full_disk(batch, bus, tmp_path, state, code):
    """What is left of the disk is for accepted requests."""
    lanes = [LaneStatistics() for _ in range(3)]
    report = StoreReport(state, "The disk has 0 MiB. Make room.")

    async def answer(_: str, _body: bytes) -> bytes:
        return encode(QueueStatistics(*lanes, {}, {}, 0, 1.0, store=report))

    await bus.serve("queue", "statistics", {QUEUE_STATS: answer})
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a"))
    assert await batch(str(source)) == (1, "", f"headrace: {code}: The disk has 0 MiB. Make room.\n")
    assert [file async for file in Files(bus).everything()] == []


async def test_the_faults_of_a_file_are_shown(batch, batches, tmp_path):
    await batches()
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a") + b"\n" + line("a"))
    code, out, err = await batch(str(source))
    assert (code, out) == (1, "")
    assert 'line 2: The custom_id "a" was used by an earlier line.' in err


@pytest.mark.parametrize(
    ("content", "args", "said"),
    [
        (None, (), "headrace: Cannot read "),
        (b"nonsense", (), "line 1: This line is not parseable as valid JSON."),
        (b"\n \r\nnonsense", (), "line 3: This line is not parseable as valid JSON."),
        (b"\n\n", (), "in.jsonl: The file has no lines."),
        (line("a"), ("--window", "soon"), "`completion_window` must be a time"),
        (line("a"), ("--endpoint", "/v1/nothing"), "`endpoint` must be one of"),
    ],
)
async def test_what_cannot_run_is_refused(batch, bus, tmp_path, content, args, said):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content)
    code, out, err = await batch(str(source), *args)
    assert (code, out) == (1, "")
    assert said in err


async def test_an_unknown_batch_is_refused(batch, bus):
    assert await batch("batch_nothing") == (1, "", 'headrace: There is no file and no batch "batch_nothing".\n')


async def test_a_batch_begins_with_the_first_line_that_is_not_blank(batch, batches, player, tmp_path):
    player.play()
    await batches()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n  \r\n" + line("a") + b"\n")
    assert (await batch(str(source)))[0] == 0


async def test_results_that_cannot_be_written_are_told_with_their_file(batch, batches, player, tmp_path):
    player.play()
    await batches()
    source = tmp_path / "in.jsonl"
    source.write_bytes(line("a"))
    (tmp_path / "in.output.jsonl").mkdir()
    code, out, err = await batch(str(source))
    assert (code, out) == (1, "")
    assert re.search(r"in\.output\.jsonl: Is a directory\. `headrace batch batch_\w+` writes it again\.", err)
