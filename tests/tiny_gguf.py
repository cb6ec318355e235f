"""A tiny model with random weights as a GGUF file, which llama.cpp loads: Llama's shape, one token for each character.

Only ASCII is in its vocabulary. Its answers are noise, and they end only at a limit.
"""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import numpy as np

EMBEDDING, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 32, 4, 2, 64, 2, 2048
SPECIAL = ("<|end|>", "<|start|>")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "<|start|>assistant\n"
)
TOOLS_TEMPLATE = "{% if tools %}<|start|>system\nTools: {{ tools | tojson }}<|end|>\n{% endif %}" + TEMPLATE
SHOWN = string.digits + string.ascii_letters + string.punctuation


def write(path: Path, *, seed: int = 1, template: str = TEMPLATE, quantized: bool = False) -> Path:
    """Write the file. Quantized weights are Q8_0."""
    random = np.random.default_rng(seed)
    # As GPT-2's byte-level vocabularies spell a space and a newline.
    tokens = [*SPECIAL, *SHOWN, "\u0120", "\u010a"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBEDDING)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBEDDING // HEADS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantized else gguf.LlamaFileType.ALL_F32)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    writer.add_token_merges(["\u0120 \u010a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)

    def add(name: str, *shape: int) -> None:
        weights = (np.ones(shape) if len(shape) == 1 else random.normal(0, 0.3, shape)).astype(np.float32)
        if name == "output.weight":
            weights[: len(SPECIAL)] = 0
        if quantized and len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)

    add("token_embd.weight", len(tokens), EMBEDDING)
    add("output_norm.weight", EMBEDDING)
    add("output.weight", len(tokens), EMBEDDING)
    kv = EMBEDDING // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        add(f"{block}.attn_norm.weight", EMBEDDING)
        add(f"{block}.ffn_norm.weight", EMBEDDING)
        for part, shape in {
            "attn_q": (EMBEDDING, EMBEDDING),
            "attn_k": (kv, EMBEDDING),
            "attn_v": (kv, EMBEDDING),
            "attn_output": (EMBEDDING, EMBEDDING),
            "ffn_gate": (INNER, EMBEDDING),
            "ffn_up": (INNER, EMBEDDING),
            "ffn_down": (EMBEDDING, INNER),
        }.items():
            add(f"{block}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
