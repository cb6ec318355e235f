"""Commands that run modules of this program in another Python process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_IMPORT_ROOT = Path(__file__).resolve().parent.parent.parent


def module_command(module: str) -> tuple[str, ...]:
    """The command that runs a module. `-P`: modules are not searched in the current folder, which is the user's."""
    return (sys.executable, "-P", "-m", module)


def with_import_root(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which such a command finds the modules of this process, installed or not."""
    search = [str(_IMPORT_ROOT), environ.get("PYTHONPATH", "")]
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
