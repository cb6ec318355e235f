"""The streams and consumers on the broker as data, and bringing a broker to that state.

Applying is idempotent: a second start changes nothing. A changed setting is updated if the server can do that, and
refused with a clear message if it cannot.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
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

from pipeline.aio import cancellation_kept
from pipeline.broker.connection import Connection, Unreachable
from pipeline.config import Config
from pipeline.wire.subjects import (
    BATCHES,
    DEAD,
    DUPLICATE_WINDOW_S,
    FILE_CHUNKS,
    FILE_NOTES,
    FORMER_CONSUMERS,
    GUARD_LANE,
    LANES,
    LEADER,
    LOAD,
    PAUSED,
    QUEUED_PREFIX,
    RETURNED,
    STREAM_BATCH,
    STREAM_DEAD,
    STREAM_FILES,
    STREAM_OLLAMA,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    STREAM_STATE,
    STREAM_USAGE,
    STREAM_USED,
    TENANT_LANES,
    TENANTS_LANES,
    USAGE,
    USED,
    USED_STORED,
    WORKER,
    Lane,
    Priority,
    ollama_consumer,
    ollama_subject,
)

REPLIES_KEPT_S = 600.0
# Answers are kept for readers up to this size; the oldest are removed first.
REPLIES_MAX_BYTES = 512 << 20
DEAD_KEPT_S = 30 * 24 * 3600.0
FILES_KEPT_S = 30 * 24 * 3600.0
# As long as a record, so that a request which is delivered again counts once, and a lease more. Readers of the notes
# know requests for this time as well.
USED_DUPLICATE_WINDOW_S = REPLIES_KEPT_S + 60.0
# Notes that no monitor has counted are kept up to this size, about 700,000 of them.
USED_MAX_BYTES = 256 << 20
# Each worker publishes its status every second.
_WORKERS_HEARD_AFTER_S = 1.5
# A backstop: the router spills no more than Ollama has room for.
OLLAMA_LANE_MAX_MESSAGES = 1000


class _AccountInfo(msgspec.Struct):
    """The part that is read of what the server says of an account: an error has no `storage`."""

    storage: int | None = None


_info_decoder = msgspec.json.Decoder(_AccountInfo)


class TopologyError(Exception):
    """A stream or consumer on the broker cannot be changed to the configured one. The message says what to do."""


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
    """One change that `apply` made."""

    what: str
    action: str


def _consumer(name: str, subject: str, config: Config) -> ConsumerConfig:
    return ConsumerConfig(
        durable_name=name,
        filter_subject=subject,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=config.lease_s,
        max_deliver=-1,
        max_ack_pending=-1,
    )


def lane_consumer(lane: Lane, config: Config) -> ConsumerConfig:
    """The consumer of a lane of `LLM`. The monitor makes and removes those of named tenants."""
    return _consumer(lane.consumer, lane.subject, config)


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
    """All of headrace's streams and consumers, the most important streams first."""
    return (
        Stream(_requests(config), tuple(lane_consumer(lane, config) for lane in (*LANES, GUARD_LANE))),
        Stream(_spilled(config), tuple(_consumer(ollama_consumer(p), ollama_subject(p), config) for p in Priority)),
        Stream(_replies(config)),
        Stream(_state(config)),
        Stream(_dead(config)),
        Stream(_batches(config)),
        Stream(_used(config)),
        Stream(_usage(config)),
        Stream(_files(config)),
    )


def _requests(config: Config) -> StreamConfig:
    """Queued requests, by lane. Each is announced without its body when it is stored, so that workers need not poll."""
    subjects = [lane.subject for lane in LANES + TENANT_LANES]
    stream = _work_queue(STREAM_REQUESTS, subjects, config.lane_max_messages, config)
    # Each subject is bounded, and names of tenants are without number.
    stream.max_msgs = len(LANES) * config.lane_max_messages + len(Priority) * config.tenants_max_messages
    # No older version can change the stream again: it stores moved requests under ids that this one does not accept.
    stream.deny_purge = True
    stream.republish = RePublish(src="llm.request.>", dest=f"{QUEUED_PREFIX}.>", headers_only=True)
    return stream


def _spilled(config: Config) -> StreamConfig:
    """Requests that Ollama, or a server of OpenAI's API, is to answer. They are announced as the others are."""
    stream = _work_queue(STREAM_OLLAMA, [ollama_subject(p) for p in Priority], OLLAMA_LANE_MAX_MESSAGES, config)
    stream.republish = RePublish(src="llm.ollama.>", dest=f"{QUEUED_PREFIX}.ollama.>", headers_only=True)
    return stream


def _replies(config: Config) -> StreamConfig:
    """Answers, for live and late readers."""
    return StreamConfig(
        name=STREAM_REPLIES,
        subjects=["llm.out.>"],
        # Workers write to llm.out; messages that the stream accepts appear under llm.reply, for live and late readers.
        # A subscriber to llm.out would also see the messages that the fence refuses.
        subject_transform=SubjectTransform(src="llm.out.>", dest="llm.reply.>"),
        republish=RePublish(src="llm.reply.>", dest="llm.reply.>"),
        retention=RetentionPolicy.LIMITS,
        # An acknowledged request is removed, so its answer must survive a crash of the broker: it is the only sign that
        # the request was answered.
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=REPLIES_KEPT_S,
        max_bytes=REPLIES_MAX_BYTES,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def _state(config: Config) -> StreamConfig:
    """The latest value of what must outlive a process: load, returns, leaders."""
    return StreamConfig(
        name=STREAM_STATE,
        subjects=[f"{LOAD}.*", f"{RETURNED}.*", f"{LEADER}.*", PAUSED, TENANTS_LANES],
        retention=RetentionPolicy.LIMITS,
        # As durable as the delivery counts from which the returns noted here are subtracted.
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_msg_ttl=True,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def _dead(config: Config) -> StreamConfig:
    """Dead letters."""
    return StreamConfig(
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


def _used(config: Config) -> StreamConfig:
    """A note on each request that ended. The monitor removes those that are counted and old."""
    return StreamConfig(
        name=STREAM_USED,
        subjects=[USED],
        republish=RePublish(src=USED, dest=USED_STORED, headers_only=True),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_bytes=USED_MAX_BYTES,
        duplicate_window=USED_DUPLICATE_WINDOW_S,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def _usage(config: Config) -> StreamConfig:
    """The accounts of use by hour, day and month."""
    return StreamConfig(
        name=STREAM_USAGE,
        subjects=[f"{USAGE}.*.*"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_msgs_per_subject=1,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_msg_ttl=True,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def _batches(config: Config) -> StreamConfig:
    """Batches: the order, the state, and the results until the output file is written."""
    return StreamConfig(
        name=STREAM_BATCH,
        subjects=[f"{BATCHES}.*.*"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.OLD,
        max_age=FILES_KEPT_S,
        duplicate_window=DUPLICATE_WINDOW_S,
        # A new state replaces the one before it.
        allow_rollup_hdrs=True,
        allow_direct=True,
        num_replicas=config.replicas,
    )


def _files(config: Config) -> StreamConfig:
    """Files, as an object store of NATS (ADR-20). A full one refuses a new file."""
    return StreamConfig(
        name=STREAM_FILES,
        subjects=[f"{FILE_CHUNKS}.>", f"{FILE_NOTES}.>"],
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        discard=DiscardPolicy.NEW,
        max_age=FILES_KEPT_S,
        max_bytes=config.files_max_bytes,
        duplicate_window=DUPLICATE_WINDOW_S,
        allow_rollup_hdrs=True,
        allow_direct=True,
        num_replicas=config.replicas,
    )


async def apply(js: JetStreamContext, config: Config) -> list[Change]:
    """Bring the broker to the configured state.

    Returns:
        What was created or changed; nothing the second time.

    Raises:
        TopologyError: the broker refused a change.
        Unreachable: the broker does not answer, or is not ready yet.
    """
    changes = []
    try:
        with cancellation_kept():
            await _refuse_older_workers(js)
        for stream in streams(config):
            with cancellation_kept():
                if action := await _apply_stream(js, stream.config):
                    changes.append(Change(f"stream {stream.name}", action))
                if stream.name == STREAM_REQUESTS:
                    changes += await _remove_former(js)
                for consumer in stream.consumers:
                    action = await _apply_consumer(js, stream.name, consumer)
                    changes += [Change(f"consumer {stream.name}/{consumer.durable_name}", action)] if action else []
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"The broker's streams cannot be read: {str(error) or type(error).__name__}") from error
    return changes


async def _remove_former(js: JetStreamContext) -> list[Change]:
    """Remove the consumers that served all tenants together. What they had delivered is delivered again by others."""
    if not await _has_consumer(js, FORMER_CONSUMERS[0]):
        return []
    for name in reversed(FORMER_CONSUMERS):
        with contextlib.suppress(NotFoundError):
            await _refusable(f"removing consumer {STREAM_REQUESTS}/{name}", js.delete_consumer(STREAM_REQUESTS, name))
    return [Change(f"consumer {STREAM_REQUESTS}/{name}", "removed") for name in FORMER_CONSUMERS]


async def _has_consumer(js: JetStreamContext, name: str) -> bool:
    try:
        await js.consumer_info(STREAM_REQUESTS, name)
    except NotFoundError:
        return False
    return True


async def keep_consumer(js: JetStreamContext, consumer: ConsumerConfig) -> None:
    """Create a consumer of `LLM`, or bring it to the configured state.

    Raises:
        TopologyError: the broker refused it.
        Unreachable: the broker does not answer.
    """
    try:
        with cancellation_kept():
            await _apply_consumer(js, STREAM_REQUESTS, consumer)
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"No answer: {str(error) or type(error).__name__}") from error


async def remove_consumer(js: JetStreamContext, name: str) -> None:
    """Remove a consumer of `LLM`; one that does not exist is none.

    Raises:
        Unreachable: the broker does not answer, or refuses.
    """
    try:
        with cancellation_kept(), contextlib.suppress(NotFoundError):
            await js.delete_consumer(STREAM_REQUESTS, name)
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"No answer: {str(error) or type(error).__name__}") from error


async def _refuse_older_workers(js: JetStreamContext) -> None:
    """Refuse to change the streams of an older version while its workers run.

    The versions do not accept each other's moves, or pull from other consumers.

    Raises:
        TopologyError: a worker publishes its status.
    """
    try:
        is_older = not (await js.stream_info(STREAM_REQUESTS)).config.deny_purge
    except NotFoundError:
        return
    if not is_older and not await _has_consumer(js, FORMER_CONSUMERS[0]):
        return
    statuses = await js._nc.subscribe(f"{WORKER}.*")  # noqa: SLF001 - the connection of this context
    try:
        found = await statuses.next_msg(_WORKERS_HEARD_AFTER_S)
    except TimeoutError:
        return
    finally:
        await statuses.unsubscribe()
    raise TopologyError(
        f"Worker {found.subject.removeprefix(f'{WORKER}.')} of an older version runs on this broker. "
        "Stop all processes of that version, and start this one."
    )


async def present(js: JetStreamContext) -> set[str]:
    """The names of the existing streams.

    Raises:
        Unreachable: no answer. The broker does not answer a user who lacks the permission either.
    """
    try:
        with cancellation_kept():
            return {info.config.name or "" for info in await js.streams_info()}
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"The broker does not list its streams: {str(error) or type(error).__name__}") from error


async def is_on(bus: Connection) -> bool:
    """Whether JetStream answers on a connection. A broker that turned it off refuses at once, or stays silent."""
    return await stored_bytes(bus) is not None or not bus.is_connected


async def stored_bytes(bus: Connection) -> int | None:
    """How many bytes all streams have in files, of which `max_file_store` is the limit; None if JetStream is off."""
    try:
        answer = await bus.request("$JS.API.INFO")
    except Unreachable:
        return None
    return _info_decoder.decode(answer.data).storage


async def limit_requests(js: JetStreamContext, config: Config, max_bytes: int) -> None:
    """Limit the stream of requests to max_bytes; -1 for no limit. Those that it holds stay.

    Raises:
        TopologyError: the broker refused the change.
        Unreachable: the broker does not answer.
    """
    wanted = streams(config)[0].config
    wanted.max_bytes = max_bytes
    try:
        with cancellation_kept():
            await _refusable(f"the limit of stream {wanted.name}", js.update_stream(wanted))
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"No answer: {str(error) or type(error).__name__}") from error


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
            f"The broker refused {what}{changing}: {error.description}. "
            "Drain the stream and delete it (`nats stream rm`), or restore the setting."
        ) from error


def _differences(wanted: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """The wanted settings that differ at the broker. Settings that the server adds itself do not count."""
    return sorted(key for key, value in wanted.items() if value is not None and value != _like(value, present.get(key)))


def _like(wanted: Any, present: Any) -> Any:
    """The present value; the server leaves out zero values."""
    return type(wanted)() if present is None and not isinstance(wanted, dict) else present
