"""Faults on demand, for tests. Only active with the setting `engine_faults`.

`[[fault:segfault]]`, `[[fault:abort]]`, `[[fault:raise]]` or `[[fault:hang]]` in a prompt causes that fault in the
first step of the request. With `@5` it happens after five tokens of the answer.
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
    """A fault, and the number of tokens of the answer after which it happens."""

    kind: str
    after_tokens: int = 0

    def strike(self) -> None:
        """Cause the fault."""
        if self.kind == "segfault":
            ctypes.string_at(0)
        if self.kind == "abort":
            os.abort()
        while self.kind == "hang":
            time.sleep(3600)
        raise RuntimeError("fault on demand")


def fault_in(request: ChatRequest) -> Fault | None:
    """The fault in a request's prompt, if any."""
    for message in request.chat:
        if found := _FAULT.search(message.text()):
            return Fault(found[1], int(found[2] or 0))
    return None
