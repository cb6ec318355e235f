"""Prompts whose caches are stored in files: they outlive the process, and a file that is lost costs no answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.engines.local.child import prompt_files
from consumers.engines.local.child.prompt_files import PromptFiles
from consumers.engines.local.child.storing import StoredCaches
from pipeline.core.batch_plan import StoreKept
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import ask, until
from tests.waiting import eventually

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROMPT = ChatRequest(prompt="Repeat after me: river, mill, bridge, stone, sea. " * 12, max_tokens=4, temperature=0)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    """The user's cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def files_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("**/prompts/*/[0-9]*.safetensors"))


async def cached(engine, **more) -> tuple[list[int], int]:
    answer = await ask(engine, PROMPT, **more)
    return answer.token_ids, answer.usage.prompt_tokens_details.cached_tokens


async def killed(engine) -> None:
    os.kill(engine.child_pid, signal.SIGKILL)
    await until(engine, lambda: engine.status().state != "ready")
    await until(engine, lambda: engine.status().state == "ready")


async def test_a_new_process_goes_on_from_what_the_one_before_has_stored(start, cache):
    async with start("mlx", prompt_disk_bytes=1 << 30, blas="none") as engine:
        tokens, at_first = await cached(engine)
        await eventually(lambda: len(files_of(cache)) >= 2, what="it is stored")
        await killed(engine)
        again, taken_over = await cached(engine)
        assert (at_first, taken_over % 64) == (0, 0)
        assert taken_over >= 128
        assert again == tokens
        assert engine.status().stored_bytes >= sum(file.stat().st_size for file in files_of(cache)[:2])
        _, of_another = await cached(engine, tenant="bob")
        assert of_another == 0
    assert all(file.parent.stat().st_mode & 0o77 == 0 for file in files_of(cache))


async def test_files_that_are_gone_or_broken_cost_no_answer(start, cache):
    async with start("mlx", prompt_disk_bytes=1 << 30, blas="none") as engine:
        tokens, _ = await cached(engine)
        await eventually(lambda: len(files_of(cache)) >= 2, what="it is stored")
        await killed(engine)
        files_of(cache)[0].write_bytes(b"no cache at all")
        again, taken_over = await cached(engine)
        assert (again, taken_over) == (tokens, 0)
        assert engine.status().stored_bytes == 0
        assert files_of(cache) == []  # those that were fetched with it
        await killed(engine)
        await cached(engine)
        await eventually(lambda: len(files_of(cache)) >= 2, what="it is stored again")
        await killed(engine)
        for file in files_of(cache):
            file.unlink()
        again, taken_over = await cached(engine)
        assert (again, taken_over) == (tokens, 0)


async def test_nothing_is_stored_by_default(start, cache):
    async with start("mlx", blas="none") as engine:
        await cached(engine)
    assert not list(cache.glob("**/prompts"))


# ---- the files -------------------------------------------------------------------------------------------------------

# Writes three files and reads one of them, then tries to write where a folder is in the way. In a process of its own:
# other tests end MLX in theirs.
_WRITTEN_AND_READ = """
import json, os, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.models.cache import KVCache
from consumers.engines.local.child.prompt_files import PromptFiles
folder = Path(sys.argv[1])
files, layer, names = PromptFiles(folder), KVCache(), ("64-a", "64-b", "64-c")
layer.update_and_fetch(mx.arange(128.0).reshape(1, 1, 64, 2), mx.ones((1, 1, 64, 2)))
sizes = [files.write(name, [layer]) for name in names]
for at, name in enumerate(names, 1):
    os.utime(folder / f"{name}.safetensors", (at, at))
(again,) = files.read("64-a")
keys = again.keys[..., :64, :].flatten().tolist()
(folder / "unfinished.safetensors").mkdir()
try:
    files.write("64-d", [layer])
except OSError as error:
    print(json.dumps([sizes, keys, [name for name, _ in files.names()], str(error)]))
mx.clear_streams()
"""


def touch(folder: Path, name: str, nbytes: int = 10) -> None:
    (folder / f"{name}.safetensors").write_bytes(bytes(nbytes))


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def folder_of(cache):
    """The only folder of files."""

    def found() -> Path:
        (folder,) = cache.glob("headrace/prompts/*")
        return folder

    return found


def test_files_keep_their_contents_and_their_order_of_use(tmp_path):
    done = subprocess.run([sys.executable, "-c", _WRITTEN_AND_READ, str(tmp_path)], capture_output=True, check=True)
    sizes, keys, names, refused = json.loads(done.stdout)
    assert sizes == [(tmp_path / f"64-{name}.safetensors").stat().st_size for name in "abc"]
    assert keys == list(map(float, range(128)))
    assert names == ["64-b", "64-c", "64-a"]
    assert "unfinished" in refused


def test_files_that_are_removed_are_gone(tmp_path):
    files = PromptFiles(tmp_path)
    touch(tmp_path, "64-a")
    touch(tmp_path, "64-b")
    files.remove(["64-b", "unknown"])
    assert [files.has(name) for name in ("64-a", "64-b")] == [True, False]


def test_what_was_not_finished_is_no_file(model, folder_of):
    files = PromptFiles.open(model, "one")
    touch(folder_of(), "64-a")
    touch(folder_of(), "unfinished")
    assert files.names() == [("64-a", 10)]


def test_only_one_process_uses_the_files_of_a_model(model, caplog):
    files = PromptFiles.open(model, "one")
    assert files is not None
    assert PromptFiles.open(model, "one") is None
    assert "Another process stores the prompts of this model" in caplog.text
    lines = [
        "import sys",
        "from pathlib import Path",
        "from consumers.engines.local.child.prompt_files import PromptFiles",
        "files = PromptFiles.open(Path(sys.argv[1]), sys.argv[2])",
        "print(files and files.names())",
    ]
    opened = [sys.executable, "-c", "\n".join(lines), str(model)]
    assert subprocess.run([*opened, "one"], capture_output=True, text=True, check=True).stdout == "None\n"


def test_another_identity_removes_the_files(model, folder_of, monkeypatch):
    monkeypatch.setattr(prompt_files, "_take", lambda _: None)
    PromptFiles.open(model, "one")
    touch(folder_of(), "64-a")
    assert PromptFiles.open(model, "one").has("64-a")
    assert PromptFiles.open(model, "two").names() == []


@pytest.mark.parametrize("damaged", [b"", b"\x00" * 64, b"\xff\xfe"])
def test_a_damaged_identity_removes_the_files(model, folder_of, monkeypatch, damaged):
    monkeypatch.setattr(prompt_files, "_take", lambda _: None)
    PromptFiles.open(model, "one")
    touch(folder_of(), "64-a")
    (folder_of() / "identity").write_bytes(damaged)
    assert PromptFiles.open(model, "one").names() == []
    touch(folder_of(), "64-b")
    assert PromptFiles.open(model, "one").has("64-b")


def test_a_damaged_identity_of_another_model_is_passed_over(tmp_path, model, folder_of, cache):
    PromptFiles.open(model, "one")
    (folder_of() / "identity").write_bytes(b"\xff\xfe")
    other = tmp_path / "other"
    other.mkdir()
    assert PromptFiles.open(other, "one") is not None


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
def test_the_folder_of_a_model_need_not_be_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_take", lambda _: None)
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le"))
    model.mkdir()
    files = PromptFiles.open(model, "one")
    assert files is not None
    touch(files._folder, "64-a")
    assert PromptFiles.open(model, "one").names() == [("64-a", 10)]


def test_the_files_of_a_model_that_is_gone_are_removed(tmp_path, model, folder_of, cache):
    PromptFiles.open(model, "one")
    touch(folder_of(), "64-a")
    model.rename(tmp_path / "moved")
    PromptFiles.open(tmp_path / "moved", "one")
    touch(folder_of(), "64-b")
    assert [file.name for file in files_of(cache)] == ["64-b.safetensors"]


def test_a_folder_that_cannot_be_made_stores_nothing(model, monkeypatch, tmp_path, caplog):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert PromptFiles.open(model, "one") is None
    assert "Prompts cannot be stored in" in caplog.text


def test_no_file_is_written_where_the_broker_may_need_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "_LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(OSError, match="MiB of the disk are free"):
        PromptFiles(tmp_path).write("64-a", [])
    assert list(tmp_path.iterdir()) == []


# ---- what the loop does ----------------------------------------------------------------------------------------------


class FullDisk:
    """A batch that cannot write."""

    def store(self, _):
        raise OSError("no space left on device")


def test_after_a_file_that_could_not_be_written_there_is_a_pause(tmp_path, caplog):
    stored = StoredCaches(PromptFiles(tmp_path), 1 << 30, snapshots=False)
    stored.index.kept("", list(range(64)))
    assert stored.writes(100.0)
    stored.write(FullDisk(), StoreKept(stored.index.next(), []), 100.0)
    assert "no space left on device. The next one is tried in a minute." in caplog.text
    assert [stored.writes(now) for now in (159.0, 160.0)] == [False, True]
    assert stored.index.next(), "it is tried again"


def test_files_beyond_the_room_are_removed_at_the_start(tmp_path):
    files = PromptFiles(tmp_path)
    touch(tmp_path, "64-a")
    touch(tmp_path, "64-b")
    os.utime(tmp_path / "64-b.safetensors", (1, 1))
    assert len(StoredCaches(files, 10, snapshots=False).index) == 1
    assert [name for name, _ in files.names()] == ["64-a"]


def test_without_files_nothing_is_stored():
    stored = StoredCaches(None, 1 << 30, snapshots=False)
    stored.index.kept("", list(range(64)))
    assert not stored.writes(0.0)
    assert stored.index.next() is None
