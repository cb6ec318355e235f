"""The speed of an Ollama server, measured from its finished answers: Ollama does not report it. No I/O."""

from __future__ import annotations

_MEMORY_S = 20.0  # busy seconds after which a measurement counts half
_NEW_SHARE = 0.2  # the share of the latest request in the mean length of an answer


class Rates:
    """Tokens per second while at least one request is in flight, and tokens per request.

    Below full load the rate is lower than the server's capacity, so the server gets less work than it could do. One
    writer: the engine, with `now` from the event loop's clock.
    """

    def __init__(self) -> None:
        self.tokens_per_request = 0.0
        self._in_flight = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._tokens = 0.0

    @property
    def in_flight(self) -> int:
        """The requests that have begun and not ended."""
        return self._in_flight

    @property
    def tokens_per_s(self) -> float:
        """The measured rate, 0 until a request has finished."""
        return self._tokens / self._busy_s if self._tokens and self._busy_s else 0.0

    def begun(self, now: float) -> None:
        """A request has begun."""
        self._advance(now)
        self._in_flight += 1

    def ended(self, now: float, *, tokens: int, whole: bool) -> None:
        """A request has ended after `tokens` tokens. `whole` is whether its answer is complete."""
        self._advance(now)
        self._in_flight -= 1
        self._tokens += tokens
        if whole and tokens:
            mean = self.tokens_per_request or tokens
            self.tokens_per_request = mean + _NEW_SHARE * (tokens - mean)

    def expected_tokens(self, limit: int) -> float:
        """The probable length of an answer of at most `limit` tokens."""
        return min(limit, self.tokens_per_request or limit)

    def _advance(self, now: float) -> None:
        if self._in_flight:
            self._busy_s += now - self._since
            kept = 0.5 ** ((now - self._since) / _MEMORY_S)
            self._busy_s *= kept
            self._tokens *= kept
        self._since = now
