"""How an engine of headrace's own loads its model. These are settings as those of `pipeline.config.settings`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct, field

from pipeline.config.declaring import Setting
from pipeline.config.kinds import (
    AdapterFolder,
    AdapterFolders,
    DraftPlace,
    DraftTokens,
    KvBits,
    KvGroup,
    KvTokens,
    Switch,
)


class ModelOptions(Struct, frozen=True, kw_only=True):
    """The options of one model's load."""

    adapter_path: Annotated[
        AdapterFolder,
        Setting(
            "folder of an adapter to load into the model, as `mlx_lm.lora` writes it; empty for none",
            "The model then answers with it under its own name. LoRA, DoRA and full fine-tunes of mlx-lm are taken.",
            section="Model options",
        ),
    ] = ""
    adapters: Annotated[
        AdapterFolders,
        Setting(
            "LoRA adapters that requests choose by name, as {name = folder}",
            "Each name is a model in the lists. Requests with different adapters run in one batch. See "
            "[LoRA adapters](models.md#lora-adapters).",
        ),
    ] = field(default_factory=dict)
    draft_model: Annotated[
        DraftPlace,
        Setting(
            "small model of the same family that proposes tokens while one answer is written alone; empty for none",
            "The model checks the proposals, so answers stay its own. The draft model is used only while it makes "
            "them faster. See [A draft model](models.md#a-draft-model).",
        ),
    ] = ""
    draft_tokens: Annotated[DraftTokens, Setting("number of tokens that the draft model proposes at once")] = 3
    kv_bits: Annotated[
        KvBits,
        Setting(
            "bits of each value in the KV cache; 0 leaves them as the model computes them",
            "A quantized cache takes less memory, and answers change a little. mlx-lm does not batch such caches, so "
            "requests run one at a time and prompts are not kept.",
        ),
    ] = 0
    kv_group_size: Annotated[KvGroup, Setting("number of values that share one scale in a quantized KV cache")] = 64
    quantized_kv_start: Annotated[
        KvTokens, Setting("length of a sequence, in tokens, from which its KV cache is quantized")
    ] = 0
    max_kv_size: Annotated[
        KvTokens,
        Setting(
            "most tokens that a KV cache keeps, the first four and the latest ones; 0 for all",
            "An answer can be longer, but the model does not see what was dropped. Requests run one at a time, as "
            "with `kv_bits`.",
        ),
    ] = 0
    trust_remote_code: Annotated[
        Switch,
        Setting(
            "run Python code that comes with a model or its tokenizer",
            "Such code can do what the user can do. Without this setting, a model that needs it is not loaded.",
        ),
    ] = False
