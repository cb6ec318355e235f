"""What the server answers to calls of JetStream's API, as far as it is read here."""

from __future__ import annotations

from datetime import datetime

import msgspec

# Codes of errors.
UNAVAILABLE = 503
NO_STREAM = 10059
WRONG_LAST_SEQUENCE = 10071
FULL = 10077
# The description with that code where the whole stream is full, and not a subject.
ALL_FULL = "maximum messages exceeded"


class Delivered(msgspec.Struct):
    """A consumer's progress: the sequence of the latest message that it delivered for the first time."""

    stream_seq: int = 0


class ConsumerState(msgspec.Struct):
    """A durable consumer: how many requests wait for it, and how many are delivered but not acknowledged."""

    name: str
    num_pending: int
    num_ack_pending: int
    delivered: Delivered


class StreamState(msgspec.Struct, frozen=True):
    """What a stream holds. Two equal states mean that nothing was stored or removed in between."""

    messages: int
    bytes: int
    first_seq: int
    last_seq: int


class ConsumerList(msgspec.Struct):
    """A page of a stream's consumers, and how many there are in all."""

    consumers: list[ConsumerState] = msgspec.field(default_factory=list)
    total: int = 0


class StreamInfo(msgspec.Struct):
    """What is said of a stream."""

    state: StreamState


class Subjects(msgspec.Struct):
    """The subjects of a stream, and how many messages each holds; None if there are none."""

    subjects: dict[str, int] | None = None


class SubjectsPage(msgspec.Struct):
    """A page of these, and how many subjects there are in all."""

    state: Subjects
    total: int = 0


class Removed(msgspec.Struct):
    """The sequences that were removed from a stream."""

    deleted: list[int] = msgspec.field(default_factory=list)


class StreamDetails(msgspec.Struct):
    """What is said of a stream, with these."""

    state: Removed


class Stamped(msgspec.Struct):
    """Any answer, for the server's time."""

    ts: datetime | None = None


class Rejection(msgspec.Struct):
    """Why the server refused a call."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct):
    """A stream's confirmation of a message, or why it took none."""

    seq: int = 0
    duplicate: bool = False
    error: Rejection | None = None


read_consumer_list = msgspec.json.Decoder(ConsumerList).decode
read_consumer_state = msgspec.json.Decoder(ConsumerState).decode
read_subjects_page = msgspec.json.Decoder(SubjectsPage).decode
read_stream_info = msgspec.json.Decoder(StreamInfo).decode
read_stream_details = msgspec.json.Decoder(StreamDetails).decode
read_stamped = msgspec.json.Decoder(Stamped).decode
read_puback = msgspec.json.Decoder(PubAck).decode


def error_in(answer: bytes) -> Rejection | None:
    """Why the server refused a call, by its answer; None if it did not."""
    return read_puback(answer).error
