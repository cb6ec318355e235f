"""Names on the broker (subjects, streams, durable consumers, headers), and the rules for ids and reply subjects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Priority(StrEnum):
    """How urgent a request is. It is part of the subject, so it never changes."""

    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


class Task(StrEnum):
    """Whether a smaller model can answer the request. `UNTRIAGED` until the publisher or the router decides."""

    UNTRIAGED = "untriaged"
    SIMPLE = "simple"
    COMPLEX = "complex"


class Move(StrEnum):
    """Why a request was stored again. `SPILLED`, `COMPLEX` and `RETURNED` happen to a request at most once.

    `REPLAYED` starts over: a dead letter was put back on its lane, and is handled like a new request. `PRIORITY`: an
    operator has changed the priority of a request that had not been moved; its message id says `replayed`, which older
    versions can read, and the header `Llm-Moved-By` is what tells the two apart.
    """

    SPILLED = "spilled"
    COMPLEX = "complex"
    RETURNED = "returned"
    REPLAYED = "replayed"
    PRIORITY = "priority"


class Lane(NamedTuple):
    """One bounded queue at the broker: one subject.

    Attributes:
        priority, task: of its requests.
        tenant: whose requests it holds; empty for the default tenant. `ANY_TENANT` stands for all others, as in the
            subjects of the stream; no consumer serves these as one.
    """

    priority: Priority
    task: Task
    tenant: str = ""

    @property
    def subject(self) -> str:
        """The subject to which its requests are published; a filter for `ANY_TENANT`."""
        base = f"llm.request.{self.priority}{self.tenant and f'.{_TENANT_TOKEN}.{self.tenant}'}"
        return base if self.task is Task.UNTRIAGED else f"{base}.{self.task}"

    @property
    def consumer(self) -> str:
        """The name of the durable consumer that delivers its requests.

        No two lanes have the same one, also where the server's file system does not tell capitals from small letters.
        """
        base = self.priority if self.task is Task.UNTRIAGED else f"{self.priority}_{self.task}"
        return f"{base}_{_TENANT_TOKEN}_{_as_file_name(self.tenant)}" if self.tenant else base


def _as_file_name(tenant: str) -> str:
    """A tenant's name as part of a file's name: `=` stands before what was a capital letter."""
    return "".join(f"={c.lower()}" if c.isupper() else c for c in tenant)


_TENANT_TOKEN = "t"  # noqa: S105 - a token of a subject
ANY_TENANT = "*"
LANES = tuple(Lane(priority, task) for priority in Priority for task in Task)
TENANT_LANES = tuple(lane._replace(tenant=ANY_TENANT) for lane in LANES)
# The subjects of all tenants but the default one.
TENANT_SUBJECTS = f"llm.request.*.{_TENANT_TOKEN}.>"
# A lane whose consumer always exists, of a name that no tenant can have. Before each tenant had consumers, some served
# all tenants together. Versions of that time cannot create theirs beside this one, and so they do not start.
GUARD_LANE = Lane(Priority.HIGH, Task.UNTRIAGED, "=")
# The consumers of these versions.
FORMER_CONSUMERS = tuple(
    f"{lane.priority}_{_TENANT_TOKEN}" + ("" if lane.task is Task.UNTRIAGED else f"_{lane.task}") for lane in LANES
)
_LANE_OF_SUBJECT = {lane.subject: lane for lane in LANES}
_LANE_OF_CONSUMER = {lane.consumer: lane for lane in LANES}
_CAPITAL = re.compile(r"=([a-z])")
_LANE_OF_FILTER = {lane.subject: lane for lane in TENANT_LANES}


def lane_of_subject(subject: str) -> Lane | None:
    """The lane of a request's subject in `LLM`, of any tenant; None for another subject."""
    if (lane := _LANE_OF_SUBJECT.get(subject)) is not None:
        return lane
    tokens = subject.split(".")
    if len(tokens) not in (5, 6):
        return None
    tenant, tokens[4] = tokens[4], ANY_TENANT
    lane = _LANE_OF_FILTER.get(".".join(tokens))
    return None if lane is None else lane._replace(tenant=tenant)


def lane_of_consumer(name: str) -> Lane | None:
    """The lane that a durable consumer of `LLM` serves; None for another name."""
    base, _, tenant = name.partition(f"_{_TENANT_TOKEN}_")
    lane = _LANE_OF_CONSUMER.get(base)
    return None if lane is None else lane._replace(tenant=_CAPITAL.sub(lambda found: found[1].upper(), tenant))


def ollama_subject(priority: Priority) -> str:
    """The subject of requests for Ollama."""
    return f"llm.ollama.{priority}"


def ollama_consumer(priority: Priority) -> str:
    """The durable consumer of `ollama_subject`."""
    return f"ollama_{priority}"


def stream_of(subject: str) -> str:
    """The stream of a request's subject."""
    return STREAM_OLLAMA if subject.startswith("llm.ollama.") else STREAM_REQUESTS


# Streams.
STREAM_REQUESTS = "LLM"
STREAM_OLLAMA = "LLM_OLLAMA"
STREAM_REPLIES = "LLM_REPLIES"
STREAM_STATE = "LLM_STATE"
STREAM_DEAD = "LLM_DEAD"
STREAM_BATCH = "LLM_BATCH"
STREAM_USED = "LLM_USED"
STREAM_USAGE = "LLM_USAGE"
# The object store of files, and the stream that NATS keeps it in.
BUCKET_FILES = "LLM_FILES"
STREAM_FILES = f"OBJ_{BUCKET_FILES}"
FILE_CHUNKS = f"$O.{BUCKET_FILES}.C"
FILE_NOTES = f"$O.{BUCKET_FILES}.M"

# Within this time, two requests with one id are the same request.
DUPLICATE_WINDOW_S = 120.0

# Headers.
MSG_ID = "Nats-Msg-Id"
EXPECTED_LAST_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"
STORED_SUBJECT = "Nats-Subject"
STORED_SEQUENCE = "Nats-Sequence"
STORED_TIME = "Nats-Time-Stamp"
REPLY_TO = "Reply-To"
TIMEOUT = "Llm-Timeout"
TASK = "Llm-Task"
TENANT = "Llm-Tenant"
# Set on a line of a batch: its id. Such a request never goes first because it has waited long.
BATCH = "Llm-Batch"
# Set by the gateway and the batches: the API key that a request is charged to, as `pipeline.core.charging` writes it.
KEY = "Llm-Key"
# Set on the result of a line: the number of the line.
LINE = "Llm-Line"
_KNOWN = (MSG_ID, REPLY_TO, TIMEOUT, TASK, TENANT, BATCH, "traceparent", "tracestate")
_SPELLING = {name.lower(): name for name in _KNOWN}
# Set by the pipeline on a request that it moves. Its `Nats-Msg-Id` is then made by `pipeline.core.moves`.
MOVED_STORED_AT = "Llm-Stored-At"
MOVED_REASON = "Llm-Reason"
# Set by the pipeline on a request whose priority an operator has changed: who did it.
MOVED_BY = "Llm-Moved-By"
# Set by the pipeline on a request that is sent again after it was cancelled. Later moves keep it.
ANEW = "Llm-Anew"
# Set by the pipeline on a dead letter, in addition to the request's own headers.
DEAD_ID = "Llm-Id"
DEAD_SUBJECT = "Llm-Subject"
DEAD_ERROR = "Llm-Error"
DEAD_ATTEMPTS = "Llm-Attempts"
DEAD_TRACE_ID = "Llm-Trace-Id"
# Set by the monitor on a cancel that it sends to the workers again.
RELAYED = "Llm-Relayed"

_ID = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_GENERATED_ID = re.compile(r"LLM-[0-9]+", re.ASCII)
_INBOX = "_INBOX."
_TENANT_INBOX = f"{_INBOX}{_TENANT_TOKEN}."
# The inboxes of the other users of a server with accounts.
_USER_INBOXES = (f"{_INBOX}client.", f"{_INBOX}engine.", f"{_INBOX}pipeline.")
# The server's own prefix. It replaces the reply subject of a request that comes from another account, and leads back.
_IMPORTED = "_R_."
_REPLY_PREFIXES = (_INBOX, "llm.reply.")
_SUBJECT_MAX_CHARS = 256


def request_name(tenant: str, request_id: str) -> str:
    """The name of a request, unique among all tenants: its id, or `t.<tenant>.<id>`.

    The default tenant is the empty one. Subjects, records, cancels and events go by the name.
    """
    return f"{_TENANT_TOKEN}.{tenant}.{request_id}" if tenant else request_id


def split_name(name: str) -> tuple[str, str]:
    """The tenant and the id in a request's name. Text that is no name is an id of the default tenant."""
    tokens = name.split(".")
    return (tokens[1], tokens[2]) if len(tokens) == 3 and tokens[0] == _TENANT_TOKEN else ("", name)


def is_request_name(text: str) -> bool:
    """Whether text is the name of a request, of any tenant."""
    tenant, request_id = split_name(text)
    return is_request_id(request_id) and (not tenant or is_tenant(tenant)) and text == request_name(tenant, request_id)


def is_tenant(text: str) -> bool:
    """Whether text can name a tenant: one subject token, no wildcard, at most 64 characters."""
    return _TENANT.fullmatch(text) is not None


# What `is_tenant` takes, as advice in an error.
TENANT_ADVICE = 'Use 1 to 64 letters, digits, "-" or "_".'


def tenant_of(subject: str) -> str:
    """The tenant that a subject under `llm.request` or `llm.ask` names; empty for the default tenant. Not validated."""
    tokens = subject.split(".")
    return tokens[4] if len(tokens) > 4 and tokens[3] == _TENANT_TOKEN else ""


def out_subject(name: str) -> str:
    """The subject that a worker writes an answer to. The stream accepts or refuses each message (fencing)."""
    return f"llm.out.{name}"


def reply_subject(name: str) -> str:
    """The subject on which readers find the messages that the stream accepted."""
    return f"llm.reply.{name}"


def is_request_id(text: str) -> bool:
    """Whether text is a valid request id: one subject token, no wildcard, at most 128 characters."""
    return _ID.fullmatch(text) is not None


def is_generated_id(text: str) -> bool:
    """Whether text has the form of an id that the broker assigns."""
    return _GENERATED_ID.fullmatch(text) is not None


def generated_id(stream_sequence: int) -> str:
    """The id of a request that was published without one, from the sequence in its PubAck."""
    return f"LLM-{stream_sequence}"


def is_reply_to(subject: str, name: str) -> bool:
    """Whether the answer of a request may be sent to subject.

    The subject must be a literal one under `_INBOX.` or `llm.reply.`: no wildcard, no white space, no empty token. It
    must not be the reply subject of another id that the broker assigns (`LLM-7`), nor belong to another tenant.
    """
    if not subject.startswith(_REPLY_PREFIXES) or not _is_literal(subject):
        return False
    if subject == reply_subject(name):
        return True
    tenant, _ = split_name(name)
    if subject.startswith(_INBOX):
        if subject.startswith(_TENANT_INBOX):
            return tenant != "" and subject.startswith(f"{_TENANT_INBOX}{tenant}.")
        return not (tenant and subject.startswith(_USER_INBOXES))
    own = reply_subject(request_name(tenant, ""))
    other = subject.removeprefix(own)
    if tenant:
        return subject.startswith(own) and not is_generated_id(other)
    return not is_generated_id(other) and not other.startswith(f"{_TENANT_TOKEN}.")


def is_inbox(subject: str) -> bool:
    """Whether a request's sender may be answered at subject.

    The server checks no permission on reply subjects. Any other subject would let the sender of a request publish,
    through the process that answers it, where it must not.
    """
    return subject.startswith((_INBOX, _IMPORTED)) and _is_literal(subject)


def is_imported(reply: str) -> bool:
    """Whether the server made this reply subject for a request from another account. Only its own account knows it."""
    return reply.startswith(_IMPORTED)


def _is_literal(subject: str) -> bool:
    """Whether a subject can be published to: no wildcard, no white space, no empty token, at most 256 characters."""
    return (
        len(subject) <= _SUBJECT_MAX_CHARS
        and all(token.isprintable() and not any(c in token for c in " *>") for token in subject.split(".") if token)
        and "" not in subject.split(".")
    )


def with_known_names(headers: dict[str, str]) -> dict[str, str]:
    """Headers with the names of a request's headers in this module's spelling: publishers write them in any case.

    Where a name occurs in several spellings, this module's wins.
    """
    odd = {name: known for name in headers if (known := _SPELLING.get(name.lower(), name)) != name}
    if not odd:
        return headers
    return {known: headers[name] for name, known in odd.items()} | {n: v for n, v in headers.items() if n not in odd}


def carried(headers: Mapping[str, str]) -> dict[str, str]:
    """A request's headers without those for the broker (`Nats-*`), which were meant for one publish."""
    return {name: value for name, value in headers.items() if not name.lower().startswith("nats-")}


# Core subjects.
ASK = "llm.ask"
CANCEL = "llm.cancel"
QUEUED_PREFIX = "llm.queued"
EVENT = "llm.event"
WORKER = "llm.worker"
TOKENS = "llm.tokens"
FETCH = "llm.fetch"
LOAD = "llm.load"
DEAD = "llm.dead"
RETURNED = "llm.returned"
BATCHES = "llm.batch"
USED = "llm.used"
USED_STORED = "llm.used.stored"
USAGE = "llm.usage"
RESERVED = "llm.reserved"
LEADER = "llm.leader"
PAUSED = "llm.paused"
TENANTS_LANES = "llm.lanes"
LEADER_MONITOR = f"{LEADER}.monitor"
LEADER_BATCHES = f"{LEADER}.batches"
STORE = "llm.store"
STORE_FAILED = f"{STORE}.failed"
QUEUE_STATS = "llm.queue.stats"
QUEUE_POSITION = "llm.queue.position"
QUEUE_POSITION_OF_TENANT = f"{QUEUE_POSITION}.{_TENANT_TOKEN}.{ANY_TENANT}"
QUEUE_PAUSE = "llm.queue.pause"
QUEUE_RESUME = "llm.queue.resume"
QUEUE_PAUSED = "llm.queue.paused"
QUEUE_MOVE = "llm.queue.move"
QUEUE_ANSWER = "llm.queue.answer"
QUEUE_ANSWER_OF_TENANT = f"{QUEUE_ANSWER}.{_TENANT_TOKEN}.{ANY_TENANT}"
QUEUE_USAGE = "llm.queue.usage"
QUEUE_USAGE_OF_TENANT = f"{QUEUE_USAGE}.{_TENANT_TOKEN}.{ANY_TENANT}"
MODELS = "llm.models"


def position_subject(tenant: str) -> str:
    """Where the position of a tenant's request is asked for, by its id."""
    return f"{QUEUE_POSITION}.{_TENANT_TOKEN}.{tenant}" if tenant else QUEUE_POSITION


def position_tenant(subject: str) -> str:
    """The tenant that a `position_subject` names; empty for the default tenant."""
    return subject.removeprefix(f"{QUEUE_POSITION}.{_TENANT_TOKEN}.") if subject != QUEUE_POSITION else ""


def usage_subject(tenant: str) -> str:
    """Where the accounts of use of a tenant are asked for; those of all tenants if it is empty."""
    return f"{QUEUE_USAGE}.{_TENANT_TOKEN}.{tenant}" if tenant else QUEUE_USAGE


def usage_tenant(subject: str) -> str | None:
    """The tenant whose accounts a subject under `QUEUE_USAGE` asks for; None for all accounts."""
    return subject.removeprefix(f"{QUEUE_USAGE}.{_TENANT_TOKEN}.") if subject != QUEUE_USAGE else None
