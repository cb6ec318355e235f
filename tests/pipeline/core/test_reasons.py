"""What an engine says, in one line for clients: no folder of its machine stands in it."""

from __future__ import annotations

import pytest

from pipeline.core.reasons import one_line

PLACES = {"/srv/ada/my models/coder": "coder", "/srv/ada/sql": "sql"}


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("No space.", "No space."),
        ("two\n  lines", "two lines"),
        ("The model /srv/ada/my models/coder cannot be loaded (OSError: no header.).", "OSError: no header."),
        (
            "The model other cannot be loaded (OSError: no header).",
            "The model other cannot be loaded (OSError: no header).",
        ),
        ("no file '/srv/ada/my models/coder/config.json'", "no file 'coder/config.json'"),
        ("no file '/var/lib/x/config.json', (/a/b)", "no file 'config.json', (b)"),
        ("~/models/x: gone", "x: gone"),
        ("See https://example.org/a/b and owner/name.", "See https://example.org/a/b and owner/name."),
        ("The adapter in /srv/ada/sql fits nothing.", "The adapter in sql fits nothing."),
    ],
)
def test_folders_become_names_and_lines_become_one(said: str, line: str):
    assert one_line(said, PLACES) == line


def test_a_long_text_is_cut():
    assert one_line("x" * 1000, {}) == "x" * 240 + "..."
