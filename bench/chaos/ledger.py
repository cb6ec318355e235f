"""The ledger of one run: each accepted request, the messages in its record, those that its readers saw, and a verdict.

It only relies on the wire contract: messages are JSON, distinguished by `object`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LAST = ("chat.completion", "list", "error")
CHUNK = "chat.completion.chunk"


class Kept(NamedTuple):
    """A message in the stream. `at` is when it was stored, unix seconds."""

    sequence: int
    at: float
    data: bytes


@dataclass(slots=True)
class Entry:
    """One accepted request.

    Attributes:
        kind: plain, inbox, cancelled, deadline, duplicate, nameless, embedding or poison.
        may_end: the error codes that it may end with. A completion is always allowed.
        expected: the undisturbed text of a seeded request on MLX, the vectors of an embeddings request, or None.
        record: the messages on its reply subject in `LLM_REPLIES`.
        live: the messages that a plain subscriber of that subject saw.
        inbox: the messages in its own inbox, or None if it has none.
    """

    id: str
    kind: str
    streams: bool
    accepted_at: float
    may_end: frozenset[str] = frozenset()
    expected: str | list[list[float]] | None = None
    inbox: list[bytes] | None = None
    record: list[Kept] = field(default_factory=list)
    live: list[bytes] = field(default_factory=list)

    @property
    def lasts(self) -> list[dict[str, Any]]:
        """The last messages in the record. There should be exactly one."""
        return [message for message in map(_read, (kept.data for kept in self.record)) if message["object"] in LAST]

    @property
    def is_in_mid_answer(self) -> bool:
        """Whether its live reader has chunks, but no last message."""
        return bool(self.live) and _read(self.live[-1])["object"] == CHUNK

    @property
    def is_all_by_mlx(self) -> bool:
        """Whether MLX alone wrote its answer."""
        messages = [_read(kept.data) for kept in self.record]
        return {m.get("engine") or m["headrace"]["engine"] for m in messages if "engine" in m or "headrace" in m} == {
            "mlx"
        }

    @property
    def attempts(self) -> int:
        """The number of attempts that wrote."""
        messages = [_read(kept.data) for kept in self.record]
        return max([m.get("attempt", 0) or m.get("headrace", {}).get("attempts", 1) for m in messages], default=1)

    def faults(self) -> list[str]:
        """Its faults, in fixed words that can be counted. Empty if it was answered as promised."""
        lasts = self.lasts
        if not lasts:
            return ["lost"]
        found = ["doubled"] if len(lasts) > 1 else []
        if _last_of(self.record[-1].data) is None:
            found.append("a message after the last one")
        found += self._chunk_faults(lasts[0])
        found += self._ending_faults(lasts[0])
        found += self._reader_faults()
        return found

    def _chunk_faults(self, last: dict[str, Any]) -> list[str]:
        chunks = [m for m in (_read(kept.data) for kept in self.record) if m["object"] == CHUNK]
        if [chunk["seq"] for chunk in chunks] != list(range(len(chunks))):
            return ["gap in seq"]
        if not self.streams or last["object"] == "error":
            return []
        joined = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        return [] if joined == _text(last) else ["chunks differ from the last message"]

    def _ending_faults(self, last: dict[str, Any]) -> list[str]:
        if last["object"] == "error":
            code = last["error"]["code"]
            return [] if code in self.may_end else [f"ended with {code}"]
        if not self.is_comparable:
            return []
        found = [item["embedding"] for item in last["data"]] if last["object"] == "list" else _text(last)
        return [] if found == self.expected else ["differs from the undisturbed answer"]

    @property
    def is_comparable(self) -> bool:
        """Whether the answer is known in advance. The text of another engine can differ."""
        return self.expected is not None and (self.kind == "embedding" or self.is_all_by_mlx)

    def _reader_faults(self) -> list[str]:
        kept = {message.data for message in self.record}
        found = []
        if any(data not in kept for data in self.live):
            found.append("a reader saw a message that is not in the record")
        if sum(_last_of(data) is not None for data in self.live) > 1:
            found.append("doubled at a live reader")
        lasts = {data for data in self.inbox or () if _last_of(data) is not None}
        if len(lasts) > 1:
            found.append("two different last messages at an inbox")
        if any(data not in kept for data in self.inbox or ()):
            found.append("an inbox has a message that is not in the record")
        return found

    @property
    def repeated_at_inbox(self) -> bool:
        """Whether its inbox got the last message more than once."""
        return sum(_last_of(data) is not None for data in self.inbox or ()) > 1

    @property
    def missed_at_inbox(self) -> bool:
        """Whether its inbox never got the last message. Core messages are lost while the reader is disconnected."""
        return self.inbox is not None and not any(_last_of(data) for data in self.inbox)


class Summary(NamedTuple):
    """The totals of a run."""

    accepted: int
    ended: Counter[str]
    faults: Counter[str]
    attempts: Counter[int]
    repeated_at_inbox: int
    missed_at_inbox: int
    known_compared: int
    examples: Mapping[str, Sequence[str]]

    @property
    def reexecuted(self) -> int:
        """The number of requests with more than one attempt."""
        return sum(count for attempts, count in self.attempts.items() if attempts > 1)

    @property
    def lost(self) -> int:
        """The number of requests that were accepted and never answered."""
        return self.faults["lost"]


@dataclass(slots=True)
class Ledger:
    """All entries, by id. One writer: the run's event loop."""

    entries: dict[str, Entry] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def open(self) -> list[Entry]:
        """The requests without a last message yet."""
        return [entry for entry in self.entries.values() if not (entry.record and _last_of(entry.record[-1].data))]

    def summary(self) -> Summary:
        """The totals of all requests."""
        ended: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        compared = 0
        for entry in self.entries.values():
            for fault in entry.faults():
                faults[fault] += 1
                examples.setdefault(fault, []).append(entry.id)
            for last in entry.lasts[:1]:
                answered = last["object"] != "error"
                ended["answered" if answered else last["error"]["code"]] += 1
                compared += answered and entry.is_comparable
        entries = self.entries.values()
        return Summary(
            accepted=len(entries),
            ended=ended,
            faults=faults,
            attempts=Counter(entry.attempts for entry in entries),
            repeated_at_inbox=sum(entry.repeated_at_inbox for entry in entries),
            missed_at_inbox=sum(entry.missed_at_inbox for entry in entries),
            known_compared=compared,
            examples={fault: ids[:5] for fault, ids in examples.items()},
        )


def goes_on_after(entry: Entry, at: float) -> float | None:
    """How long after `at` a stream went on that had begun before it, in seconds. None if it was not running then."""
    before = [kept for kept in entry.record if kept.at <= at]
    after = next((kept for kept in entry.record if kept.at > at), None)
    if not entry.streams or not before or after is None or _last_of(before[-1].data):
        return None
    return after.at - at


def _read(data: bytes) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(data)
    return message


def _last_of(data: bytes) -> dict[str, Any] | None:
    message = _read(data)
    return message if message["object"] in LAST else None


def _text(completion: dict[str, Any]) -> str:
    return completion["choices"][0]["message"]["content"] or ""
