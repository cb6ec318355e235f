"""GGUF files from an address: whole, resumed, begun again."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers.models.getting import get, pull
from consumers.models.store import ModelError, Store
from consumers.models.watched import Headway
from consumers.models.web import download
from tests.consumers.models.conftest import Site
from tests.consumers.models.ggufs import written
from tests.disks import small_disk


class GivenUpError(Exception):
    """What a note raises to end the download."""


def ignore(_: Headway) -> None:
    pass


def give_up_with_bytes(step: Headway) -> None:
    if step.done:
        raise GivenUpError


@pytest.fixture
def files(tmp_path: Path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "big.gguf").write_bytes(bytes(range(256)) * 8192)
    with Site(tmp_path / "files") as site:
        yield site


def interrupted(files: Site, target: Path) -> int:
    files.gate.clear()
    with pytest.raises(GivenUpError):
        download(f"{files.url}/big.gguf", target, give_up_with_bytes)
    files.gate.set()
    assert not target.exists()
    return target.with_name("model.gguf.part").stat().st_size


@pytest.mark.parametrize("lengths", [True, False])
def test_an_interrupted_download_is_resumed(files: Site, tmp_path: Path, lengths: bool):
    files.lengths = lengths
    target = tmp_path / "model.gguf"
    have = interrupted(files, target)
    assert have > 0
    download(f"{files.url}/big.gguf", target, ignore)
    assert target.read_bytes() == (files.folder / "big.gguf").read_bytes()
    assert files.asked[-1] == ("/big.gguf", f"bytes={have}-")
    assert [file.name for file in tmp_path.glob("model*")] == ["model.gguf"]


def test_a_download_that_stopped_after_the_last_byte_is_not_fetched_again(files: Site, tmp_path: Path):
    target, content = tmp_path / "model.gguf", (files.folder / "big.gguf").read_bytes()
    target.with_name("model.gguf.part").write_bytes(content)
    target.with_name("model.gguf.part.tag").write_text(files.tag)
    download(f"{files.url}/big.gguf", target, ignore)
    assert target.read_bytes() == content
    assert files.asked == [("/big.gguf", f"bytes={len(content)}-")]
    assert [file.name for file in tmp_path.glob("model*")] == ["model.gguf"]


def test_a_part_that_is_longer_than_the_file_is_fetched_anew(files: Site, tmp_path: Path):
    target, content = tmp_path / "model.gguf", (files.folder / "big.gguf").read_bytes()
    target.with_name("model.gguf.part").write_bytes(content)
    target.with_name("model.gguf.part.tag").write_text(files.tag)
    (files.folder / "big.gguf").write_bytes(content[:-1])
    with pytest.raises(ModelError, match="does not fit what is there"):
        download(f"{files.url}/big.gguf", target, ignore)
    download(f"{files.url}/big.gguf", target, ignore)
    assert target.read_bytes() == content[:-1]


def test_a_file_that_has_changed_is_fetched_anew(files: Site, tmp_path: Path):
    target = tmp_path / "model.gguf"
    interrupted(files, target)
    (files.folder / "big.gguf").write_bytes(b"another" * 9999)
    files.tag = '"two"'
    download(f"{files.url}/big.gguf", target, ignore)
    assert target.read_bytes() == b"another" * 9999


def test_a_server_without_the_file_is_named(files: Site, tmp_path: Path):
    with pytest.raises(ModelError, match=r"Cannot download http://.*/none.gguf: .*404"):
        download(f"{files.url}/none.gguf", tmp_path / "model.gguf", ignore)
    with pytest.raises(ModelError, match=r"Cannot download http://127.0.0.1:9/x.gguf"):
        download("http://127.0.0.1:9/x.gguf", tmp_path / "model.gguf", ignore)


def test_a_model_is_pulled_by_its_address(files: Site, tmp_path: Path):
    written(files.folder / "qwen.gguf", "qwen2")
    store = Store(str(tmp_path / "store"))
    model = pull(f"{files.url}/qwen.gguf?download=true", store, ignore)
    assert get("qwen", store, ignore) == model
    (listed,) = store.models()
    assert listed.origin.startswith(files.url)


def test_a_download_that_the_disk_has_no_room_for_is_not_begun(files: Site, tmp_path: Path):
    needed = 2 * (files.folder / "big.gguf").stat().st_size  # it is converted
    with small_disk(tmp_path / "disk", "24m") as disk:
        target = disk.folder / "model.gguf"
        disk.fill(but=needed - (1 << 16))
        with pytest.raises(ModelError, match=r"The model takes about 4 MB, and 4 MB are free at .*--models-dir"):
            download(f"{files.url}/big.gguf", target, ignore)
        assert not target.with_name("model.gguf.part").exists()
        disk.empty()
        download(f"{files.url}/big.gguf", target, ignore)


def test_an_address_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="is not the address of a GGUF file"):
        pull("https://host/page.html", Store(str(tmp_path)), ignore)


def test_a_server_that_is_not_there_is_told_without_a_number_of_an_error(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        download("http://127.0.0.1:9/x.gguf", tmp_path / "x.gguf", lambda _: None)
    assert str(caught.value) == "Cannot download http://127.0.0.1:9/x.gguf: Connection refused."
