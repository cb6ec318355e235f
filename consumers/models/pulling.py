"""The process in which a worker's models are fetched: `python -m consumers.models.pulling NAME`.

The settings are in the environment. Each line on standard output is a report. The last one is `ready` with the model's
name, or `down` with the reason. The process yields the cores to the engine, and ends when its worker does.
"""

from __future__ import annotations

from pipeline.process.interrupts import end_at_interrupt, raise_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # before the other imports, which take most of the time of a start

import contextlib
import os
import sys
from typing import Final

import msgspec

from consumers.models.obtain import pulled
from consumers.models.store import ModelError
from pipeline.config import load
from pipeline.process.lifecycle import Report, without_private

_NICE: Final = 10


def main() -> int:
    """Fetch the model that the argument names. Returns the exit code: 0 even if there is none."""
    os.nice(_NICE)
    # A pipe whose reader has died raises at the next report, and so does the worker's signal: both end the fetch.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        try:
            raise_at_interrupt()
            _say(Report("ready", pulled(sys.argv[1], load(environ=without_private(os.environ)), _say)))
        except ModelError as error:
            _say(Report("down", str(error)))
    return 0


def _say(report: Report) -> None:
    os.write(sys.__stdout__.fileno(), msgspec.json.encode(report) + b"\n")  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
