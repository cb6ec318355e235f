"""The process in which `headrace up` gets its model: `python -m consumers.models`.

The settings are in the environment. The last report is `ready`, with the model as facts, or `down` with the reason.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from consumers.models.obtain import GettingStopped, obtain
from consumers.models.store import ModelError
from pipeline.config import Config, ConfigError, load
from pipeline.process.lifecycle import Lifecycle, run, without_private

_REPORT_EVERY_S: Final = 0.2


async def _main(config: Config, lifecycle: Lifecycle) -> None:
    try:
        model = await obtain(config, lifecycle, every_s=_REPORT_EVERY_S)
    except GettingStopped:
        return
    except ModelError as error:
        lifecycle.report("down", str(error))
        return
    lifecycle.report("ready", model.name, gguf=str(model.gguf) if model.gguf is not None else "")


def main() -> int:
    """Get the model and return the exit code: 0 even if there is none, because the reports say so."""
    try:
        config = load(environ=without_private(os.environ))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return run(_main, config, "models")


if __name__ == "__main__":
    sys.exit(main())
