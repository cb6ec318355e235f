"""Modules that run in another process are this program's, whatever lies in the current folder."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from pipeline.process.python import module_command, with_import_root

ROOT = Path(__file__).resolve().parents[3]


def test_a_file_in_the_current_folder_takes_no_module_s_place(tmp_path: Path):
    (tmp_path / "pipeline.py").write_text("raise SystemExit('the file of the current folder')")
    command = [*module_command("pipeline.cli"), "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env=with_import_root(os.environ), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_module_that_runs_in_another_process_is_started_so():
    for package in ("pipeline", "consumers"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "python.py":
                assert not re.search(r'sys\.executable[^\n]*"-m"', path.read_text(encoding="utf-8")), path
