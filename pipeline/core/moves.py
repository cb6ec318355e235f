"""The message ids of moved requests. They carry a code that only the pipeline can make.

The queue takes a message id once within two minutes, and a move's id says which request it moves. A client that could
make one could take the place of a move, which would lose the request, or pass its message off as another request.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from pipeline.wire.subjects import STREAM_OLLAMA, Move

_CODE_BYTES: Final = 15
# How a move is called in a message id, where that is not its own name.
_WORDS: Final = {Move.PRIORITY: Move.REPLAYED}
_MOVED_ID: Final = re.compile(
    rf"(.*):({'|'.join(move for move in Move if move not in _WORDS)}):([0-9]+(?:-[0-9]+)?)(?::([A-Za-z0-9_-]+))?",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class MoveIds:
    """Makes and reads the message ids of moved requests.

    Attributes:
        key: the secret that all processes of one pipeline share.
        before: up to this sequence of the stream of requests, a move needs no code: an older version stored it, or a
            pipeline whose key is lost.
    """

    key: bytes = b""
    before: int = 0

    def make(self, request_id: str, move: Move, sequence: int, stored_at: float) -> str:
        """The `Nats-Msg-Id` of a moved request. A repeated move has the same id, so it is stored once.

        Args:
            request_id: the request's id.
            move: the move.
            sequence: the broker's sequence of the message that is moved.
            stored_at: the broker's time of storing that message, UTC, unix seconds. With the sequence it distinguishes
                a later request with the same id.
        """
        named = f"{request_id}:{_WORDS.get(move, move)}:{sequence}-{round(stored_at * 1e6)}"
        return f"{named}:{self._code(named)}"

    def read(self, message_id: str, stream: str, sequence: int) -> tuple[str, Move | None]:
        """The request's id in a `Nats-Msg-Id`, and the move that stored the request, or None.

        Args:
            message_id: of a stored request.
            stream: where it is stored. Only the pipeline stores requests in `LLM_OLLAMA`.
            sequence: the message's, in that stream.
        """
        found = _MOVED_ID.fullmatch(message_id)
        if found is None:
            return message_id, None
        request_id, move, moved, code = found.groups()
        trusted = stream == STREAM_OLLAMA or sequence <= self.before
        if trusted or code == self._code(f"{request_id}:{move}:{moved}"):
            return request_id, Move(move)
        return message_id, None

    def _code(self, named: str) -> str:
        digest = hashlib.blake2b(named.encode(), key=self.key, digest_size=_CODE_BYTES, person=b"headrace move")
        return base64.urlsafe_b64encode(digest.digest()).decode()
