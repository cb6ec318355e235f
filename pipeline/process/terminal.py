"""The terminal of a process, which can be closed while the process runs. Writing to a closed one is an error (EIO).

What others wrote (publishers, models, model servers) must not control it, so it is escaped before it is shown.
"""

from __future__ import annotations

import os
import re
import stat

_STANDARD = (0, 1, 2)
# C0, DEL and C1. Other characters that are not printable join emoji or are spaces, and an answer needs them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNIT_BYTES = 2


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


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Return text with what is not printable escaped, except the characters to keep."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def visible_answer(text: str) -> str:
    """Return the text of a model with control characters escaped, except line breaks and tabs."""
    return _CONTROLS.sub(lambda found: visible(found[0]), text)


def visible_json(text: str) -> str:
    """Return JSON with what is not printable escaped as JSON does, so that it means the same."""
    return "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", errors="surrogatepass")
    pairs = (units[at : at + _UNIT_BYTES] for at in range(0, len(units), _UNIT_BYTES))
    return "".join(f"\\u{pair.hex()}" for pair in pairs)
