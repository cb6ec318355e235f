"""What the wheel holds: the two packages and what they read at run time, and none of what makes the demo model."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parent.parent
# What trains a model, and the folders that stay in the repository.
LEFT_OUT = ("mlx.optimizers", "mlx_lm.tuner", "bench", "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the wheel by name."""
    folder = tmp_path_factory.mktemp("wheel")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def imported(source: bytes) -> set[str]:
    """The modules that a module imports, and what it imports from modules, with dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_it_holds_two_packages_and_nothing_else(wheel: dict[str, bytes]) -> None:
    top = {name.partition("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pipeline", "consumers"}


def test_of_the_demo_model_it_holds_the_weights_alone(wheel: dict[str, bytes]) -> None:
    weights = {path.name for path in (ROOT / "consumers/demo_model/weights").iterdir()}
    assert {name for name in wheel if name.startswith("consumers/demo_model/")} == {
        "consumers/demo_model/README.md",
        "consumers/demo_model/__init__.py",
        *(f"consumers/demo_model/weights/{name}" for name in weights),
    }
    assert not [name for name in wheel if name.endswith(".jinja")]


def test_no_module_in_it_trains_a_model_or_imports_what_is_not_there(wheel: dict[str, bytes]) -> None:
    uses = {name: imported(source) for name, source in wheel.items() if name.endswith(".py")}
    found = [
        (name, one)
        for name, names in uses.items()
        for one in names
        if any(f"{one}.".startswith(f"{left_out}.") for left_out in LEFT_OUT)
    ]
    assert found == []


def test_the_check_would_find_the_training_code() -> None:
    source = (ROOT / "bench/demo_model/make.py").read_bytes()
    assert "mlx.optimizers" in imported(source)


def test_it_holds_what_the_modules_read_at_run_time(wheel: dict[str, bytes]) -> None:
    pages = {f"pipeline/gateway/pages/{path.name}" for path in (ROOT / "pipeline/gateway/pages").iterdir()}
    assert pages <= wheel.keys()
    assert "pipeline/nats_conf/embedded.conf" in wheel
