"""What happened lately, for whoever looks: requests with the times of each, moves between engines, loads."""

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
# Loads of one level that are closer than this to each other are one point.
_POINT_EVERY_S = 0.5
_POINTS_MAX = 1200
# An announcement and an event tell of the same request where both say that it was stored within this time.
_SAME_S = 1.0
_STATE_OF_MOVE: dict[Move | None, State] = {Move.SPILLED: "spilled", Move.COMPLEX: "triaged", Move.RETURNED: "triaged"}


class Seen(Struct, frozen=True, omit_defaults=True):
    """One request as it was last heard of. Times in milliseconds since it was first stored, None where not known.

    Attributes:
        change: counts what was heard; of two, the higher was heard later.
        at: when it was stored, UTC seconds.
        tenant: whom it is for; empty where that is nobody, or not known.
        triage_ms: when the router was handed it.
        moved_ms: when it was last stored anew: for Ollama, or marked for MLX.
        started_ms: when the present or last engine began.
        first_ms: when the first token was there.
        ended_ms: when its last message was stored, or heard of.
        reason: why it was moved, or why that engine answered it.
        code: of the error that it ended with.
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
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled", "expired")


class MoveSeen(Struct, frozen=True, omit_defaults=True):
    """A request changed the engine that it waits for. `at` in UTC seconds."""

    id: str
    priority: Priority
    to: EngineName
    reason: str
    change: int
    at: float
    tenant: str = ""


class Point(Struct, frozen=True, array_like=True):
    """An engine's load at one time, as a chart draws it; on the wire an array."""

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
    """Keeps what was heard, bounded. One writer: the gateway's subscriptions.

    Everything kept has the number of its change, so that a reader who names the last one it has gets what is newer:
    the newest state of each request, however long it did not look.

    Attributes:
        kept: so many requests; the one that was not heard of for longest makes way.
        shown: at most so many requests, and so many moves, are given to a reader.
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

    # ---- hearing

    def stored(self, envelope: Envelope, placed_at: float) -> None:
        """A request was stored in a lane, at placed_at (UTC seconds); a move stores it anew."""
        known = self._requests.get(envelope.id)
        if known is not None and abs(known.at - envelope.stored_at) > _SAME_S:
            known = None
        moved = _STATE_OF_MOVE.get(envelope.move)
        placed_ms = _since(envelope.stored_at, placed_at)
        if known is None:
            known = Seen(envelope.id, envelope.priority, "queued", 0, envelope.stored_at)
        known = replace(known, at=envelope.stored_at, tenant=envelope.tenant)
        # What an engine has begun or ended since is heard on other ways, and may be heard before.
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
        """Something happened to a request; heard at wall_now (UTC seconds)."""
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
                # The account of the answer is exact, and a part of it is the last attempt's start.
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
        """An engine's load was heard; the same one again is no news."""
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
        """Something was missed: what is known of requests that have not ended may be true no more.

        A reader has to begin anew. What goes on is entered again when it is next heard of.
        """
        self.change += 1
        self._requests = OrderedDict((name, request) for name, request in self._requests.items() if request.ended)

    def _keep(self, request: Seen) -> None:
        self.change += 1
        self._requests[request.id] = replace(request, change=self.change)
        self._requests.move_to_end(request.id)
        if len(self._requests) > self.kept:
            self._requests.popitem(last=False)

    # ---- telling

    def requests(self, since: int, may_see: Callable[[str], bool]) -> list[Seen]:
        """What changed after the change `since`, the latest first; of the tenants that may_see says yes to."""
        return self._newest(reversed(self._requests.values()), since, may_see)

    def moves(self, since: int, may_see: Callable[[str], bool]) -> list[MoveSeen]:
        """Moves between engines after the change `since`, the latest first; of the tenants that may_see says yes to."""
        return self._newest(reversed(self._moves), since, may_see)

    def points(self, since: int) -> dict[EngineName, list[Point]]:
        """The loads of each engine heard after the change `since`, oldest first; engines without any left out."""
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
    """Milliseconds from at to then; clocks of two machines may say less than 0."""
    return max(0.0, round((then - at) * 1000, 3))
