"""The figures of a worker with several models, from those of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.engine import EngineStatus


def joined(loaded: Mapping[str, EngineStatus], gone: Sequence[EngineStatus], held: int) -> EngineStatus:
    """The status of the whole, without its state and its models.

    The models compute on one machine, so its rates are the means of theirs. Loading is in none of them: they count the
    steps of the engines.

    Args:
        loaded: of the models in memory, by name.
        gone: of those that have been in memory.
        held: the requests that wait for a model. They take no slot, and have one each in these counts.
    """
    each = list(loaded.values())
    total, used = sum(one.slots_total for one in each), sum(one.slots_used for one in each)
    if not total:
        total = used = 1
    compute = next((one.compute for one in each if one.compute), "")
    return EngineStatus(
        state="loading",
        models=[],
        slots_used=used + held,
        slots_total=total + held,
        pending_tokens=sum(one.pending_tokens for one in each),
        tokens_per_s=_mean([one.tokens_per_s for one in each]),
        tokens_per_request=_mean([one.tokens_per_request for one in each]),
        pending_prompt_tokens=sum(one.pending_prompt_tokens for one in each),
        prompt_tokens_per_s=_mean([one.prompt_tokens_per_s for one in each]),
        prompt_tokens_per_request=_mean([one.prompt_tokens_per_request for one in each]),
        kv_bytes=sum(one.kv_bytes for one in each),
        kv_bytes_limit=sum(one.kv_bytes_limit for one in each),
        compute="; ".join(filter(None, (compute, f"in memory: {', '.join(loaded)}" if loaded else ""))),
        alone=next((one.alone for one in each if one.alone), ""),
        suspends=any(one.suspends for one in each),
        prompt_tokens=sum(one.prompt_tokens for one in (*each, *gone)),
        reused_tokens=sum(one.reused_tokens for one in (*each, *gone)),
        kept_bytes=sum(one.kept_bytes for one in each),
        stored_bytes=sum(one.stored_bytes for one in each),
    )


def _mean(rates: Sequence[float]) -> float:
    known = [rate for rate in rates if rate > 0]
    return sum(known) / len(known) if known else 0.0
