"""The streams and consumers on the broker, as data, and bringing a broker to that state.

Applying is idempotent: a second start changes nothing, a changed setting is migrated where the server can, and refused
with a clear message where it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import nats.errors
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
    SubjectTransform,
)
from nats.js.errors import APIError, NotFoundError

from pipeline.broker.connection import Unreachable
from pipeline.config import Config
from pipeline.wire.subjects import (
    DEAD,
    DUPLICATE_WINDOW_S,
    LANES,
    LOAD,
    QUEUED_PREFIX,
    RETURNED,
    STREAM_DEAD,
    STREAM_OLLAMA,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    STREAM_STATE,
    Priority,
    ollama_consumer,
    ollama_subject,
)

REPLIES_KEPT_S = 600.0
# What is kept for readers is bounded: beyond this the oldest answers go first.
REPLIES_MAX_BYTES = 512 << 20
DEAD_KEPT_S = 30 * 24 * 3600.0
# A backstop only: the routing consumer spills no more than Ollama has room for.
OLLAMA_LANE_MAX_MESSAGES = 1000


class TopologyError(Exception):
    """The broker holds something that cannot become what is configured; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream and its durable consumers."""

    config: StreamConfig
    consumers: tuple[ConsumerConfig, ...] = field(default=())

    @property
    def name(self) -> str:
        """The stream's name."""
        return self.config.name or ""


@dataclass(frozen=True, slots=True)
class Change:
    """Something that `apply` did."""

    what: str
    action: str


def _lane_consumer(name: str, subject: str, config: Config) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=name,
        filter_subject=subject,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=config.lease_s,
        max_deliver=-1,
        max_ack_pending=-1,
    )


def _work_queue(name: str, subjects: list[str], max_messages: int, config: Config) -> StreamConfig:
    return StreamConfig(
        name=name,
        subjects=subjects,
        retention=RetentionPolicy.WORK_QUEUE,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        discard_new_per_subject=True,
        max_msgs_per_subject=max_messages,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def streams(config: Config) -> tuple[Stream, ...]:
    """Everything headrace keeps on the broker."""
    requests = _work_queue(STREAM_REQUESTS, [lane.subject for lane in LANES], config.lane_max_messages, config)
    # Every stored request is announced without its body, so that nobody has to ask whether there is work.
    requests.republish = RePublish(src="llm.request.>", dest=f"{QUEUED_PREFIX}.>", headers_only=True)
    spilled = _work_queue(STREAM_OLLAMA, [ollama_subject(p) for p in Priority], OLLAMA_LANE_MAX_MESSAGES, config)
    spilled.republish = RePublish(src="llm.ollama.>", dest=f"{QUEUED_PREFIX}.ollama.>", headers_only=True)
    replies = StreamConfig(
        name=STREAM_REPLIES,
        subjects=["llm.out.>"],
        # Engines write to llm.out; what the stream accepts appears under llm.reply, for live readers and late ones.
        # A plain subscriber of the subject an engine writes to would also see what the fence refuses.
        subject_transform=SubjectTransform(src="llm.out.>", dest="llm.reply.>"),
        republish=RePublish(src="llm.reply.>", dest="llm.reply.>"),
        retention=RetentionPolicy.LIMITS,
        # An acknowledged request is gone, so its answer must be there after a crash of the broker, or nobody could tell
        # that it was answered.
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=REPLIES_KEPT_S,
        max_bytes=REPLIES_MAX_BYTES,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_direct=True,
        num_replicas=config.replicas,
    )
    state = StreamConfig(
        name=STREAM_STATE,
        subjects=[f"{LOAD}.*", f"{RETURNED}.*"],
        retention=RetentionPolicy.LIMITS,
        # As durable as the delivery counts from which it is taken off what was given back.
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_msg_ttl=True,
        allow_direct=True,
        num_replicas=config.replicas,
    )
    dead = StreamConfig(
        name=STREAM_DEAD,
        subjects=[f"{DEAD}.*"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=DEAD_KEPT_S,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_direct=True,
        num_replicas=config.replicas,
    )
    return (
        Stream(requests, tuple(_lane_consumer(lane.consumer, lane.subject, config) for lane in LANES)),
        Stream(spilled, tuple(_lane_consumer(ollama_consumer(p), ollama_subject(p), config) for p in Priority)),
        Stream(replies),
        Stream(state),
        Stream(dead),
    )


async def apply(js: JetStreamContext, config: Config) -> list[Change]:
    """Bring the broker to the configured state.

    Returns:
        What was created or changed; nothing, the second time.

    Raises:
        TopologyError: something there cannot be changed into what is configured.
        Unreachable: the broker does not answer, or cannot yet.
    """
    changes = []
    try:
        for stream in streams(config):
            if action := await _apply_stream(js, stream.config):
                changes.append(Change(f"stream {stream.name}", action))
            for consumer in stream.consumers:
                action = await _apply_consumer(js, stream.name, consumer)
                changes += [Change(f"consumer {stream.name}/{consumer.durable_name}", action)] if action else []
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"the broker's streams were not looked at: {str(error) or type(error).__name__}") from error
    return changes


async def present(js: JetStreamContext) -> set[str]:
    """The names of the streams that are there.

    Raises:
        Unreachable: the broker does not say, which is also its way of telling a user that may not ask.
    """
    try:
        return {info.config.name or "" for info in await js.streams_info()}
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"not listed by the broker: {str(error) or type(error).__name__}") from error


async def _apply_stream(js: JetStreamContext, wanted: StreamConfig) -> str | None:
    name = wanted.name or ""
    try:
        present = (await js.stream_info(name)).config
    except NotFoundError:
        await _refusable(f"stream {name}", js.add_stream(wanted))
        return "created"
    if not (differences := _differences(wanted.as_dict(), present.as_dict())):
        return None
    await _refusable(f"stream {name}", js.update_stream(wanted), differences)
    return f"updated ({', '.join(differences)})"


async def _apply_consumer(js: JetStreamContext, stream: str, wanted: ConsumerConfig) -> str | None:
    name = wanted.durable_name or ""
    try:
        present = (await js.consumer_info(stream, name)).config.as_dict()
    except NotFoundError:
        present = None
    differences = [] if present is None else _differences(wanted.as_dict(), present)
    if present is not None and not differences:
        return None
    await _refusable(f"consumer {stream}/{name}", js.add_consumer(stream, wanted), differences)
    return "created" if present is None else f"updated ({', '.join(differences)})"


async def _refusable(what: str, call: Any, differences: list[str] | None = None) -> None:
    try:
        await call
    except APIError as error:
        changing = f" while changing {', '.join(differences)}" if differences else ""
        raise TopologyError(
            f"the broker refused {what}{changing}: {error.description}. "
            "Drain it and delete the stream by hand (`nats stream rm`), or put the setting back."
        ) from error


def _differences(wanted: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The settings that are wanted and otherwise at the broker; what the server adds of itself does not count."""
    return sorted(key for key, value in wanted.items() if value is not None and value != _like(value, present.get(key)))


def _like(wanted: Any, present: Any) -> Any:
    """What the server leaves out is its zero value."""
    return type(wanted)() if present is None and not isinstance(wanted, dict) else present
