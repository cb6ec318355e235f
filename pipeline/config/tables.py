"""Settings that are tables with keys of their own: API keys, sampling, and single models."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from pipeline.config.declaring import ValueKind
from pipeline.config.kinds import (
    AdapterFolder,
    AdapterFolders,
    Arguments,
    Bytes,
    BytesOrZero,
    Count,
    DraftPlace,
    DraftTokens,
    KvBits,
    KvGroup,
    KvTokens,
    Number,
    Rate,
    Seconds,
    Share,
    Slots,
    Switch,
    TemplateFile,
    Urgency,
)
from pipeline.config.model_options import ModelOptions
from pipeline.wire.subjects import Priority

_C = TypeVar("_C", bound=ModelOptions)


class HttpKey(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """An API key of the HTTP gateway and its permissions.

    Attributes:
        name: the prefix of its requests' ids, and its name in rate limits.
        hash: of the key, as `sha256:<salt>:<digest>`. The key itself is not stored.
        tenant: the tenant of its requests; by default its name.
        priority: of requests that name none.
        highest: the most urgent priority that it can use.
        operator: whether it sees, cancels and replays the requests of every tenant instead of its own only.
        answers_per_s, lists_per_s, statistics_per_s: its rate limits instead of the configured ones; 0 for no limit.
        requests_per_minute, tokens_per_minute, tokens_per_day: its quotas of requests for answers; 0 for no limit. The
            day is that of UTC.
    """

    # `LLM` is excluded because the ids that the broker generates begin with it: the key would see every request
    # that was sent without an id.
    name: Annotated[
        str,
        Meta(pattern="^(?!LLM$)[A-Za-z0-9]{1,32}$"),
        ValueKind("NAME", "a valid key name", 'Use 1 to 32 letters or digits, except "LLM".'),
    ]
    hash: Annotated[
        str,
        Meta(pattern="^sha256:[0-9A-Za-z]{8,64}:[0-9a-f]{64}$"),
        ValueKind("HASH", "a key's hash (sha256:<salt>:<digest>)", "`headrace key add` makes one.", secret=True),
    ]
    tenant: Annotated[
        str,
        Meta(pattern="^[A-Za-z0-9_.-]{0,64}$"),
        ValueKind("TENANT", "a valid tenant", "Use at most 64 letters, digits, `_`, `.` or `-`."),
    ] = ""
    priority: Urgency = Priority.MEDIUM
    highest: Urgency = Priority.HIGH
    operator: Switch = False
    answers_per_s: Rate | None = None
    lists_per_s: Rate | None = None
    statistics_per_s: Rate | None = None
    requests_per_minute: Number = 0
    tokens_per_minute: Number = 0
    tokens_per_day: Number = 0


HttpKeys = Annotated[list[HttpKey], ValueKind("LIST", "a list of tables, one for each API key")]


class Sampling(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are sampled where a request does not say it. None: as the model's `generation_config.json` says."""

    temperature: Annotated[float, Meta(ge=0, le=100), ValueKind("N", "a number from 0 to 100")] | None = None
    top_p: Share | None = None
    top_k: Number | None = None
    min_p: Share | None = None
    repetition_penalty: (
        Annotated[float, Meta(gt=0, le=100), ValueKind("N", "a number greater than 0 and at most 100")] | None
    ) = None


SamplingTable = Annotated[
    Sampling,
    ValueKind("TABLE", "a table of temperature, top_p, top_k, min_p and repetition_penalty"),
]


class ModelEntry(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """One of several models of an MLX worker, as a table `[models.NAME]`.

    Those of its keys that are settings as well take the place of the setting for this model.

    Attributes:
        path: as `--model`; by default the name of the table.
        aliases: further names under which requests ask for it.
        pinned: it is loaded at the start and stays in memory.
        idle_s: it leaves memory when it has had no request for this long.
        bytes: the memory that it takes; by default it is found from its files.
    """

    path: Annotated[str, ValueKind("NAME_OR_PATH", "the name, the folder or the GGUF file of a model")] = ""
    aliases: Annotated[list[str], ValueKind("LIST", "a list of names")] = field(default_factory=list)
    pinned: Switch = False
    idle_s: Seconds | None = None
    bytes: Bytes | None = None
    chat_template: TemplateFile | None = None
    template_arguments: Arguments | None = None
    sampling: SamplingTable | None = None
    context_tokens: Number | None = None
    default_max_tokens: Count | None = None
    slots: Slots | None = None
    kv_bytes_limit: BytesOrZero | None = None
    prompt_cache: Switch | None = None
    float32_weights: Switch | None = None
    adapter_path: AdapterFolder | None = None
    adapters: AdapterFolders | None = None
    draft_model: DraftPlace | None = None
    draft_tokens: DraftTokens | None = None
    kv_bits: KvBits | None = None
    kv_group_size: KvGroup | None = None
    quantized_kv_start: KvTokens | None = None
    max_kv_size: KvTokens | None = None

    def over(self, config: _C) -> _C:
        """The settings with those of this model in their place."""
        own = {name: getattr(self, name) for name in self.__struct_fields__ if name in config.__struct_fields__}
        return msgspec.structs.replace(config, **{name: value for name, value in own.items() if value is not None})


ModelTables = Annotated[dict[str, ModelEntry], ValueKind("TABLE", "a table with a table for each model")]
