"""The process in which `headrace up` gets its models: `python -m consumers.models`.

The settings are in the environment. The last report is `ready`, with the default model and the names of all as facts,
or `down` with the reason.
"""

from __future__ import annotations

from pipeline.process.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # before the other imports, which take most of the time of a start

import os
import sys
from typing import Final

from consumers.models.obtain import GettingStopped, obtain
from consumers.models.several import config_of, wanted_models
from consumers.models.store import ModelError
from pipeline.config import Config, ConfigError, load
from pipeline.process.lifecycle import Lifecycle, run, without_private

_REPORT_EVERY_S: Final = 0.2


async def _main(config: Config, lifecycle: Lifecycle) -> None:
    try:
        wanted = wanted_models(config)
        models = [await obtain(config_of(each, config), lifecycle, every_s=_REPORT_EVERY_S) for each in wanted]
    except GettingStopped:
        return
    except (ConfigError, ModelError) as error:
        lifecycle.report("down", str(error))
        return
    names, gguf = [each.name for each in wanted], models[0].gguf
    lifecycle.report("ready", names[0], names=names, gguf=str(gguf) if gguf is not None else "")


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
