"""Weights are made float32 on a CPU: the same answers, from products that the BLAS computes."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

# MLX is imported in processes of their own, as the engine does: it must not be loaded into the process of the tests.
_MODELS = """
import logging, sys
import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mixtral
from consumers.engines.local.child import float32

mx.random.seed(1)

def llama_model(tied=True):
    return llama.Model(llama.ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=160, tie_word_embeddings=tied))

def experts():
    return mixtral.Model(mixtral.ModelArgs(
        model_type="mixtral", vocab_size=160, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=4))

def logits(model):
    return model(mx.array([[3, 1, 4, 1, 5, 9]])).astype(mx.float32)

def kinds(model):
    return {str(value.dtype) for _, value in tree_flatten(model.parameters())}

def check(model, kind, tolerance):
    mx.eval(model.parameters())
    assert float32.kind_of(model) == kind, float32.kind_of(model)
    before = logits(model)
    assert float32.growth_bytes(model) > 0
    assert float32.convert(model)
    assert kinds(model) == {"mlx.core.float32"}, kinds(model)
    assert float32.kind_of(model) == "float32"
    assert float32.growth_bytes(model) == 0
    difference = mx.abs(logits(model) - before).max().item()
    assert difference < tolerance, difference
"""

_CASES = {
    "4 bits": """
for group in (32, 64):
    model = llama_model(); nn.quantize(model, group_size=group, bits=4); check(model, "4-bit", 1e-4)
""",
    "8 bits, embeddings not tied": """
model = llama_model(tied=False); nn.quantize(model, group_size=32, bits=8); check(model, "8-bit", 1e-4)
""",
    "3 bits, 6 bits": """
for bits in (3, 6):
    model = llama_model(); nn.quantize(model, group_size=32, bits=bits); check(model, f"{bits}-bit", 1e-4)
""",
    "4 bits with some layers of 8": """
model = llama_model()
nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, module: hasattr(module, "to_quantized") and (
    {"group_size": 64, "bits": 8} if "down_proj" in path else True))
check(model, "4-bit", 1e-4)
""",
    "4 bits with the scales and norms in 16": """
model = llama_model(); model.set_dtype(mx.bfloat16); nn.quantize(model, group_size=32, bits=4)
check(model, "4-bit", 0.1)
""",
    "mxfp4": """
model = llama_model(); nn.quantize(model, mode="mxfp4"); check(model, "4-bit", 1e-4)
""",
    "bfloat16, float16": """
for dtype, kind in ((mx.bfloat16, "bfloat16"), (mx.float16, "float16")):
    model = llama_model(); model.set_dtype(dtype); check(model, kind, 0.1)
""",
    "experts": """
model = experts(); nn.quantize(model, group_size=32, bits=4); check(model, "4-bit", 1e-4)
""",
    "the values of quantized weights": """
model = llama_model(); nn.quantize(model, group_size=32, bits=4)
for each in (model.layers[0].mlp.up_proj, model.model.embed_tokens):
    each.scales, each.biases = each.scales.astype(mx.bfloat16), each.biases.astype(mx.bfloat16)
old = model.layers[0].mlp.up_proj
exact = mx.dequantize(old.weight, old.scales.astype(mx.float32), old.biases.astype(mx.float32), 32, 4)
mx.eval(exact)
float32.convert(model)
assert mx.array_equal(model.layers[0].mlp.up_proj.weight, exact)
""",
    "float32 already": """
model = llama_model(); mx.eval(model.parameters())
before = model.layers[0].mlp.up_proj.weight
assert float32.growth_bytes(model) == 0
assert float32.convert(model)
assert model.layers[0].mlp.up_proj.weight is before
""",
    "the growth is what the weights take": """
model = llama_model(); nn.quantize(model, group_size=32, bits=4); mx.eval(model.parameters())
size = lambda: sum(value.nbytes for _, value in tree_flatten(model.parameters()))
growth, before = float32.growth_bytes(model), size()
float32.convert(model)
assert size() - before < growth < (size() - before) * 1.3, (size() - before, growth)
""",
    "memory is short": """
model = llama_model(); nn.quantize(model, group_size=32, bits=4)
before = logits(model)
float32.memory_available = lambda: float32.growth_bytes(model)
logging.basicConfig(stream=sys.stdout)
assert not float32.convert(model)
assert float32.kind_of(model) == "4-bit"
assert mx.array_equal(logits(model), before)
""",
}


@pytest.mark.parametrize("case", _CASES)
def test_a_model_gives_the_same_logits_as_float32(case):
    command = [sys.executable, "-c", _MODELS + _CASES[case] + "\nmx.clear_streams()\n"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert ("The weights stay 4-bit" in done.stdout) == (case == "memory is short")
