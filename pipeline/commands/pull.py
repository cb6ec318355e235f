"""`headrace pull`: fetch a model into the store, with a bar."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipeline.commands import say
from pipeline.process.lifecycle import Report
from pipeline.up.bar import FetchBar

Pull = Callable[[Callable[[Report], None]], str]
"""Fetches the model, calls its argument with the progress, and returns the name to use."""


def pull(fetch: Pull) -> int:
    """Fetch a model and print its name. Return 0; what fetch raises is not caught here."""
    from rich.console import Console  # noqa: PLC0415 - only needed to print

    bar = FetchBar(Console(file=sys.stderr, highlight=False, soft_wrap=True), "model")
    try:
        name = fetch(bar.update)
    finally:
        bar.close()
    say(f"{name} is stored. Use it with --model {name}.")
    return 0
