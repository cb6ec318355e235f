"""Passing a request on: moving it to another lane or stream, and giving it back to the one it came from.

A request that moves is stored there first and then acknowledged here, so that it is never nowhere. A move has a message
id of its own: whoever dies between the two steps is followed by another that stores it once.
"""

from __future__ import annotations

import logging

from pipeline.broker.connection import BusError, Delivery
from pipeline.broker.jetstream import Bus, Fenced, LaneFull
from pipeline.config import Config
from pipeline.core.envelope import Envelope
from pipeline.core.models import mlx_model_for
from pipeline.process.role import Role
from pipeline.telemetry import Tracing
from pipeline.wire.requests import EmbeddingRequest, Request
from pipeline.wire.subjects import (
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    RETURNED,
    STREAM_STATE,
    TASK,
    Lane,
    Move,
    Task,
    carried,
    moved_id,
)

log = logging.getLogger(__name__)

# Longer than a request waits between two deliveries; what is forgotten counts as an attempt.
_GIVEN_BACK_KEPT_S = 24 * 3600
# Those who note the same request's deliveries at the same moment are few.
_TRIES = 5


async def move(
    bus: Bus, tracing: Tracing, delivery: Delivery, envelope: Envelope, *, to: str, how: Move, task: Task, reason: str
) -> bool:
    """Store a request under subject `to` and acknowledge it where it was.

    Returns:
        Whether it was moved: a full lane does not take it, and it stays where it is.

    Raises:
        Unreachable: the broker is away; the request may be stored already, and comes again.
    """
    headers = carried(delivery.message.headers) | {
        MSG_ID: moved_id(envelope.id, how, delivery.sequence, delivery.stored_at),
        MOVED_STORED_AT: repr(envelope.stored_at),
        MOVED_REASON: reason,
        TASK: task,
    }
    with tracing.publish(to, headers, request_id=envelope.id):
        try:
            await bus.store(to, delivery.message.data, headers=headers)
        except LaneFull:
            return False
    await delivery.ack()
    return True


async def return_to_mlx(
    me: Role, config: Config, delivery: Delivery, envelope: Envelope, request: Request, *, why: str
) -> bool:
    """Move a request from Ollama's lane to the lane that only MLX serves.

    Returns:
        Whether it was moved: MLX makes no embeddings, may not have the model it asks for, or the lane be full.

    Raises:
        Unreachable: as `move`.
    """
    if isinstance(request, EmbeddingRequest):
        return False
    served = me.peers.models("mlx")
    if mlx_model_for(request.wanted_model, config.spill_models, served, config.internal_models) is None:
        return False
    return await move(
        me.bus,
        me.tracing,
        delivery,
        envelope,
        to=Lane(envelope.priority, Task.COMPLEX).subject,
        how=Move.RETURNED,
        task=envelope.task,
        reason=f"back from ollama: {why}",
    )


async def give_back(bus: Bus, delivery: Delivery, envelope: Envelope, *, delay_s: float = 0.0) -> None:
    """Let somebody else have a request, at once or after a while, without using up one of its attempts."""
    await count_as_given_back(bus, delivery, envelope)
    await delivery.nak(delay_s)


async def count_as_given_back(bus: Bus, delivery: Delivery, envelope: Envelope) -> None:
    """Have a delivery of which nothing was made use up no attempt, whoever has the request by now."""
    headers = {"Nats-TTL": f"{_GIVEN_BACK_KEPT_S}s"}
    try:
        for _ in range(_TRIES):
            sequence, times = await _given_back(bus, delivery)
            try:
                await bus.store(
                    _returned_subject(delivery), str(times + 1).encode(), headers=headers, expected_last=sequence
                )
            except Fenced:
                continue
            return
    except BusError as error:
        log.warning("%s: a delivery counts as an attempt though nothing was made of it: %s", envelope.id, error)


async def times_given_back(bus: Bus, delivery: Delivery) -> int:
    """How many of a message's deliveries were given back."""
    return (await _given_back(bus, delivery))[1]


async def _given_back(bus: Bus, delivery: Delivery) -> tuple[int, int]:
    """The sequence of the note, 0 where there is none, and how many deliveries it counts."""
    found = await bus.last_message(STREAM_STATE, _returned_subject(delivery))
    return (0, 0) if found is None else (found[0], int(found[1]))


def _returned_subject(delivery: Delivery) -> str:
    """Of the message and not of the request: where that moves or is replayed, its deliveries are counted anew."""
    return f"{RETURNED}.{delivery.consumer}-{delivery.sequence}"
