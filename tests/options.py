"""The options of settings, parsed as every command parses them."""

from __future__ import annotations

import argparse

from pipeline.commands.options import add_options


def parse(*argv: str) -> argparse.Namespace:
    """The arguments of a command that takes all settings."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(argv)
