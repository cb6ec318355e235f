"""What Ctrl-C does to a process that is starting: it ends at once, without a word. This module imports almost nothing.

Python raises KeyboardInterrupt wherever the process is, also in the middle of an import. That prints a traceback, or is
even lost, for example in the callback of a weak reference.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a process that Ctrl-C has ended."""

_Handler = Callable[[int, Any], Any]


def end_at_interrupt() -> None:
    """Have SIGINT end the process with `INTERRUPTED`. Where SIGINT is ignored or handled, nothing changes."""
    _replace(signal.default_int_handler, _end)


def raise_at_interrupt() -> None:
    """Undo `end_at_interrupt`, for code that handles KeyboardInterrupt."""
    _replace(_end, signal.default_int_handler)


def _end(_number: int, _frame: object) -> None:
    os._exit(INTERRUPTED)


def _replace(old: _Handler, new: _Handler) -> None:
    """Set a handler in place of another one. Threads other than the main one get no signal, and can set no handler."""
    if signal.getsignal(signal.SIGINT) is old and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, new)
