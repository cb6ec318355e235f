"""The limit on open files and sockets of this process."""

from __future__ import annotations

import contextlib
import logging
import resource

log = logging.getLogger(__name__)

# What a role opens besides its clients' connections: the broker, the engine, logs, libraries.
RESERVED = 64
# More than any role needs. Systems without a hard limit refuse an unlimited one.
_WANTED = 65_536


def raise_limit() -> int:
    """Raise the limit of this process to its hard limit. Returns the limit in force.

    macOS starts programs with 256: a few hundred connections would exhaust it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    while soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            break
        # The kernel has a lower one of its own, as macOS.
        wanted //= 2
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _WANTED if soft == resource.RLIM_INFINITY else soft


def room_for(connections: int) -> int:
    """How many of so many connections this process can hold. Logs a warning if these are fewer."""
    limit = raise_limit()
    room = max(1, min(connections, limit - RESERVED))
    if room < connections:
        log.warning(
            "Only %d connections instead of %d: this process may open %d files. Raise the limit (ulimit -n), "
            "or set http_connections.",
            room,
            connections,
            limit,
        )
    return room
