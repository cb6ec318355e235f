"""Faults on demand, for tests of what must survive them; only where `engine_faults` is set.

`[[fault:segfault]]`, `[[fault:abort]]`, `[[fault:raise]]` and `[[fault:hang]]` in a prompt do that when the request's
sequence is stepped; with `@5`, when it has produced five tokens.
"""

from __future__ import annotations

import ctypes
import os
import re
import time

from msgspec import Struct

from pipeline.wire.requests import ChatRequest

_FAULT = re.compile(r"\[\[fault:(segfault|abort|raise|hang)(?:@(\d{1,9}))?\]\]")


class Fault(Struct, frozen=True):
    """What happens, and after how many tokens of the answer."""

    kind: str
    after_tokens: int = 0

    def strike(self) -> None:
        """Do it."""
        if self.kind == "segfault":
            ctypes.string_at(0)
        if self.kind == "abort":
            os.abort()
        while self.kind == "hang":
            time.sleep(3600)
        raise RuntimeError("a fault was asked for")


def fault_in(request: ChatRequest) -> Fault | None:
    """The fault that a request asks for."""
    for message in request.chat:
        if found := _FAULT.search(message.text()):
            return Fault(found[1], int(found[2] or 0))
    return None
