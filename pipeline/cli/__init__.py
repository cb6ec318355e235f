"""The command line: the commands of `headrace`, their options, and the exit codes.

0: success. 1: failure; stderr has the reason. 2: an invalid option or setting. 130: interrupted.
"""

from __future__ import annotations

from pipeline.process.interrupts import end_at_interrupt, raise_at_interrupt

# Nothing else is imported here: the import takes most of the time of a start, and Ctrl-C can come in it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    end_at_interrupt()
    try:
        from pipeline.cli.run import run

        return run(argv)
    finally:
        raise_at_interrupt()
