"""What transformers reads of its own sources. In processes of their own, because each imports it only once."""

from __future__ import annotations

import subprocess
import sys

# How often a folder of models is read after transformers itself, and whether the package says what it would say alone.
READ = """
import sys
from pathlib import Path
import transformers
from transformers.utils import import_utils

read, folders = import_utils.define_import_structure, import_utils.create_import_structure_from_path
{call}
before = folders.cache_info().misses
import transformers.models
again = folders.cache_info().misses - before
alone = read.__wrapped__(str(Path(transformers.__file__).with_name("models") / "__init__.py"))
modules = {{name for each in alone.values() for name in each}}
assert len(modules) > 100
print(again, transformers.models._import_structure == type(transformers.models)("m", "", alone)._import_structure)
"""
ONCE = "from consumers.engines.local.child.importing import read_models_once as once; once(); once()"


def run(call: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", READ.format(call=call)], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.split()


def test_the_package_of_models_says_the_same_without_reading_its_sources_again():
    assert run(ONCE) == ["0", "True"]


def test_without_it_they_are_read_again():
    """Once transformers itself reads them once, `importing` can go."""
    assert int(run("")[0]) > 100
