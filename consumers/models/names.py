"""Where a model is on disk, and the name that it answers to.

The setting `model` is one of three things: `headrace-demo` (the model that comes with headrace), a folder, or a
repository on Hugging Face.
"""

from __future__ import annotations

from pathlib import Path

from consumers.demo_model import MODEL_NAME, PATH


def located(model: str) -> str:
    """The path or repository to load for the setting `model`.

    The demo model and folders become absolute paths. Any other text that starts like a path (`.`, `/` or `~`) does too,
    so that a missing folder is reported as a folder, and not looked up as a repository.
    """
    if model == MODEL_NAME:
        return str(PATH)
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() or model.startswith((".", "/", "~")) else model


def served_name_of(model: str) -> str:
    """The name that the model answers to: the folder's own name, or the repository."""
    location = Path(located(model))
    return location.resolve().name if location.is_absolute() and model != MODEL_NAME else model
