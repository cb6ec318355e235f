"""`headrace models`: list the stored models, and remove one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pipeline.commands import say

_MB = 1e6


class Listed(Protocol):
    """A stored model: its name, where it came from, its size and its folder."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def origin(self) -> str:
        """Where it came from."""

    @property
    def bytes(self) -> int:
        """Its size."""


def show_list(models: Iterable[Listed], root: Path) -> int:
    """Print the stored models, one in each line. Return 0."""
    rows = [(model.name, f"{model.bytes / _MB:,.0f} MB", model.origin) for model in models]
    if not rows:
        say(f"No models are stored in {root}. `headrace pull smollm2` fetches one.")
        return 0
    name_width, size_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, size, origin in rows:
        say(f"{name:<{name_width}}  {size:>{size_width}}  {origin}")
    return 0


def removed(name: str, freed: int) -> int:
    """Print that a model was removed and how many bytes that freed. Return 0."""
    say(f"Removed {name} ({freed / _MB:,.0f} MB).")
    return 0
