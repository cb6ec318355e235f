"""Ids of tool calls. No I/O."""

from __future__ import annotations

import hashlib
import re
import string
from typing import Final

_NINE: Final = re.compile(r"[A-Za-z0-9]{9}")
_LETTERS: Final = string.digits + string.ascii_letters


def nine_characters(given: str) -> str:
    """An id of nine letters and digits, as Mistral's templates want it: `given` if it is one, else made from it."""
    if _NINE.fullmatch(given):
        return given
    number = int.from_bytes(hashlib.blake2b(given.encode(), digest_size=8).digest(), "big")
    made = ""
    for _ in range(9):
        number, index = divmod(number, len(_LETTERS))
        made += _LETTERS[index]
    return made
