"""One command, from its arguments to its exit code."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.cli.parser import parsed
from pipeline.config import ConfigError
from pipeline.process.interrupts import Interrupts, raise_at_interrupt
from pipeline.process.lifecycle import StartError, end_quickly

# A full disk, a quota, or a device that fails, behind stdout.
_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

_STDERR = 2

Command = Callable[[argparse.Namespace], int]


def run(argv: Sequence[str] | None) -> int:
    """Run the command that the arguments name, by default those of the process. Return the exit code."""
    end_quickly()
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal without Unicode gets question marks, and no traceback.
            stream.reconfigure(errors="replace")
    interrupts = Interrupts()
    try:
        args = parsed(argv)
        command: Command = args.command
        with interrupts:
            raise_at_interrupt()
            return command(args)
    except ConfigError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return interrupts.code
    except BrokenPipeError:
        _forget_output()
        return 0
    except SystemExit as error:
        # rich ends the process with code 1 where the reader of stdout has closed it.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return 0
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        _forget_output()
        print(f"headrace: The output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _open_closed_streams() -> None:
    """Give a command that was started with a closed stdin, stdout or stderr (`<&-`) one that leads nowhere.

    The next file that the process opens would get the stream's number, also in the processes that it starts. libuv
    aborts a process that closes a file under such a number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 - open as long as the process runs
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as above
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115 - as above


def _forget_output() -> None:
    """Nothing takes what is written to stdout. Without this, Python reports the error again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
