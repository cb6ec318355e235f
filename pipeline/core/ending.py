"""How a request in hand ends: the outcomes, the steps that each one takes, and what is published about it.

`pipeline.delivery.held` carries the steps out. Their order is decided here and nowhere else, and `docs/delivery.md`
shows the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from pipeline.core.answer import error_answer
from pipeline.core.envelope import Envelope
from pipeline.core.moves import MoveIds
from pipeline.wire.answers import Completion, Last, Success
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName, EventKind, RequestEvent
from pipeline.wire.subjects import MOVED_BY, MOVED_REASON, MOVED_STORED_AT, MSG_ID, TASK, Move, Task, carried

# A request whose new lane is full stays where it is, and is delivered again after this long.
FULL_RETRY_S = 0.5


class EndStep(StrEnum):
    """One operation on the broker; the value is what `docs/delivery.md` calls it."""

    LETTER = "store the dead letter"
    CLOSE = "store the last message"
    FORWARD = "forward it"
    ACCOUNT = "store its account"
    MOVE = "store the request there"
    NOTE = "note the return"
    REMOVE = "acknowledge"
    RETURN = "nak"
    TELL = "publish the event"


# A process that lost its lease may note a return and publish events; everything else is up to the new holder.
NEEDS_LEASE = frozenset(
    {EndStep.LETTER, EndStep.CLOSE, EndStep.FORWARD, EndStep.ACCOUNT, EndStep.MOVE, EndStep.REMOVE, EndStep.RETURN}
)


class Loss(StrEnum):
    """Why a process lets go of a request without ending it."""

    LEASE = "its lease ran out"
    OVERTAKEN = "another attempt writes its record"
    STOOD_STILL = "it was delivered while this process stood still"
    BROKER = "the broker did not do what was asked"


# ---- the outcomes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """An engine completed the answer."""

    answer: Success


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends with an error: refused, cancelled or expired."""

    error: HeadraceError


@dataclass(frozen=True, slots=True)
class Buried:
    """The request ends with `engine_failed` and is kept in the dead letters."""

    error: HeadraceError


@dataclass(frozen=True, slots=True)
class Moved:
    """The request goes to another lane.

    Attributes:
        to: the lane's subject.
        how: which kind of move.
        task: the class that the request has from now on.
        why: shown in the answer's account and in events.
        by: the operator who changed the request's priority; empty for every other move.
    """

    to: str
    how: Move
    task: Task
    why: str
    by: str = ""


@dataclass(frozen=True, slots=True)
class Returned:
    """The request stays on its lane and is delivered again.

    Attributes:
        delay_s: how long the broker waits before it delivers the request again.
        uses_attempt: whether the delivery counts as one of the request's attempts.
        error: what went wrong, if anything did.
    """

    delay_s: float = 0.0
    uses_attempt: bool = False
    error: HeadraceError | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The request had ended before this delivery.

    Attributes:
        last: the last message in its record; None where the delivery is a second copy of a request that was published
            twice, whose reader gets the first copy's answer.
    """

    last: Last | None


@dataclass(frozen=True, slots=True)
class Abandoned:
    """This process lets go of the request, and another delivery ends it."""

    why: Loss


Outcome = Answered | Failed | Buried | Moved | Returned | Settled | Abandoned

_FAILED: dict[ErrorCode, EventKind] = {ErrorCode.CANCELLED: "cancelled", ErrorCode.DEADLINE_EXCEEDED: "expired"}
# A request that comes back from Ollama waits for MLX: the broker's announcement of the new copy is all there is to say.
_MOVED: dict[Move, EventKind] = {Move.SPILLED: "spilled", Move.COMPLEX: "triaged"}


def failure(error: HeadraceError) -> Failed | Buried:
    """The outcome of a request that ends with error."""
    return Buried(error) if error.code is ErrorCode.ENGINE_FAILED else Failed(error)


def when_full(moved: Moved) -> Returned:
    """The outcome instead of a move to a lane that is full."""
    return Returned(FULL_RETRY_S, error=HeadraceError(ErrorCode.QUEUE_FULL, f"{moved.to} is full"))


def too_large(size: int, most: int) -> Failed:
    """The outcome of a request, a part of whose answer the broker does not accept: another attempt ends the same way.

    Args:
        size: of the message, bytes.
        most: what the broker accepts, bytes.
    """
    message = (
        f"A message of the answer has {size} bytes, and the broker accepts at most {most}. "
        "Ask for a shorter answer, or for fewer `top_logprobs`."
    )
    return Failed(HeadraceError(ErrorCode.REQUEST_TOO_LARGE, message))


def when_too_large(outcome: Outcome, envelope: Envelope, *, size: int, most: int, stays: bool) -> Failed | Returned:
    """The outcome instead of one of whose messages the broker accepts none of that size.

    A request that just fits has no room for the headers of a move or of a dead letter.

    Args:
        outcome: what was to be done.
        envelope: the request's.
        size, most: as in `too_large`.
        stays: whether the request can be answered where it is. Otherwise a move ends it.
    """
    match outcome:
        case Moved(to):
            said = f"With the headers of a move to {to}, the request has {size} bytes"
            error = HeadraceError(
                ErrorCode.REQUEST_TOO_LARGE, f"{said}, and the broker accepts at most {most}. Send a shorter request."
            )
            return Returned(FULL_RETRY_S, error=error) if stays else Failed(error)
        case Buried():
            message = (
                f"Request {envelope.id} failed on every attempt. It is not kept in the dead letters: its letter has "
                f"{size} bytes, and the broker accepts at most {most}."
            )
            return Failed(HeadraceError(ErrorCode.ENGINE_FAILED, message))
        case _:
            return too_large(size, most)


def word(outcome: Outcome) -> str:
    """The one word for an outcome, in spans and logs."""
    if isinstance(outcome, Failed):
        return _FAILED.get(outcome.error.code, "failed")
    return type(outcome).__name__.lower()


def reason(outcome: Outcome) -> str:
    """Why a request ended so, in words; empty for an answer, and for a return that nothing caused."""
    match outcome:
        case Failed(error) | Buried(error):
            return error.message
        case Moved(why=why):
            return why
        case Returned(error=HeadraceError() as error):
            return error.message
        case Settled(last=None):
            return "published twice; the other copy is answered"
        case Settled():
            return "it had ended before"
        case Abandoned(why):
            return why
        case _:
            return ""


def delivered_again(deliveries: int, tries: int) -> str:
    """Why a message was delivered before, in words; empty at the first delivery.

    Args:
        deliveries: how often it was delivered, this time included.
        tries: how many of these count as attempts, this one included.
    """
    returned, lost = deliveries - tries, tries - 1
    said = [f"{lost} of its deliveries ended without an answer"] if lost else []
    said += [f"{returned} of its deliveries returned it"] if returned > 0 else []
    return "; ".join(said)


def closing(outcome: Outcome) -> HeadraceError | Success | None:
    """What closed the request's record; None where the record stays open, or another process closed it."""
    match outcome:
        case Answered(answer):
            return answer
        case Failed(error) | Buried(error):
            return error
        case _:
            return None


def steps(outcome: Outcome) -> tuple[EndStep, ...]:
    """What is done at the broker for an outcome, in this order.

    A process may die between any two steps, so what makes a request findable comes before what removes it. A dead
    letter precedes the last message: a reader that is told to look for the letter finds it. The last message precedes
    the acknowledgement: a redelivery finds the record closed, and stores the account again, which the broker takes
    once. A moved request is stored before it is acknowledged: it is in two places rather than in none. A return is
    noted before the nak: the next delivery may follow at once.
    """
    match outcome:
        case Answered() | Failed():
            return (EndStep.CLOSE, EndStep.FORWARD, EndStep.ACCOUNT, EndStep.REMOVE, EndStep.TELL)
        case Buried():
            return (EndStep.LETTER, EndStep.CLOSE, EndStep.FORWARD, EndStep.ACCOUNT, EndStep.REMOVE, EndStep.TELL)
        case Moved():
            return (EndStep.MOVE, EndStep.REMOVE, EndStep.TELL)
        case Returned(uses_attempt=False):
            return (EndStep.NOTE, EndStep.RETURN, EndStep.TELL)
        case Returned():
            return (EndStep.RETURN, EndStep.TELL)
        case Settled(last=None):
            return (EndStep.REMOVE,)
        case Settled():
            return (EndStep.FORWARD, EndStep.ACCOUNT, EndStep.REMOVE)
        case Abandoned(why=Loss.STOOD_STILL):
            return (EndStep.NOTE,)
        case Abandoned():
            return ()
        case _:
            assert_never(outcome)


def last_message(outcome: Outcome, envelope: Envelope) -> Last | None:
    """The last message of the record after an outcome; None where the record stays open, or is another copy's."""
    match outcome:
        case Answered(answer):
            return answer
        case Failed(error) | Buried(error):
            return error_answer(envelope, error)
        case Settled(last):
            return last
        case _:
            return None


def moved_headers(
    moved: Moved, envelope: Envelope, headers: Mapping[str, str], *, ids: MoveIds, sequence: int, stored_at: float
) -> dict[str, str]:
    """The headers under which a request is stored again.

    Args:
        moved: the move.
        envelope: the request's.
        headers: the request's, as it was delivered.
        ids: makes the new message's id.
        sequence: of the message that was delivered.
        stored_at: when that message was stored, UTC seconds. With the sequence it makes the new message's id: a process
            that dies between the two steps of a move is followed by one that stores the same message once.
    """
    ours = {
        MSG_ID: ids.make(envelope.name, moved.how, sequence, stored_at),
        MOVED_STORED_AT: repr(envelope.stored_at),
        MOVED_REASON: moved.why,
        TASK: moved.task,
    }
    return carried(headers) | ours | ({MOVED_BY: moved.by} if moved.by else {})


def event(
    outcome: Outcome, envelope: Envelope, *, engine: EngineName | None, began: bool, waited_ms: float
) -> RequestEvent | None:
    """The event that an outcome publishes, or None.

    Args:
        outcome: how the request ended.
        envelope: the request's.
        engine: whose worker ended it, None for a router or a monitor.
        began: whether the event `started` was published for this delivery. Without it the request is still queued for
            every listener, and its return is no news.
        waited_ms: how long the request had been stored when this delivery was made.
    """
    kind = event_kind(outcome)
    if kind is None or (kind == "returned" and not began):
        return None
    said = RequestEvent(envelope.name, kind, envelope.priority, engine, tenant=envelope.tenant)
    match outcome:
        case Answered(answer):
            account = answer.headrace
            said.wait_ms, said.ttft_ms, said.total_ms = account.queue_ms, account.ttft_ms, account.total_ms
            said.reason = account.reason
            said.prompt_tokens, said.completion_tokens = answer.usage.prompt_tokens, 0
            if isinstance(answer, Completion):
                said.prompt_tokens = answer.usage.computed_prompt_tokens
                said.completion_tokens = answer.usage.completion_tokens
        case Failed(error) | Buried(error):
            said.code = error.code
        case Moved():
            said.engine, said.wait_ms, said.reason = None, round(waited_ms, 3), outcome.why
        case _:
            pass
    return said


def event_kind(outcome: Outcome) -> EventKind | None:
    """The kind of event, as the wire contract names it; None where nothing is published."""
    match outcome:
        case Answered():
            return "done"
        case Failed(error):
            return _FAILED.get(error.code, "failed")
        case Buried():
            return "failed"
        case Moved(how=how, by=""):
            return _MOVED.get(how)
        case Returned():
            return "returned"
        case _:
            return None
