"""What the Makefile does whatever the settings of the user's pip say."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120


def tiny_wheel(folder: Path) -> Path:
    path = folder / "tiny_sluice-1-py3-none-any.whl"
    info = "tiny_sluice-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_sluice.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-sluice\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with pip, as the Makefile makes it."""
    folder = tmp_path_factory.mktemp("make") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=TIMEOUT_S)
    return folder


@pytest.mark.parametrize("setting", ["PIP_USER=1", "PIP_TARGET={}", "PIP_PREFIX={}", "PIP_ROOT={}"])
def test_pip_installs_into_the_environment_whatever_the_user_s_settings(environment, setting, tmp_path):
    wheel = tiny_wheel(tmp_path)
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"include {ROOT}/Makefile\nprobe:\n\t@$(PIP) --quiet --no-deps --force-reinstall {wheel}\n")
    name, _, value = setting.format(tmp_path / "elsewhere").partition("=")
    installing = subprocess.run(
        ["make", "-f", makefile, "probe", f"BIN={environment}/bin"],
        env={**os.environ, "PIP_NO_INDEX": "1", name: value},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert installing.returncode == 0, installing.stderr
    assert len(list(environment.glob("lib/*/site-packages/tiny_sluice.py"))) == 1
    assert not (tmp_path / "elsewhere").exists()
    subprocess.run([environment / "bin/python", "-m", "pip", "uninstall", "-qy", "tiny-sluice"], check=True)
