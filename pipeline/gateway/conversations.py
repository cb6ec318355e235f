"""The conversations of recent responses, for calls that continue one by its id. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

# The most that is kept, bytes of JSON.
KEPT_BYTES = 64 << 20


@dataclass(slots=True)
class Conversations:
    """Keeps what was asked, by the id of the response. The answer is in the record, so both are kept as long.

    One writer: the gateway. The oldest are dropped first.

    Args:
        kept_s: how long a conversation is kept, seconds.
        kept_bytes: of all conversations.
    """

    kept_s: float
    kept_bytes: int = KEPT_BYTES
    _kept: dict[str, tuple[float, bytes]] = field(init=False, default_factory=dict)  # by id, oldest first
    _bytes: int = field(init=False, default=0)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request_id: str, conversation: bytes, now: float) -> None:
        """Keep the messages of a request, as JSON. `now` is monotonic seconds."""
        self._drop(request_id)
        self._kept[request_id] = (now, conversation)
        self._bytes += len(conversation)
        while self._kept:
            oldest, (at, _) = next(iter(self._kept.items()))
            if now - at < self.kept_s and self._bytes <= self.kept_bytes:
                return
            self._drop(oldest)

    def find(self, request_id: str, now: float) -> bytes | None:
        """The messages of a request; None if they are not kept. `now` is monotonic seconds."""
        at, conversation = self._kept.get(request_id, (0.0, None))
        return conversation if now - at < self.kept_s else None

    def _drop(self, request_id: str) -> None:
        _, conversation = self._kept.pop(request_id, (0.0, b""))
        self._bytes -= len(conversation)
