"""The weights of a loaded model as float32, for a CPU.

MLX's CPU build multiplies float32 matrices with its BLAS. For quantized and 16-bit ones it has loops of its own, which
are many times slower. The values of 16-bit weights stay the same, and those of quantized ones to a float32's rounding.
"""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

from pipeline.machine import memory_available

log = logging.getLogger(__name__)

_SHARE: Final = 0.75
"""The part of the available memory that the conversion can take. KV caches, which double, use the rest."""

_FOLDED: Final = frozenset({"scales", "biases"})
"""Parameters of a quantized module that become part of its weights."""


class _Size(NamedTuple):
    """Of the parameters of one module, without those of its children."""

    values: int = 0
    before_bytes: int = 0
    after_bytes: int = 0


def kind_of(model: Any) -> str:
    """The type of most weights, for the user: `float32`, `bfloat16`, or `4-bit`."""
    values: dict[str, int] = {}
    for _, module in model.named_modules():
        for _, weight in _parameters(module)[:1]:
            kind = f"{module.bits}-bit" if _is_quantized(module) else str(weight.dtype).rpartition(".")[2]
            values[kind] = values.get(kind, 0) + _size(module).values
    return max(values, key=lambda kind: values[kind], default="float32")


def growth_bytes(model: Any) -> int:
    """How much more memory the model needs at the height of the conversion.

    That is the growth of all modules, and the old weights of the largest one, which are there until its new ones are.
    """
    sizes = [_size(module) for _, module in model.named_modules() if _converts(module)]
    growth = sum(size.after_bytes - size.before_bytes for size in sizes)
    return growth + max((size.before_bytes for size in sizes), default=0)


def convert(model: Any) -> bool:
    """Convert the weights in place, one module after another. Returns False, and logs why, if memory is short."""
    growth, available = growth_bytes(model), memory_available()
    if available is not None and growth > available * _SHARE:
        log.warning(
            "The weights stay %s, which is slow on a CPU. As float32 they need %.1f GB more; %.1f GB are available.",
            kind_of(model),
            growth / 1e9,
            available / 1e9,
        )
        return False
    done: dict[int, Any] = {}
    for path, module in model.named_modules():
        if _converts(module):
            _replace(model, path, module, done)
    return True


def _replace(model: Any, path: str, module: Any, done: dict[int, Any]) -> None:
    """Convert one module, which then holds float32. A quantized one is replaced by a plain one.

    Args:
        model: the root.
        path: of the module in it.
        module: the module, which can be in the model more than once.
        done: the plain modules by the identity of the quantized ones.
    """
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import dequantize_model

    if id(module) not in done:
        # The scales first: the products with them would be rounded to 16 bits.
        for name, value in _parameters(module):
            module[name] = _as_float32(value)
        plain = module
        if _is_quantized(module):
            box = nn.Module()
            box.inner = module
            plain = dequantize_model(box).inner
            plain.set_dtype(mx.float32)
        mx.eval([value for _, value in _parameters(plain)])
        done[id(module)] = plain
    if done[id(module)] is not module:
        model.update_modules(tree_unflatten([(path, done[id(module)])]))


def _converts(module: Any) -> bool:
    """Whether the module can be converted, and is not float32 already. The classes are those of `dequantize_model`."""
    if _is_quantized(module):
        from mlx import nn
        from mlx_lm.models.switch_layers import QuantizedSwitchLinear

        kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
        return isinstance(module, kinds) and getattr(module, "global_scale", None) is None
    size = _size(module)
    return size.after_bytes != size.before_bytes


def _is_quantized(module: Any) -> bool:
    return "scales" in module and hasattr(module, "bits")


def _parameters(module: Any) -> list[tuple[str, Any]]:
    """The parameters of a module, without those of its children."""
    import mlx.core as mx

    return [(name, value) for name, value in module.items() if isinstance(value, mx.array) and name[0] != "_"]


def _as_float32(value: Any) -> Any:
    import mlx.core as mx

    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _size(module: Any) -> _Size:
    size = _Size()
    for name, value in _parameters(module):
        if not _is_quantized(module):
            values, after = value.size, _as_float32(value).nbytes
        elif name == "weight":
            values = value.size * 32 // module.bits
            after = values * 4
        else:
            values = after = 0
            if name not in _FOLDED:
                values, after = value.size, value.size * 4
        size = _Size(size.values + values, size.before_bytes + value.nbytes, size.after_bytes + after)
    return size
