"""Imports transformers, which mlx_lm needs, in two thirds of the time.

To find its modules, transformers reads 1,600 source files: once for itself when it is imported, and again for its
package `models`. Its cache keeps only 128 of 550 folders, so the second pass takes as long as the first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def read_models_once() -> None:
    """Import transformers, and have its package `models` made from what that has read. Other releases are left alone.

    Raises:
        ImportError: it is not installed.
    """
    # As mlx_lm does: that PyTorch is absent is no news.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import transformers
    from transformers.utils import import_utils

    package = Path(transformers.__file__).with_name("models")
    try:
        read = import_utils.define_import_structure
        if not read.cache_info().currsize:
            return
        # The same call as in transformers, whose result is in the cache.
        found = read(package, prefix="models")
    except (AttributeError, TypeError):
        return
    of_models = {
        backends: {name.removeprefix("models."): names for name, names in modules.items() if name.startswith("models.")}
        for backends, modules in found.items()
    }
    structure = {backends: modules for backends, modules in of_models.items() if modules}

    def known(path: Any, prefix: str | None = None) -> Any:
        return structure if prefix is None and Path(path) == package / "__init__.py" else read(path, prefix)

    import_utils.define_import_structure = known
