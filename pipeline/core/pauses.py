"""Which requests may begin while an operator has paused lanes or tenants, and how pauses begin and end. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.pauses import DEFAULT_TENANT, Pause, PauseAction, PauseCall, PausedState
from pipeline.wire.subjects import ANY_TENANT, TENANT_ADVICE, Lane, Priority, is_tenant

# So many pauses at once: the state is one message.
MOST_PAUSES = 1000
# So many of the latest actions are kept.
MOST_LOGGED = 200
_MOST_CHARS = 200


@dataclass(frozen=True, slots=True)
class Pauses:
    """What is paused. It answers one question: may a request begin?

    Attributes:
        scopes: pairs of priority and tenant; None stands for all.
    """

    scopes: frozenset[tuple[Priority | None, str | None]] = frozenset()

    @classmethod
    def of(cls, state: PausedState) -> Pauses:
        """The pauses in a stored state."""
        return cls(frozenset((pause.priority, pause.tenant) for pause in state.pauses))

    def holds(self, priority: Priority, tenant: str) -> bool:
        """Whether the requests of a lane of a tenant are paused. The default tenant is the empty one."""
        if not self.scopes:
            return False
        name = tenant or DEFAULT_TENANT
        return not self.scopes.isdisjoint({(priority, None), (None, name), (priority, name)})

    def holds_lane(self, lane: Lane) -> bool:
        """Whether all requests of a lane are paused. In a lane of several tenants, some may be even if not all are."""
        if lane.tenant == ANY_TENANT:
            return (lane.priority, None) in self.scopes
        return self.holds(lane.priority, lane.tenant)


def paused(state: PausedState, call: PauseCall, at: float) -> PausedState:
    """The state after a pause at that time, UTC seconds. What is paused already keeps its entry.

    Raises:
        HeadraceError: the call names nothing that can be paused.
    """
    call = _checked(call)
    if _find(state, call) is not None:
        return state
    if len(state.pauses) >= MOST_PAUSES:
        message = f"{MOST_PAUSES} pauses are in force. Resume some of them."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message)
    pause = Pause(call.priority, call.tenant, call.by, at, call.reason)
    return PausedState(pauses=[*state.pauses, pause], log=_logged(state, "pause", call, at))


def resumed(state: PausedState, call: PauseCall, at: float) -> PausedState:
    """The state after a pause has ended at that time, UTC seconds.

    Raises:
        HeadraceError: that pause does not exist.
    """
    call = _checked(call)
    pause = _find(state, call)
    if pause is None:
        scope = described(call.priority, call.tenant)
        message = f"{scope[:1].upper()}{scope[1:]} is not paused. `headrace paused` lists the pauses."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message)
    rest = [other for other in state.pauses if other is not pause]
    return PausedState(pauses=rest, log=_logged(state, "resume", call, at))


def shown_pauses(state: PausedState) -> tuple[list[Pause], int]:
    """What every tenant may see: the paused lanes without who paused them, and how many pauses of tenants there are."""
    lanes = [msgspec.structs.replace(pause, by="") for pause in state.pauses if pause.tenant is None]
    return lanes, len(state.pauses) - len(lanes)


def described(priority: Priority | None, tenant: str | None) -> str:
    """The scope of a pause in words."""
    if tenant is None:
        return f"lane {priority}"
    return f"tenant {tenant}" if priority is None else f"lane {priority} of tenant {tenant}"


def _checked(call: PauseCall) -> PauseCall:
    """The call with its texts cut to a length that can be kept; raises HeadraceError."""
    if call.priority is None and call.tenant is None:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "Name a lane, a tenant, or both.", param="priority")
    if call.tenant is not None and not is_tenant(call.tenant):
        message = f"{quoted(call.tenant, 64)} is not a valid tenant. {TENANT_ADVICE}"
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="tenant")
    return msgspec.structs.replace(call, by=call.by[:_MOST_CHARS], reason=call.reason[:_MOST_CHARS])


def _find(state: PausedState, call: PauseCall) -> Pause | None:
    wanted = (call.priority, call.tenant)
    return next((pause for pause in state.pauses if (pause.priority, pause.tenant) == wanted), None)


def _logged(state: PausedState, action: Literal["pause", "resume"], call: PauseCall, at: float) -> list[PauseAction]:
    entry = PauseAction(action, call.priority, call.tenant, call.by, at, call.reason)
    return [*state.log, entry][-MOST_LOGGED:]
