"""Fetching a model to a worker's machine: the call, and the worker's reply. Both are JSON, on `llm.fetch.<worker>`.

A caller calls again and again. Each reply has what is new, and the fetch goes on only while it is asked about: it ends
with the last of its callers, also where that one has crashed.
"""

from __future__ import annotations

from msgspec import Struct, field

from pipeline.wire.answers import ErrorBody


class FetchCall(Struct, omit_defaults=True):
    """The body of `llm.fetch.<worker>`.

    Attributes:
        model: as the client names it.
        call: the caller's own id of this fetch.
        after: the `revision` of the reply before; 0 at first.
        leaves: the caller is gone.
    """

    model: str
    call: str
    after: int = 0
    leaves: bool = False


class FetchStep(Struct, frozen=True, omit_defaults=True):
    """A line of Ollama's progress.

    Attributes:
        status: what is done, in words.
        digest: of the file that is fetched; empty if none is.
        total, completed: bytes; 0 of 0 if that is not known.
    """

    status: str
    digest: str = ""
    total: int = 0
    completed: int = 0


class FetchReport(Struct, tag_field="object", tag="headrace.fetch", omit_defaults=True):
    """The reply: how far the fetch is. A call that the worker does not take gets an error message instead.

    Attributes:
        revision: counts the changes.
        steps: those that have changed since `after`, the latest last.
        ended: nothing follows.
        served: the name under which the worker answers with the model; empty if it does not.
        error: why the fetch ended without the model; None if it did not.
    """

    revision: int = 0
    steps: list[FetchStep] = field(default_factory=list)
    ended: bool = False
    served: str = ""
    error: ErrorBody | None = None
