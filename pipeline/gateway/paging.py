"""The pages of a list, as OpenAI's API has them. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode

_USUAL = 20


class Named(Protocol):
    """An entry of a list."""

    @property
    def id(self) -> str:
        """The entry's id."""
        ...


_Entry = TypeVar("_Entry", bound=Named)


def page(
    entries: Sequence[_Entry], query: Mapping[str, str], *, most: int, usual: int = _USUAL
) -> tuple[list[_Entry], bool]:
    """The entries that a call asks for with `after` and `limit`, and whether more follow.

    Args:
        entries: all of them, in the order of the list.
        query: of the URL.
        most: the most that `limit` can be.
        usual: how many there are without `limit`.

    Raises:
        HttpError: 400, for a `limit` that is not valid or an `after` that is not in the list.
    """
    text = query.get("limit", str(min(usual, most)))
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if not 1 <= limit <= most:
        raise HttpError(400, ErrorCode.INVALID_REQUEST, f"`limit` must be a number from 1 to {most}.", param="limit")
    after, begin = query.get("after"), 0
    if after:
        found = [place for place, entry in enumerate(entries) if entry.id == after]
        if not found:
            raise HttpError(400, ErrorCode.INVALID_REQUEST, "`after` is not the id of an entry.", param="after")
        begin = found[0] + 1
    end = begin + limit
    return list(entries[begin:end]), end < len(entries)


def listed(entries: Sequence[Named], *, more: bool) -> dict[str, Any]:
    """The body of a page."""
    ids = [entry.id for entry in entries]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": entries, **ends, "has_more": more}
