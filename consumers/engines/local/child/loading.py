"""Loading a model of mlx-lm, with its adapter and its tokenizer, and the draft model beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, NamedTuple

from consumers.engines.local.child import draft, float32
from consumers.engines.local.child.backend import LoadError
from consumers.engines.local.child.draft import Draft
from consumers.engines.local.child.prompts import read_template
from pipeline.config import Config
from pipeline.core.drafting import DraftPolicy

_UNTRUSTED: Final = (
    "The model {} runs Python code that comes with it. If you trust that code, set trust_remote_code "
    "(--trust-remote-code)."
)


class MlxModel(NamedTuple):
    """A model, its tokenizer, the content of its `config.json`, and its folder."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    folder: Path


def loaded_model(config: Config, model_path: str) -> MlxModel:
    """Load the model, with the adapter that is a part of it.

    Raises:
        LoadError: it cannot be loaded.
    """
    template = {"chat_template": read_template(config.chat_template)} if config.chat_template else {}
    return _loaded(config, model_path, _adapter_folder(config.adapter_path), template)


def loaded_draft(config: Config, model: MlxModel, vocabulary: int, *, on_cpu: bool) -> Draft | None:
    """Load the draft model; None if none is set.

    Raises:
        LoadError: it cannot be loaded, or cannot be the draft of the model.
    """
    if not config.draft_model:
        return None
    small = _loaded(config, config.draft_model, None, {})
    if on_cpu and config.float32_weights:
        float32.convert(small.model)
    draft.check(model.model, model.tokenizer, small.model, small.tokenizer)
    return Draft(small.model, vocabulary, DraftPolicy(config.draft_tokens))


def _loaded(config: Config, path: str, adapter: str | None, template: dict[str, str]) -> MlxModel:
    import mlx_lm
    from mlx_lm.utils import hf_repo_to_path

    if Path(path).is_absolute() and not Path(path).is_dir():
        raise LoadError(f"No model folder {path}. Set --model to a folder or a Hugging Face repository.")
    # No progress bars: the standard error of this process is a log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        model, tokenizer, stated = mlx_lm.load(
            path,
            # If transformers is not told whether to trust code, it asks on the terminal.
            {"trust_remote_code": config.trust_remote_code, **template},
            adapter_path=adapter,
            return_config=True,
            trust_remote_code=config.trust_remote_code,
        )
        folder = Path(path) if Path(path).exists() else Path(hf_repo_to_path(path))
    except Exception as error:
        if "trust_remote_code" in str(error) and not config.trust_remote_code:
            raise LoadError(_UNTRUSTED.format(path)) from error
        raise LoadError(f"The model {path} cannot be loaded ({type(error).__name__}: {error}).") from error
    return MlxModel(model, tokenizer, stated, folder)


def _adapter_folder(path: str) -> str | None:
    if not path:
        return None
    if not (folder := Path(path).expanduser()).is_dir():
        raise LoadError(f"There is no folder {folder}. Set adapter_path to the folder of an adapter.")
    return str(folder)
