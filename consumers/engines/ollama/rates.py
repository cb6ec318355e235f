"""How fast Ollama serves, measured from what it finished: Ollama itself does not say. No I/O."""

from __future__ import annotations

_MEMORY_S = 20.0  # busy seconds after which what was measured counts half
_NEW_SHARE = 0.2  # what the latest request adds to the mean length of an answer


class Rates:
    """Tokens per second while at least one request is in flight, and tokens per request.

    Below full load the rate understates what the server can do, which errs towards sending it less. One writer: the
    engine, with `now` from the event loop's clock.
    """

    def __init__(self) -> None:
        self.tokens_per_request = 0.0
        self._in_flight = 0
        self._since = 0.0
        self._busy_s = 0.0
        self._tokens = 0.0

    @property
    def in_flight(self) -> int:
        """Requests begun and not ended."""
        return self._in_flight

    @property
    def tokens_per_s(self) -> float:
        """The measured rate, 0 until a request has finished."""
        return self._tokens / self._busy_s if self._tokens and self._busy_s else 0.0

    def begun(self, now: float) -> None:
        """A request is on its way."""
        self._advance(now)
        self._in_flight += 1

    def ended(self, now: float, *, tokens: int, whole: bool) -> None:
        """A request has left, with so many tokens; whole where it was answered to its end."""
        self._advance(now)
        self._in_flight -= 1
        self._tokens += tokens
        if whole and tokens:
            mean = self.tokens_per_request or tokens
            self.tokens_per_request = mean + _NEW_SHARE * (tokens - mean)

    def expected_tokens(self, limit: int) -> float:
        """How long an answer of at most limit tokens will probably be."""
        return min(limit, self.tokens_per_request or limit)

    def _advance(self, now: float) -> None:
        if self._in_flight:
            self._busy_s += now - self._since
            kept = 0.5 ** ((now - self._since) / _MEMORY_S)
            self._busy_s *= kept
            self._tokens *= kept
        self._since = now
