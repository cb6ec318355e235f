"""Other versions of headrace, from git: the tree of a commit, in a temporary folder."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def revision(rev: str) -> Iterator[Path]:
    """The tree of a commit, for the time of the block.

    Raises:
        SystemExit: Git does not know the commit.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-revision-") as folder:
        archive = Path(folder) / "tree.tar"
        command = ["git", "archive", "--format=tar", f"--output={archive}", rev]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"git archive {rev}: {done.stderr.strip()}")
        with tarfile.open(archive) as tar:
            tar.extractall(Path(folder) / "tree", filter="data")
        yield Path(folder) / "tree"
