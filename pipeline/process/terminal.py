"""The terminal of a process, which can be closed while the process runs. Writing to a closed one is an error (EIO)."""

from __future__ import annotations

import os
import stat

_STANDARD = (0, 1, 2)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def leave_terminal() -> None:
    """Let stdin, stdout and stderr lead nowhere where they are a terminal. A closed one is still a character device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _STANDARD:
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
