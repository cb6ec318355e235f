"""Layers with several LoRA adapters, in tiny models of many shapes. MLX runs in other processes only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

ROOT = Path(__file__).resolve().parents[5]

# Prints for some shapes how far the scores of rows with different adapters, computed together, are from those of
# mlx-lm's own layers; or why the adapters are refused.
_SHAPES = """
import json, sys
import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from consumers.engines.local.child import lora
from consumers.engines.local.child.adapter_files import LayerAdapter
from consumers.engines.local.child.backend import LoadError
from tests.consumers.engines.shapes import tiny

mx.disable_compile()
TOKENS = mx.array([[5, 9, 2, 77, 31, 8]])

def adapter(model, rank, besides):
    linear = (nn.Linear, nn.QuantizedLinear)
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, linear) or type(module).__name__ == besides:
            made = (LoRALinear.from_base(module, r=rank, scale=4.0) if isinstance(module, linear) else None)
            a, b = (made.lora_a, made.lora_b) if made else (mx.zeros((8, rank)), mx.zeros((rank, 8)))
            layers[path] = LayerAdapter(a, mx.random.normal(b.shape) * 0.1, 4.0)
    return layers

def as_mlx_lm(model, layers):
    found = dict(model.named_modules())
    wrapped = []
    for path, (a, b, scale) in layers.items():
        layer = LoRALinear.from_base(found[path], r=a.shape[1], scale=scale)
        layer.lora_a, layer.lora_b = a, b
        wrapped.append((path, layer))
    model.update_modules(tree_unflatten(wrapped))
    model.eval()
    return model

def apart(one, other):
    return float((mx.linalg.norm(one - other) / mx.linalg.norm(other - other.mean())).item())

for name in sys.argv[1:]:
    shape, _, kind = name.partition("+")
    def model():
        made = tiny(shape)
        if kind == "4-bit":
            nn.quantize(made, group_size=32, bits=4)
        return made
    made = {f"r{rank}": adapter(model(), rank, kind) for rank in (2, 5)}
    lora.opened = lambda name, folder: made[name]
    try:
        ours = model()
        adapters = lora.Adapters(ours, {"r2": "", "r5": ""}, on_cpu=True)
    except LoadError as error:
        print(json.dumps([name, str(error)]))
        continue
    expected = [model()(TOKENS)[0], *(as_mlx_lm(model(), made[each])(TOKENS)[0] for each in made)]
    numbers = [1, 0, 2, 1]
    with adapters.of_rows(numbers):
        mixed = ours(mx.repeat(TOKENS, 4, axis=0))
    with adapters.of_rows([2]):
        alone = ours(TOKENS)[0]
    distance = max(apart(mixed[row], expected[number]) for row, number in enumerate(numbers))
    equal = bool(mx.array_equal(alone, expected[2]).item())
    print(json.dumps([name, distance, equal, apart(expected[1], expected[0]), apart(expected[2], expected[1])]))
mx.clear_streams()
"""


def run(*command: str) -> list:
    done = subprocess.run(
        (sys.executable, *command), capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]


def test_adapters_of_many_shapes_are_computed_together_as_mlx_lm_computes_each():
    shapes = ["llama", "llama+4-bit", "qwen3", "gemma3", "mamba2", "lfm2", "qwen3_5", "gpt2"]
    for name, distance, exact, *effects in run("-c", _SHAPES, *shapes):
        assert distance < 1e-4, name
        assert exact, name
        assert min(effects) > 0.05, name


def test_layers_that_cannot_have_several_adapters_are_refused_by_name():
    found = dict(run("-c", _SHAPES, "gpt_oss+SwitchLinear", "llama+Embedding"))
    assert "_proj (SwitchLinear). Only linear layers can have several adapters" in found["gpt_oss+SwitchLinear"]
    assert "model.embed_tokens (Embedding). Only linear layers" in found["llama+Embedding"]
