"""What the setting `model` names, and the name that the model has in answers.

The setting is the name of the demo model, of a known model or of a stored one, a folder in MLX's format, a GGUF file,
or a repository on the Hugging Face hub (`owner/name`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from consumers.demo_model import MODEL_NAME, PATH
from consumers.models.known import KNOWN

DEMO_NAMES: Final = ("demo", MODEL_NAME)
_GGUF: Final = ".gguf"
# As the hub names repositories: no part begins or ends with a dot or a dash.
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9](?:[\w.-]*\w)?/[A-Za-z0-9](?:[\w.-]*\w)?", re.ASCII)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")


def is_gguf(model: str) -> bool:
    """Whether a model is named as a GGUF file, or by the address of one."""
    return model.partition("?")[0].lower().endswith(_GGUF)


def is_address(model: str) -> bool:
    """Whether a model is named by an `http` or `https` address."""
    return model.lower().startswith(("http://", "https://"))


def is_repository(model: str) -> bool:
    """Whether a text has the form of the name of a repository on the hub."""
    return _REPOSITORY.fullmatch(model) is not None and ".." not in model


def is_fetchable(model: str) -> bool:
    """Whether a model is named as one that comes over the network. A file of this machine is not."""
    if is_address(model):
        return is_gguf(model)
    return model in KNOWN or (is_repository(model) and not is_gguf(model))


def is_folder(model: str) -> bool:
    """Whether a model is named as a folder: one that exists, or any text that starts like a path.

    The second kind is reported as a missing folder and not looked up as a repository. A short name is never a folder;
    `./smollm2` is.
    """
    if model in KNOWN or model in DEMO_NAMES:
        return False
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def located(model: str) -> str:
    """The path or repository to load for the demo model, a folder or a repository. Nothing is looked up."""
    if model in DEMO_NAMES:
        return str(PATH)
    return str(Path(model).expanduser().absolute()) if is_folder(model) else model


def served_name_of(model: str) -> str:
    """The name of the model in answers: a short name, a file's stem, a folder's name, or the repository."""
    if model in DEMO_NAMES:
        return MODEL_NAME
    if is_gguf(model):
        return stem_of(model)
    return Path(located(model)).resolve().name if is_folder(model) else model


def stem_of(model: str) -> str:
    """The name of a GGUF file without its extension. Characters that names do not have become `-`."""
    stem = model.partition("?")[0].rstrip("/").rpartition("/")[2][: -len(_GGUF)]
    return _UNSAFE.sub("-", stem).strip(".-") or "model"
