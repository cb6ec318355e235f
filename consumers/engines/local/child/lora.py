"""LoRA adapters: several, by name, on one set of weights. Each row of a batch has its own, or none.

An adapter adds a product of two thin matrices to the product of a layer. The matrices of all adapters of a layer are
one stack, from which a pass of the model takes those of its rows (as S-LoRA and vLLM do). Where all rows have one
adapter, the computation is that of mlx-lm's `LoRALinear`; where no row has one, it is that of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from consumers.engines.local.child.adapter_files import LayerAdapter, opened
from consumers.engines.local.child.backend import LoadError

_CLOSE = 1e-2
"""How far scores computed in a mixed batch may be from those alone, in parts of their spread."""


class Adapters:
    """The adapters of one model, and which of them each row of the next pass has. One writer: the batch.

    Args:
        model: the model, whose layers are replaced.
        folders: the folder of each adapter, by name.
        on_cpu: whether the model runs on the CPU, where 16-bit products are slow.

    Raises:
        LoadError: an adapter cannot be used with this model. The message names it.
    """

    def __init__(self, model: Any, folders: Mapping[str, str], *, on_cpu: bool) -> None:
        self._numbers = {name: number for number, name in enumerate(folders, 1)}
        self.rows: tuple[int, ...] = ()
        self.only: int | None = 0
        self.index: Any = None
        if folders:
            self._install(model, [(name, opened(name, Path(path))) for name, path in folders.items()], on_cpu=on_cpu)
            self._try(model)

    def number(self, name: str) -> int:
        """The number of the adapter that a model's name stands for; 0 for the model without one."""
        return self._numbers.get(name, 0)

    @contextmanager
    def of_rows(self, numbers: Sequence[int]) -> Iterator[None]:
        """Within it, the rows of a pass have these adapters."""
        if not self._numbers:
            yield
            return
        self.rows = tuple(numbers)
        chosen = set(self.rows)
        self.only = next(iter(chosen), 0) if len(chosen) < 2 else None
        self.index = mx.array(self.rows, dtype=mx.uint32) if self.only is None else None
        try:
            yield
        finally:
            self.rows, self.only, self.index = (), 0, None

    def _install(self, model: Any, adapters: list[tuple[str, dict[str, LayerAdapter]]], *, on_cpu: bool) -> None:
        modules, layers = dict(model.named_modules()), list[tuple[str, Any]]()
        for path in sorted({path for _, files in adapters for path in files}):
            name = next(name for name, files in adapters if path in files)
            if (base := modules.get(path)) is None:
                raise LoadError(f'Adapter "{name}" has weights for the layer {path}, which the model does not have.')
            if type(base) not in (nn.Linear, nn.QuantizedLinear):
                message = f'Adapter "{name}" changes {path} ({type(base).__name__}). Only linear layers can have '
                raise LoadError(message + "several adapters. Load this one alone with adapter_path.")
            for name, files in adapters:
                if (layer := files.get(path)) is not None:
                    _check(name, path, layer, base)
            layers.append((path, AdaptedLinear(base, self, [files.get(path) for _, files in adapters])))
        model.update_modules(tree_unflatten(layers))
        if on_cpu:
            for _, layer in layers:
                layer.stack_a, layer.stack_b = layer.stack_a.astype(mx.float32), layer.stack_b.astype(mx.float32)
        mx.eval([(layer.stack_a, layer.stack_b) for _, layer in layers])

    def _try(self, model: Any) -> None:
        """Compute a mixed batch, and the same rows each alone.

        Raises:
            LoadError: the model gives its layers something else than the rows of the batch.
        """
        tokens, apart = [0, 1, 2, 3], list[Any]()
        for number in (0, 1):
            with self.of_rows([number]):
                apart.append(model(mx.array([tokens]))[0])
        try:
            with self.of_rows([0, 1]):
                together = model(mx.array([tokens, tokens]))
            distances = [float(_distance(together[row], apart[row]).item()) for row in (0, 1)]
        except ValueError as error:
            raise LoadError(
                f"Adapters cannot be chosen per request in this model ({error}). Use adapter_path."
            ) from None
        if max(distances) > _CLOSE:
            raise LoadError("This model computes requests with different adapters wrongly together. Use adapter_path.")


class AdaptedLinear(nn.Module):  # type: ignore[misc]  # MLX has no types for it
    """A linear layer, and the stacks of its adapters. The first of a stack is zero: it is that of rows without any.

    Args:
        base: the layer.
        selection: says which adapter each row has.
        adapters: those of this layer by number, from 1; None for one that leaves the layer as it is.
    """

    def __init__(self, base: Any, selection: Adapters, adapters: Sequence[LayerAdapter | None]) -> None:
        super().__init__()
        self.base = base
        self._chosen = selection
        known = [layer for layer in adapters if layer is not None]
        inputs, outputs = known[0].a.shape[0], known[0].b.shape[1]
        self._ranks = [0, *(layer.a.shape[1] if layer else 0 for layer in adapters)]
        self._scales = [0.0, *(layer.scale if layer else 0.0 for layer in adapters)]
        kinds = {layer.a.dtype for layer in known}
        kind, rank = (kinds.pop() if len(kinds) == 1 else mx.float32), max(self._ranks)
        none = LayerAdapter(mx.zeros((inputs, 0), dtype=kind), mx.zeros((0, outputs), dtype=kind), 0.0)
        each = [none, *(layer or none for layer in adapters)]
        self.stack_a = mx.stack([mx.pad(a.astype(kind), [(0, 0), (0, rank - a.shape[1])]) for a, _, _ in each])
        self.stack_b = mx.stack([mx.pad(b.astype(kind), [(0, rank - b.shape[0]), (0, 0)]) for _, b, _ in each])

    def __call__(self, x: Any) -> Any:
        """The product of x, shaped (rows, tokens, inputs), each row with its adapter."""
        y, only = self.base(x), self._chosen.only
        if only is not None:
            if not (rank := self._ranks[only]):
                return y
            z = (x @ self.stack_a[only, :, :rank]) @ self.stack_b[only, :rank]
            return y + (self._scales[only] * z).astype(x.dtype)
        rows = self._chosen.rows
        if x.ndim != 3 or x.shape[0] != len(rows):
            raise ValueError(f"a layer reads an array of the shape {x.shape} for {len(rows)} requests")
        index = self._chosen.index
        z = mx.gather_mm(x, self.stack_a, rhs_indices=index)
        z = mx.gather_mm(z, self.stack_b, rhs_indices=index)
        scales = mx.array([self._scales[number] for number in rows], dtype=z.dtype)
        return y + (scales[:, None, None] * z).astype(x.dtype)


def _check(name: str, path: str, layer: LayerAdapter, base: Any) -> None:
    outputs, inputs = base.weight.shape
    if isinstance(base, nn.QuantizedLinear):
        inputs = inputs * 32 // base.bits
    if layer.a.shape[0] != inputs or layer.b.shape[1] != outputs:
        found = f"{layer.a.shape[0]} inputs and {layer.b.shape[1]} outputs"
        message = f'Adapter "{name}" was made for another model: its {path} has {found}, the model\'s {inputs} and '
        raise LoadError(f"{message}{outputs}.")


def _distance(one: Any, other: Any) -> Any:
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return mx.linalg.norm(one - other) / mx.linalg.norm(other - other.mean())
