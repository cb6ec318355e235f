"""Models that a worker fetches: by a process of their own, which is given up, killed and begun again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from consumers.models.fetcher import StoreFetcher, step_of
from consumers.models.store import Store
from pipeline.config import Config
from pipeline.process.lifecycle import Report
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchStep
from tests.consumers.models.conftest import Site
from tests.consumers.models.ggufs import written
from tests.disks import small_disk
from tests.waiting import eventually

REFUSALS = ["qwen3:0.6b", "gemma3", "a.gguf", "owner/name.gguf", "/etc/model.gguf", "~/x", "../x", "https://host/x", ""]


async def serve(name: str) -> tuple[str, str]:
    return name, ""


class Steps(list[FetchStep]):
    """Keeps the steps that it is called with."""

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(step.status.partition(" ")[0] for step in self))

    def has_bytes(self) -> bool:
        return any(step.digest and step.completed for step in self)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Site]:
    """A web server with the file of a model."""
    (tmp_path / "files").mkdir()
    written(tmp_path / "files" / "tiny.gguf", kind=GGMLQuantizationType.F32)  # more than one block of a download
    with Site(tmp_path / "files") as site:
        yield site


@pytest.fixture
def fetcher(store: Store) -> StoreFetcher:
    return StoreFetcher(Config(models_dir=str(store.root)), serve)


def processes() -> list[int]:
    """The processes that fetch models for this one."""
    command = ["pgrep", "-P", str(os.getpid()), "-f", "consumers.models.pulling"]
    return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()]


async def test_a_model_is_fetched_by_a_process_that_yields_to_the_engine(
    files: Site, store: Store, fetcher: StoreFetcher
):
    files.gate.clear()
    steps, address = Steps(), f"{files.url}/tiny.gguf"
    fetching = asyncio.ensure_future(fetcher.fetch(fetcher.fetchable(address), steps.append))
    (pid,) = await eventually(processes)
    await eventually(steps.has_bytes, what="the first bytes")
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
    files.gate.set()
    assert await fetching == "tiny"
    assert steps.kinds == ["pulling", "converting", "its"]
    assert steps[-1].status == "its name is tiny"
    ends = {step.digest or step.status: step for step in steps if step.total}
    assert [step.completed for step in ends.values()] == [step.total for step in ends.values()]
    assert [stored.name for stored in store.models()] == ["tiny"]


async def test_a_fetch_that_is_given_up_ends_its_process_and_the_next_one_resumes(
    files: Site, store: Store, fetcher: StoreFetcher
):
    files.gate.clear()
    steps, address = Steps(), f"{files.url}/tiny.gguf"
    fetching = asyncio.ensure_future(fetcher.fetch(address, steps.append))
    await eventually(steps.has_bytes, what="the first bytes")
    fetching.cancel()
    await asyncio.wait([fetching])
    assert processes() == []
    assert store.models() == []
    files.gate.set()
    assert await fetcher.fetch(address, steps.append) == "tiny"
    assert [bool(wanted) for _, wanted in files.asked] == [False, True]


async def test_a_process_that_is_killed_is_a_named_error_and_the_next_one_resumes(
    files: Site, store: Store, fetcher: StoreFetcher
):
    files.gate.clear()
    steps, address = Steps(), f"{files.url}/tiny.gguf"
    fetching = asyncio.ensure_future(fetcher.fetch(address, steps.append))
    await eventually(steps.has_bytes, what="the first bytes")
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(HeadraceError, match=r"The process that fetched .*tiny.gguf.* was killed\. Pull again"):
        await fetching
    assert store.models() == []
    files.gate.set()
    assert await fetcher.fetch(address, steps.append) == "tiny"
    assert [bool(wanted) for _, wanted in files.asked] == [False, True]


async def test_what_is_stored_already_is_served_without_a_fetch(files: Site, fetcher: StoreFetcher):
    address = f"{files.url}/tiny.gguf"
    await fetcher.fetch(address, Steps().append)
    asked = len(files.asked)
    steps = Steps()
    assert await fetcher.fetch(address, steps.append) == "tiny"
    assert (steps.kinds, len(files.asked)) == (["pulling", "its"], asked)


async def test_why_a_stored_model_is_not_served_is_the_last_step(files: Site, store: Store):
    async def refuse(name: str) -> tuple[str, str]:
        return "", f"{name} needs more memory."

    steps = Steps()
    fetcher = StoreFetcher(Config(models_dir=str(store.root)), refuse)
    assert await fetcher.fetch(f"{files.url}/tiny.gguf", steps.append) == ""
    assert steps[-1].status == "tiny is stored, and not served: tiny needs more memory."


async def test_a_reason_of_the_store_is_the_error(files: Site, fetcher: StoreFetcher):
    with pytest.raises(HeadraceError, match=r"Cannot download .*/none.gguf: .*404") as caught:
        await fetcher.fetch(f"{files.url}/none.gguf", Steps().append)
    assert caught.value.code is ErrorCode.ENGINE_FAILED


async def test_a_model_that_the_disk_has_no_room_for_is_not_begun(files: Site, tmp_path: Path):
    needed = 2 * (files.folder / "tiny.gguf").stat().st_size
    with small_disk(tmp_path / "disk", "24m") as disk:
        store = Store(str(disk.folder / "store"))
        fetcher, steps = StoreFetcher(Config(models_dir=str(store.root)), serve), Steps()
        store.root.mkdir()
        disk.fill(but=needed - (1 << 16))
        with pytest.raises(HeadraceError, match=r"The model takes about .* MB, and .* MB are free .*--models-dir"):
            await fetcher.fetch(f"{files.url}/tiny.gguf", steps.append)
        assert not steps.has_bytes()
        disk.empty()
        assert await fetcher.fetch(f"{files.url}/tiny.gguf", steps.append) == "tiny"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("smollm2", "smollm2"),
        ("smollm2:latest", "smollm2"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
        ("https://host/a/Qwen.gguf?x=1", "https://host/a/Qwen.gguf?x=1"),
    ],
)
def test_what_comes_over_the_network_is_fetched(name: str, model: str, fetcher: StoreFetcher):
    assert fetcher.fetchable(name) == model


@pytest.mark.parametrize("name", REFUSALS)
def test_a_name_of_ollamas_and_a_file_of_this_machine_are_not(name: str, fetcher: StoreFetcher):
    with pytest.raises(HeadraceError, match=r"MLX's workers cannot fetch model .* They fetch smollm2, rep") as caught:
        fetcher.fetchable(name)
    assert caught.value.code is ErrorCode.MODEL_NOT_FOUND


def test_steps_are_as_ollamas_clients_read_them():
    def step(what: str, done: int, total: int) -> FetchStep:
        return step_of("x", Report("loading", "", {"what": what, "done": done, "total": total}))

    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert step("fetching x", 12, 10) == FetchStep("pulling 2d711642b726", f"sha256:{digest}", 10, 10)
    assert step("fetching x", 12, 0) == FetchStep("fetching x")
    assert step("converting x", 3, 10) == FetchStep("converting x", "", 10, 3)
