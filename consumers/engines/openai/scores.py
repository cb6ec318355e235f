"""Log-probabilities in the answers of servers of OpenAI's API: in the form of a chat, or of a text. No I/O."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import msgspec
from msgspec import Struct, field

from pipeline.wire.answers import Alternative, TokenScore


class _OfText(Struct):
    """Those of a text stand in lists, an entry for each token. The first token of a text has none."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None


def read_scores(logprobs: dict[str, Any] | None) -> list[TokenScore]:
    """The log-probabilities of the tokens in an event; none where the server has a form of its own."""
    given = logprobs or {}
    try:
        if content := given.get("content"):
            return msgspec.convert(content, list[TokenScore])
        text = msgspec.convert(given, _OfText)
    except msgspec.ValidationError:
        return []
    return [
        TokenScore(token, score, top_logprobs=[Alternative(*other) for other in (others or {}).items()])
        for token, score, others in zip_longest(text.tokens, text.token_logprobs, text.top_logprobs or ())
        if token is not None and score is not None
    ]
