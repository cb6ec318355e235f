"""Python runs this at its start in a process that has this folder in `PYTHONPATH`: mlx-lm finds the scripted model."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

_NAME = "mlx_lm.models.scripted"


class Finder(MetaPathFinder):
    def find_spec(self, fullname: str, _path: Any = None, _target: Any = None) -> Any:
        return spec_from_file_location(_NAME, Path(__file__).with_name("model.py")) if fullname == _NAME else None


sys.meta_path.append(Finder())
