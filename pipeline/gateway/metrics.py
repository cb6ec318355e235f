"""The gateway's metrics and the pipeline's statistics in Prometheus' text format (0.0.4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import get_args

from pipeline.core.statistics import QueueStatistics
from pipeline.core.usage import bounded
from pipeline.wire.messages import StoreReport, StoreState, WorkerStatus
from pipeline.wire.usage import UsageReport, UsageSums

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Tenants and keys that have labels of their own: those with the most tokens.
_MOST_NAMES = 100
_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HELP = {
    "headrace_http_requests_total": ("counter", "HTTP requests by kind of call and status."),
    "headrace_http_gone_total": ("counter", "Clients that disconnected before their answer was complete."),
    "headrace_http_first_byte_seconds": ("histogram", "From a request's head to the first byte of its response."),
    "headrace_http_open": ("gauge", "Open responses."),
    "headrace_foreign_messages_total": ("counter", "Messages in LLM_REPLIES that this gateway skipped: no answers."),
    "headrace_queued": ("gauge", "Queued requests, by priority."),
    "headrace_running": ("gauge", "Running requests, by priority."),
    "headrace_requests_total": ("counter", "Requests by priority and outcome."),
    "headrace_dead": ("gauge", "Dead letters."),
    "headrace_saturation": ("gauge", "Load of an engine over its capacity; 1 is full."),
    "headrace_slots": ("gauge", "Slots of an engine."),
    "headrace_slots_used": ("gauge", "Slots of an engine in use."),
    "headrace_server_ready": ("gauge", "1 if the server behind a worker answers and has a model, else 0."),
    "headrace_server_slots": ("gauge", "Slots of a server."),
    "headrace_server_slots_used": ("gauge", "Slots of a server in use."),
    "headrace_server_tokens_per_second": ("gauge", "Output of a server, tokens per second."),
    "headrace_store_state": ("gauge", "1 for the state of the broker's store: ok, low, full or failed."),
    "headrace_store_free_bytes": ("gauge", "Free space of the broker's store."),
    "headrace_store_total_bytes": ("gauge", "Size of the disk of the broker's store."),
    "headrace_prompt_tokens_total": ("counter", "Tokens of prompts that an engine has begun, by worker."),
    "headrace_draft_tokens_total": ("counter", "Tokens that the draft model has proposed, by worker."),
    "headrace_draft_tokens_accepted_total": ("counter", "Those that became part of answers, by worker."),
    "headrace_prompt_tokens_cached_total": ("counter", "Those that the prompt cache served, by worker."),
    "headrace_prompt_cache_bytes": ("gauge", "Size of the prompt cache in memory, by worker."),
    "headrace_prompt_cache_disk_bytes": ("gauge", "Size of its files on disk, by worker."),
    "headrace_usage_requests_total": ("counter", "Requests by tenant and outcome, since the month began (UTC)."),
    "headrace_usage_tokens_total": ("counter", "Tokens by tenant and kind, since the month began (UTC)."),
    "headrace_usage_key_requests_total": ("counter", "The same requests by API key."),
    "headrace_usage_key_tokens_total": ("counter", "The same tokens by API key."),
    "headrace_tokens_per_second": ("gauge", "Output of an engine, tokens per second."),
}

Labels = tuple[tuple[str, str], ...]
Sample = tuple[str, Labels, float]


class Metrics:
    """Counters and histograms. One writer: the gateway's event loop."""

    def __init__(self) -> None:
        self._counters: dict[tuple[str, Labels], float] = {("headrace_http_gone_total", ()): 0}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        key = (name, tuple(labels.items()))
        self._counters[key] = self._counters.get(key, 0) + 1

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        key = (name, tuple(labels.items()))
        # One count for each bound, one above the last bound, and the sum.
        cells = self._histograms.setdefault(key, [0.0] * (len(_BOUNDS_S) + 2))
        cells[sum(bound < seconds for bound in _BOUNDS_S)] += 1
        cells[-1] += seconds

    def text(
        self,
        statistics: QueueStatistics | None,
        store: StoreReport | None,
        workers: Iterable[WorkerStatus] = (),
        *,
        usage: UsageReport | None = None,
        open_responses: int,
        foreign: int,
    ) -> str:
        """All metrics; the pipeline's and the store's only if they are known.

        Args:
            statistics: the pipeline's.
            store: the report on the broker's store.
            workers: of MLX.
            usage: what its reader may see of the accounts of use.
            open_responses: of this gateway.
            foreign: how many messages in `LLM_REPLIES` this gateway skipped because they are no part of an answer.
        """
        samples = [
            *((name, at, value) for (name, at), value in self._counters.items()),
            ("headrace_http_open", (), open_responses),
            ("headrace_foreign_messages_total", (), foreign),
            *_of_prompts(workers),
        ]
        if statistics is not None:
            samples += _of_pipeline(statistics)
        if store is not None:
            samples += _of_store(store)
        if usage is not None:
            samples += _of_usage("headrace_usage", usage.month.tenants)
            samples += _of_usage("headrace_usage_key", usage.month.keys)
        return _written(samples, self._histograms)


def _written(samples: Iterable[Sample], histograms: Mapping[tuple[str, Labels], list[float]]) -> str:
    """The text, in the order of `_HELP`. A metric without a value is left out."""
    lines = defaultdict[str, list[str]](list)
    for name, labels, value in samples:
        lines[name].append(_line(name, labels, value))
    for (name, labels), cells in histograms.items():
        lines[name] += _rows(name, labels, cells)
    text: list[str] = []
    for name, (kind, what) in _HELP.items():
        if name in lines:
            text += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *lines[name]]
    return "\n".join(text) + "\n"


def _of_pipeline(statistics: QueueStatistics) -> Iterator[Sample]:
    for priority in ("high", "medium", "low"):
        lane = getattr(statistics, priority)
        at = (("priority", priority),)
        yield "headrace_queued", at, lane.queued
        yield "headrace_running", at, lane.running
        for outcome in ("done", "failed", "spilled", "cancelled", "expired"):
            yield "headrace_requests_total", (*at, ("outcome", outcome)), getattr(lane, outcome)
    for engine, load in statistics.engines.items():
        labels = (("engine", str(engine)),)
        yield "headrace_saturation", labels, load.saturation
        yield "headrace_slots", labels, load.slots.total
        yield "headrace_slots_used", labels, load.slots.used
        yield "headrace_tokens_per_second", labels, load.tokens_per_s
    for server in statistics.servers:
        which: Labels = (("dialect", server.dialect), ("server", server.server), ("worker", server.worker))
        yield "headrace_server_ready", which, int(server.state == "ready")
        yield "headrace_server_slots", which, server.slots.total
        yield "headrace_server_slots_used", which, server.slots.used
        yield "headrace_server_tokens_per_second", which, server.tokens_per_s
    yield "headrace_dead", (), statistics.dead


def _of_store(store: StoreReport) -> Iterator[Sample]:
    for state in get_args(StoreState):
        yield "headrace_store_state", (("state", state),), int(state == store.state)
    if store.total_bytes:
        yield "headrace_store_free_bytes", (), store.free_bytes
        yield "headrace_store_total_bytes", (), store.total_bytes


def _of_prompts(workers: Iterable[WorkerStatus]) -> Iterator[Sample]:
    for status in workers:
        at = (("worker", status.worker),)
        yield "headrace_prompt_tokens_total", at, status.prompt_tokens
        yield "headrace_prompt_tokens_cached_total", at, status.reused_tokens
        yield "headrace_prompt_cache_bytes", at, status.kept_bytes
        yield "headrace_prompt_cache_disk_bytes", at, status.stored_bytes
        yield "headrace_draft_tokens_total", at, status.drafted_tokens
        yield "headrace_draft_tokens_accepted_total", at, status.accepted_tokens


def _of_usage(name: str, sums: list[UsageSums]) -> Iterator[Sample]:
    for each in bounded(sums, _MOST_NAMES):
        of: Labels = (("tenant", each.tenant), *((("key", each.key),) if each.key else ()))
        for outcome in ("done", "failed", "cancelled", "expired"):
            yield f"{name}_requests_total", (*of, ("outcome", outcome)), getattr(each.requests, outcome)
        for kind in ("prompt", "completion", "cached", "reasoning", "spilled"):
            yield f"{name}_tokens_total", (*of, ("kind", kind)), getattr(each.tokens, kind)


def _rows(name: str, labels: Labels, cells: list[float]) -> Iterator[str]:
    total = 0.0
    for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), cells[:-1], strict=True):
        total += count
        yield _line(f"{name}_bucket", (*labels, ("le", bound)), total)
    yield _line(f"{name}_sum", labels, cells[-1])
    yield _line(f"{name}_count", labels, total)


def _line(name: str, labels: Labels, value: float) -> str:
    written = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{written}}} {value:.10g}" if written else f"{name} {value:.10g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
