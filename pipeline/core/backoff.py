"""How long to wait before the next try: twice as long after each failure, up to a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

# 2 ** 1024 is too large for a float.
_MOST_DOUBLINGS = 64


def doubled(first_s: float, failures: int, *, most_s: float) -> float:
    """The pause in seconds after `failures` failures in a row, the first one included: 0 before any has happened."""
    if failures <= 0:
        return 0.0
    return float(min(most_s, first_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS)))


@dataclass(slots=True)
class Backoff:
    """Counts the failures in a row of one thing. One writer: the task that tries it."""

    first_s: float
    most_s: float
    failures: int = field(init=False, default=0)

    def failed(self) -> float:
        """Count a failure. Returns the pause before the next try, seconds."""
        self.failures += 1
        return doubled(self.first_s, self.failures, most_s=self.most_s)

    def succeeded(self) -> None:
        """Begin again with the first pause."""
        self.failures = 0
