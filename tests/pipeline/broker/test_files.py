"""Files in the object store, and what is left of an upload that was broken off."""

from __future__ import annotations

import io

import pytest

from pipeline.broker.files import Files, FileTraits
from pipeline.broker.jetstream import Bus
from pipeline.wire.batches import chunks_subject
from pipeline.wire.subjects import BUCKET_FILES, STREAM_FILES

BROKEN = chunks_subject("broken")


@pytest.fixture
async def files(bus: Bus) -> Files:
    """The store holds one file, and two chunks of an upload that was broken off."""
    files = Files(bus)
    await files.put("file-1", io.BytesIO(b"x" * 300_000), FileTraits("in.jsonl", "batch", 1))
    for _ in range(2):
        await bus.store(BROKEN, b"chunk")
    return files


async def test_what_an_upload_that_was_broken_off_has_left_is_removed_and_files_stay(files: Files, bus: Bus):
    before = await bus.subjects(STREAM_FILES, ">")
    assert await files.remove_unfinished(0.0) == 1
    assert await bus.subjects(STREAM_FILES, ">") == {name: n for name, n in before.items() if name != BROKEN}
    (file,) = [file async for file in files.everything()]
    assert b"".join([piece async for piece in files.read(file)]) == b"x" * 300_000
    assert await files.remove_unfinished(0.0) == 0


async def test_an_upload_that_may_go_on_is_left_alone(files: Files, bus: Bus):
    assert await files.remove_unfinished(60.0) == 0
    assert (await bus.subjects(STREAM_FILES, BROKEN))[BROKEN] == 2


async def test_what_another_program_has_put_into_the_bucket_is_no_file_and_stays(files: Files, bus: Bus):
    await (await bus.js.object_store(BUCKET_FILES)).put("theirs", b"x")
    await bus.store("$O.LLM_FILES.M.garbage", b"no note")
    await bus.store("$O.LLM_FILES.M.latin", '{"name": "é"}'.encode("latin-1"))
    assert [file.shown.id async for file in files.everything()] == ["file-1"]
    assert await files.find("theirs") is None
    assert await files.remove_unfinished(0.0) == 1
    assert (await (await bus.js.object_store(BUCKET_FILES)).get("theirs")).data == b"x"
