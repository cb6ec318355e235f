"""What signals do to a process that starts, and to a command. This module imports almost nothing.

Ctrl-C ends a process that is starting at once, without a word. Python would raise KeyboardInterrupt wherever the
process is, also in the middle of an import. That prints a traceback, or is even lost, for example in the callback of a
weak reference.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Self

from pipeline.process.terminal import leave_terminal

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a process that Ctrl-C has ended."""

_Handler = Callable[[int, Any], Any]


def end_at_interrupt() -> None:
    """Have SIGINT end the process with `INTERRUPTED`. Where SIGINT is ignored or handled, nothing changes."""
    _replace(signal.default_int_handler, _end)


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`, for code that handles KeyboardInterrupt."""
    _replace(_end, signal.default_int_handler)


class Interrupts:
    """While this is open, SIGTERM and SIGHUP interrupt a command as Ctrl-C does, so that it ends what it holds.

    A signal that is ignored (SIGHUP under nohup) stays ignored.

    Attributes:
        code: the exit code of the command if it is interrupted.
    """

    def __init__(self) -> None:
        self.code: int = INTERRUPTED
        self._replaced: list[signal.Signals] = []

    def __enter__(self) -> Self:
        """Handle the signals. Threads other than the main one get no signal, and can set no handler."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL and _in_main_thread():
                signal.signal(number, self._interrupt)
                self._replaced.append(number)
        return self

    def __exit__(self, *_: object) -> None:
        """Handle them as before."""
        for number in self._replaced:
            signal.signal(number, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.code = 128 + number
        if number == signal.SIGHUP:
            leave_terminal()
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # it is ignored, which is about Ctrl-C alone
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)


def _replace(old: _Handler, new: _Handler) -> None:
    if signal.getsignal(signal.SIGINT) is old and _in_main_thread():
        signal.signal(signal.SIGINT, new)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
