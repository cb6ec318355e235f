"""Recent history for the dashboard: requests with their times, moves between engines, loads."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from pipeline.core.envelope import Envelope
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import EngineName, Level, Load, RequestEvent
from pipeline.wire.subjects import Move, Priority

State = Literal["queued", "triaged", "spilled", "running", "done", "failed", "cancelled", "expired"]

WINDOW_S = 300.0
# Loads of one level within this time are one point.
_POINT_EVERY_S = 0.5
_POINTS_MAX = 1200
# An announcement and an event are about the same request if their times of storing differ by less than this.
_SAME_S = 1.0
_STATE_OF_MOVE: dict[Move | None, State] = {Move.SPILLED: "spilled", Move.COMPLEX: "triaged", Move.RETURNED: "triaged"}


class Seen(Struct, frozen=True, omit_defaults=True):
    """The newest state of one request. Times in milliseconds since it was first stored, None if not known.

    Attributes:
        change: the number of the change; a later change has a higher number.
        at: when it was stored, UTC seconds.
        tenant: the request's tenant; empty if it has none, or it is not known.
        triage_ms: when the router received it.
        moved_ms: when it was last moved: to Ollama's lane, or to one that only MLX serves.
        started_ms: when the current or last engine began.
        first_ms: when the first token came.
        ended_ms: when its last message was stored, or when the event of its end arrived.
        reason: why it was moved, or why this engine answered it.
        code: of the error with which it ended.
    """

    id: str
    priority: Priority
    state: State
    change: int
    at: float
    tenant: str = ""
    engine: EngineName | None = None
    triage_ms: float | None = None
    moved_ms: float | None = None
    started_ms: float | None = None
    first_ms: float | None = None
    ended_ms: float | None = None
    reason: str = ""
    code: ErrorCode | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.state in ("done", "failed", "cancelled", "expired")


class MoveSeen(Struct, frozen=True, omit_defaults=True):
    """A move of a request to the other engine. `at` in UTC seconds."""

    id: str
    priority: Priority
    to: EngineName
    reason: str
    change: int
    at: float
    tenant: str = ""


class Point(Struct, frozen=True, array_like=True):
    """An engine's load at one time, for a chart. Encoded as an array."""

    at: float
    saturation: float
    level: Level
    high: int
    medium: int
    low: int
    change: int


_Item = TypeVar("_Item", Seen, MoveSeen)


@dataclass(slots=True)
class Recent:
    """Keeps a bounded history. One writer: the gateway's subscriptions.

    Each item has the number of its change. A reader names the last change that it has and gets the newer ones: the
    newest state of each request, however long ago the reader last read.

    Attributes:
        kept: the most requests that are kept; the one without news for longest is dropped.
        shown: the most requests, and the most moves, that a reader gets.
    """

    kept: int = 4000
    shown: int = 150
    change: int = field(init=False, default=0)
    _requests: OrderedDict[str, Seen] = field(init=False, default_factory=OrderedDict)
    _moves: deque[MoveSeen] = field(init=False)
    _points: dict[EngineName, deque[Point]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._moves = deque(maxlen=self.shown)

    def __len__(self) -> int:
        return len(self._requests)

    # ---- writing

    def stored(self, envelope: Envelope, placed_at: float) -> None:
        """A request was stored in a lane at placed_at (UTC seconds). A move stores it again."""
        known = self._requests.get(envelope.name)
        if known is not None and abs(known.at - envelope.stored_at) > _SAME_S:
            known = None
        moved = _STATE_OF_MOVE.get(envelope.move)
        placed_ms = _since(envelope.stored_at, placed_at)
        if known is None:
            known = Seen(envelope.name, envelope.priority, "queued", 0, envelope.stored_at)
        known = replace(known, at=envelope.stored_at, tenant=envelope.tenant, priority=envelope.priority)
        # An event of the engine can arrive before the announcement of an earlier move.
        is_news = not known.ended and (known.started_ms is None or known.started_ms < placed_ms)
        if moved is not None and is_news:
            reason = envelope.move_reason or known.reason
            known = replace(known, state=moved, moved_ms=placed_ms, engine=None, started_ms=None, reason=reason)
        self._keep(known)
        if envelope.move in (Move.SPILLED, Move.RETURNED):
            to: EngineName = "ollama" if envelope.move is Move.SPILLED else "mlx"
            self._moves.append(
                MoveSeen(known.id, known.priority, to, envelope.move_reason, self.change, placed_at, known.tenant)
            )

    def event(self, event: RequestEvent, wall_now: float) -> None:
        """An event of a request arrived at wall_now (UTC seconds)."""
        known = self._requests.get(event.id)
        if known is None or (known.ended and event.kind == "started"):
            at = wall_now - (event.total_ms or event.wait_ms or 0.0) / 1000
            known = Seen(event.id, event.priority, "queued", 0, at, event.tenant)
        if known.ended:
            return
        reason = event.reason or known.reason
        now_ms = _since(known.at, wall_now)
        match event.kind:
            case "spilled" | "triaged":
                state = event.kind if known.state == "queued" else known.state
                known = replace(known, state=state, triage_ms=event.wait_ms, reason=reason)
            case "started":
                started_ms = now_ms if event.wait_ms is None else event.wait_ms
                known = replace(known, state="running", engine=event.engine, started_ms=started_ms)
            case "returned":
                known = replace(known, state="queued", engine=None, started_ms=None)
            case "done":
                # The times of the answer's account are exact, and its start is the last attempt's.
                known = replace(
                    known,
                    state="done",
                    engine=event.engine,
                    started_ms=event.wait_ms,
                    first_ms=event.ttft_ms or None,
                    ended_ms=now_ms if event.total_ms is None else event.total_ms,
                    reason=reason,
                )
            case _:
                known = replace(known, state=event.kind, ended_ms=now_ms, code=event.code, reason=reason)
        self._keep(known)

    def load(self, load: Load) -> None:
        """A load of an engine arrived. A repeated one is ignored."""
        points = self._points.setdefault(load.engine, deque(maxlen=_POINTS_MAX))
        if points and points[-1].at == load.at:
            return
        while points and points[-1].at > load.at:
            points.pop()  # the clock was set back
        if points and points[-1].level == load.level and load.at - points[-1].at < _POINT_EVERY_S:
            return
        self.change += 1
        queued = load.queued
        points.append(Point(load.at, load.saturation, load.level, queued.high, queued.medium, queued.low, self.change))
        while points[0].at < load.at - WINDOW_S:
            points.popleft()

    def forget_unfinished(self) -> None:
        """Events were missed, so the state of unfinished requests is not known any more.

        Readers must begin again. An unfinished request is entered again with its next event.
        """
        self.change += 1
        self._requests = OrderedDict((name, request) for name, request in self._requests.items() if request.ended)

    def _keep(self, request: Seen) -> None:
        self.change += 1
        self._requests[request.id] = replace(request, change=self.change)
        self._requests.move_to_end(request.id)
        if len(self._requests) > self.kept:
            self._requests.popitem(last=False)

    # ---- reading

    def requests(self, since: int, may_see: Callable[[str], bool]) -> list[Seen]:
        """The requests that changed after `since`, newest first, of the tenants for which may_see is true."""
        return self._newest(reversed(self._requests.values()), since, may_see)

    def moves(self, since: int, may_see: Callable[[str], bool]) -> list[MoveSeen]:
        """The moves after the change `since`, newest first, of the tenants for which may_see is true."""
        return self._newest(reversed(self._moves), since, may_see)

    def points(self, since: int) -> dict[EngineName, list[Point]]:
        """The loads of each engine after the change `since`, oldest first. Engines without any are left out."""
        newer = {engine: [p for p in points if p.change > since] for engine, points in self._points.items()}
        return {engine: points for engine, points in newer.items() if points}

    def _newest(self, items: Iterable[_Item], since: int, may_see: Callable[[str], bool]) -> list[_Item]:
        found: list[_Item] = []
        for item in items:
            if item.change <= since or len(found) == self.shown:
                break
            if may_see(item.tenant):
                found.append(item)
        return found


def _since(at: float, then: float) -> float:
    """Milliseconds from at to then, at least 0: the clocks of two machines can differ."""
    return max(0.0, round((then - at) * 1000, 3))
