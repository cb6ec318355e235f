"""docs/paths.md names files and what is defined in them; both exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = re.findall(
    r"^\| (\d+) \| \[`([^`]+)`\]\(\.\./([^)]+)\) \| ([^|]+) \|", (ROOT / "docs" / "paths.md").read_text(), re.MULTILINE
)


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a module; a method as `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, _FUNCTIONS)}
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found.add(node.name)
    return found


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_both_paths_are_numbered_without_a_gap():
    numbers = [int(number) for number, *_ in STEPS]
    second = numbers.index(1, 1)
    assert numbers == [*range(1, second + 1), *range(1, len(numbers) - second + 1)]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step[0]}-{step[1]}")
def test_what_a_step_names_is_defined_in_its_file(step: tuple[str, str, str, str]):
    _, file, link, names = step
    assert link == file
    wanted = set(re.findall(r"`([^`]+)`", names))
    assert wanted
    assert wanted <= defined(ROOT / file)
