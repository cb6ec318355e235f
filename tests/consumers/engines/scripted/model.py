"""A model that writes what its configuration says: `mlx_lm.models.scripted` in an engine's process.

Its KV cache is a real one and holds the tokens that it has read. The last token of a script's number among them selects
the script. The next token is the one that follows the longest part of the script that has been written, so the model
goes on from wherever its tokens end: in a batch, after it was suspended, after a crash. It is certain of each token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

_CERTAIN = 100.0


@dataclass
class ModelArgs:
    """The configuration: `scripts` has the tokens of each script by the token of its number."""

    model_type: str
    vocab_size: int
    end: int
    scripts: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        scripts = {int(number): script for number, script in config["scripts"].items()}
        return cls(config["model_type"], config["vocab_size"], config["end"], scripts)


class Model(nn.Module):
    """The model. It has one weight, because a file of weights must have some."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.weight = mx.zeros((1,))
        self.layers = [nn.Identity()]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        read = inputs.astype(mx.float32)[:, None, :, None]
        if cache is not None:
            read, _ = cache[0].update_and_fetch(read, read)
        logits = np.zeros((*inputs.shape, self.args.vocab_size), dtype=np.float32)
        for row, tokens in enumerate(np.array(read[:, 0, :, 0]).astype(int).tolist()):
            logits[row, -1, self._next(tokens)] = _CERTAIN
        return mx.array(logits)

    def _next(self, tokens: list[int]) -> int:
        at = next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in self.args.scripts), None)
        if at is None:
            return self.args.end
        script, said = self.args.scripts[tokens[at]], tokens[at + 1 :]
        longest = min(len(script), len(said))
        written = next(n for n in range(longest, -1, -1) if said[len(said) - n :] == script[:n])
        return script[written] if written < len(script) else self.args.end
