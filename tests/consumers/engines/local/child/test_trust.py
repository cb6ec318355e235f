"""Code that comes with a model runs only if the settings trust it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from consumers.models.names import located
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import read, until, until_ready
from tests.consumers.engines.processes import engine_of

pytest.importorskip("mlx_lm", reason="MLX is not installed")

_ARCHITECTURE = """
from pathlib import Path
from mlx_lm.models.llama import Model, ModelArgs
Path(__file__).with_name("ran").touch()
"""

_TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def model(folder: Path, file: str, changes: dict, code: str, name: str) -> Path:
    """A copy of the demo model with changes in one of its files, and with code."""
    shutil.copytree(located("demo"), folder)
    known = json.loads((folder / file).read_text())
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(known | changes))
    (folder / name).write_text(code)
    return folder


@pytest.fixture(params=["architecture", "tokenizer"])
def with_code(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    if request.param == "architecture":
        return model(folder, "config.json", {"model_file": "own.py"}, _ARCHITECTURE, "own.py")
    changes = {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    code = _TOKENIZER.format(marker=str(folder / "ran"))
    return model(folder, "tokenizer_config.json", changes, code, "own.py")


async def test_a_model_with_code_is_refused_and_its_code_does_not_run(with_code):
    async with engine_of(Config(engine="mlx", model=str(with_code))) as engine:
        refused = await engine.load_failed()
        await until(engine, lambda: engine.status().state == "down")
    assert f"The model {with_code} runs Python code that comes with it." in refused
    assert "--trust-remote-code" in refused
    assert not (with_code / "ran").exists()


async def test_a_model_with_code_that_is_trusted_answers(with_code):
    async with engine_of(Config(engine="mlx", model=str(with_code), trust_remote_code=True)) as engine:
        await until_ready(engine)
        request = ChatRequest(prompt="What is 3 + 4?", max_tokens=8, temperature=0)
        answer = await read(await engine.submit(Work("r", request, "", seed=1)))
    assert answer.text
    assert (with_code / "ran").exists()
