"""`make house` finds what is out of order in a tree, and only that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FLOORS = """
[tool.importlinter]
root_packages = ["pipeline", "consumers"]
[[tool.importlinter.contracts]]
name = "Floors"
type = "layers"
layers = ["consumers.role | pipeline.gateway", "pipeline.core", "pipeline.words"]
"""
IN_ORDER = {
    "consumers/role.py": "from pipeline.core.one import One",
    "pipeline/gateway.py": "from pipeline.words import Word",
    "pipeline/core/__init__.py": "",
    "pipeline/core/one.py": "from pipeline.words import Word\nclass One: ...",
    "pipeline/core/two.py": "from pipeline.core.one import One\nclass Two: ...",
    "pipeline/words.py": "class Word: ...",
}
OUT_OF_ORDER = {
    "an import that runs up": (
        {"pipeline/words.py": "from pipeline.core.two import Two\nclass Word: ..."},
        "pipeline.words imports pipeline.core.two, which is above it or beside it",
    ),
    "an import inside a function": (
        {"pipeline/words.py": "class Word:\n    def two(self):\n        import pipeline.core.two"},
        "pipeline.words imports pipeline.core.two, which is above it or beside it",
    ),
    "an import along a floor": (
        {"consumers/role.py": "import pipeline.gateway"},
        "consumers.role imports pipeline.gateway, which is above it or beside it",
    ),
    "a circle inside a room": (
        {"pipeline/core/one.py": "from pipeline.core.two import Two\nclass One: ..."},
        "circle: pipeline.core.one, pipeline.core.two",
    ),
    "a circle of two folders": (
        {
            "pipeline/core/a/__init__.py": "",
            "pipeline/core/a/x.py": "import pipeline.core.b.x",
            "pipeline/core/a/y.py": "",
            "pipeline/core/b/__init__.py": "",
            "pipeline/core/b/x.py": "",
            "pipeline/core/b/y.py": "import pipeline.core.a.y",
        },
        "circle: pipeline.core.a, pipeline.core.b",
    ),
    "a room on no floor": (
        {"pipeline/attic.py": ""},
        "pipeline.attic is on no floor: add it to the layers contract in pyproject.toml",
    ),
    "a class name with two owners": (
        {"pipeline/core/two.py": "class Two:\n    class Word: ..."},
        "class Word is defined in pipeline.core.two, pipeline.words",
    ),
}


def house(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in {
        "pyproject.toml": FLOORS,
        "consumers/__init__.py": "",
        "pipeline/__init__.py": "",
        **files,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-m", "bench.house", "--root", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_a_tree_in_order_has_no_fault(tmp_path: Path):
    done = house(tmp_path, IN_ORDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pipeline.gateway" in done.stdout


@pytest.mark.parametrize("case", OUT_OF_ORDER)
def test_each_fault_is_named(case: str, tmp_path: Path):
    files, fault = OUT_OF_ORDER[case]
    done = house(tmp_path, {**IN_ORDER, **files})
    assert done.returncode == 1, done.stderr
    assert fault in done.stdout.splitlines()


def test_a_commit_is_measured_beside_this_tree(tmp_path: Path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [sys.executable, "-m", "bench.house", "--rev", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[0].split() == ["HEAD", "this", "tree"], done.stderr
