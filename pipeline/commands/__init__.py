"""The commands that talk to a running pipeline; each is imported when it is called for, so that `send` starts fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any


def say(text: str = "", *, end: str = "\n") -> None:
    """Print the command's result, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def tell(text: str) -> None:
    """Tell the person something beside the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_client(work: Coroutine[Any, Any, int]) -> int:
    """Run a command's coroutine to its exit code. A broker that does not answer is one clear line and code 1."""
    from pipeline.bus import BusError  # noqa: PLC0415 - its import is slow; the caller has paid for it already

    try:
        return asyncio.run(work)
    except BusError as error:
        tell(f"headrace: {error}. Is a pipeline running? `headrace up` starts one, `headrace doctor` looks around.")
        return 1
