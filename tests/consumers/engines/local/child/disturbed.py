"""Sequences of a tiny model whose caches are of one kind, read in random pieces and suspended at random.

Run as a program: `disturbed.py SHAPE SEED SUSPENSIONS [--one-off] [--guided]` prints how many tokens of each sequence
differ from those of an undisturbed run, how many distinct tokens that run has, and what was done. `--one-off` resumes
with the token before the one that is due, which must not pass unnoticed. `--guided` gives every second sequence a
form, and the program prints which of them have it.
"""

from __future__ import annotations

import json
import random
import re
import sys
from typing import Any

import mlx.core as mx
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from mlx_lm.models import falcon_h1, gemma3_text, lfm2, llama, mamba2

import consumers.engines.local.child.batch as batch_module
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.caches import tried_reuse
from consumers.engines.local.child.guided import Guide
from consumers.engines.local.child.memory import measured_size

LEAST_TOKENS = 60
PROMPTS = (9, 40, 23, 70, 1, 2)
COMMON = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    # Every layer looks back to the first token: caches that can be cut anywhere.
    "full": (
        llama,
        COMMON | {"model_type": "llama", "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    ),
    # Most layers look back 16 tokens only: rotating caches.
    "sliding": (
        gemma3_text,
        COMMON
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 1,
            "sliding_window": 16,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 4096,
        },
    ),
    "convolutional": (
        lfm2,
        COMMON
        | {
            "model_type": "lfm2",
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 64,
            "block_ff_dim": 128,
            "block_multiple_of": 16,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": [1, 3],
            "layer_types": None,
            "rope_theta": 1e6,
        },
    ),
    "hybrid": (
        falcon_h1,
        COMMON
        | {
            "model_type": "falcon_h1",
            "attention_bias": False,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "mamba_d_conv": 4,
            "mamba_d_head": 16,
            "mamba_d_ssm": 64,
            "mamba_d_state": 16,
            "mamba_expand": 2,
            "mamba_n_groups": 1,
            "mamba_n_heads": 4,
            "mamba_proj_bias": False,
            "mamba_conv_bias": True,
            "mamba_rms_norm": False,
            "mamba_norm_before_gate": False,
            "mlp_bias": False,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "projectors_bias": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "tie_word_embeddings": False,
            "attention_in_multiplier": 1.0,
            "attention_out_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "key_multiplier": 1.0,
            "lm_head_multiplier": 1.0,
            "mlp_multipliers": [1.0, 1.0],
            "ssm_in_multiplier": 1.0,
            "ssm_multipliers": [1.0] * 5,
            "ssm_out_multiplier": 1.0,
            "mamba_chunk_size": 128,
            "time_step_limit": [0.0, 1e9],
            "time_step_floor": 1e-4,
            "time_step_min": 1e-3,
            "time_step_max": 0.1,
        },
    ),
    "recurrent": (
        mamba2,
        {
            "model_type": "mamba2",
            "num_heads": 8,
            "head_dim": 16,
            "vocab_size": 200,
            "hidden_size": 64,
            "intermediate_size": 128,
            "state_size": 16,
            "num_hidden_layers": 3,
            "layer_norm_epsilon": 1e-5,
            "conv_kernel": 4,
            "n_groups": 1,
            "use_bias": False,
            "use_conv_bias": True,
            "tie_word_embeddings": False,
            "time_step_limit": [0.0, 1e9],
            "time_step_rank": "auto",
            "ssm_state_size": 16,
        },
    ),
}


def model_of(shape: str) -> Any:
    module, arguments = SHAPES[shape]
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(arguments))
    mx.eval(model.parameters())
    return model


def sampler(seed: int):
    at = 0

    def sample(logprobs):
        nonlocal at
        key = mx.random.key(seed * 10_000 + at)
        at += 1
        return mx.random.categorical(logprobs, key=key)

    return sample


class Letters:
    """A vocabulary as llguidance reads one: tokens are bytes, but for the last, which ends a text."""

    bos_token_id = None
    eos_token_id = 199
    tokens = (*(bytes([byte]) for byte in range(199)), b"<end>")
    special_token_ids = (199,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


FORM = "([a-m][n-z][0-9])+"


def guide(key: int) -> Guide | None:
    """A form for every second sequence. No text of it ends: the vocabulary lacks the last character."""
    if not GUIDED or key % 2:
        return None
    grammar = LLMatcher.grammar_from_regex(FORM + "\U0010ffff")
    return Guide(LLMatcher(LLTokenizer(TokenizerWrapper(Letters()), n_vocab=200), grammar), "structured_outputs")


def has_form(said: list[int]) -> bool:
    whole = said[: len(said) // 3 * 3]
    return re.fullmatch(FORM, "".join(map(chr, whole))) is not None


GUIDED = "--guided" in sys.argv


class Disturbed:
    """A batch, and what it has produced. `slow`: its steps count as slow, so that their tokens come at once."""

    def __init__(self, model: Any, prompts: dict[int, list[int]], rng: random.Random, *, slow: bool) -> None:
        self.batch = MlxBatch(model, on_cpu=True)
        self.prompts, self.rng, self.slow = prompts, rng, slow
        self.left = {key: len(prompt) for key, prompt in prompts.items()}
        self.said: dict[int, list[int]] = {key: [] for key in prompts}
        self.suspended: set[int] = set()
        self.suspensions = self.drops = 0
        for key, prompt in prompts.items():
            self.batch.add(key, prompt, sampler(key), [], guide(key))

    def take(self, sampled: list[tuple[int, int]]) -> None:
        for key, token in sampled:
            self.said[key].append(token)

    def some(self, keys: set[int], most: int) -> list[int]:
        return self.rng.sample(sorted(keys), self.rng.randrange(1, min(most, len(keys)) + 1))

    def read(self, keys: set[int]) -> None:
        pieces = [(key, min(self.left[key], self.rng.randrange(1, 20))) for key in self.some(keys, 6)]
        # Some prompts are read up to their last token, so that they join a step.
        pieces = [(key, n - 1 if n == self.left[key] > 1 and self.rng.random() < 0.5 else n) for key, n in pieces]
        for key, tokens in pieces:
            self.left[key] -= tokens
        self.take(self.batch.read(pieces))

    def join(self, keys: list[int]) -> None:
        self.batch.join(keys)
        for key in keys:
            self.left[key] = 0

    def step(self) -> None:
        if self.slow:
            self.batch._step_s = 1.0
        self.take(self.batch.step())

    def suspend(self, keys: set[int]) -> None:
        chosen = self.some(keys, 2)
        self.take(self.batch.suspend(chosen).sampled)
        self.suspended |= set(chosen)
        self.suspensions += len(chosen)
        for key in chosen:
            if self.rng.random() < 0.2:
                self.batch.drop(key)
                self.left[key] = len(self.prompts[key]) + len(self.said[key])
                self.drops += 1

    def resume(self) -> None:
        chosen = self.some(self.suspended, 6)
        self.batch.resume(chosen)
        self.suspended -= set(chosen)

    def turn(self) -> None:
        inside = set(self.left) - self.suspended
        reading = {key for key in inside if self.left[key]}
        choice = self.rng.random()
        last = sorted(key for key in reading if self.left[key] == 1)
        if choice < 0.5 and last:
            self.join(last)
            self.step()
        elif choice < 0.3 and reading:
            self.read(reading)
        elif choice < 0.75 and inside - reading:
            self.step()
        elif choice < 0.9 and inside:
            self.suspend(inside)
        elif self.suspended:
            self.resume()


def undisturbed(model: Any, key: int, prompt: list[int], count: int) -> list[int]:
    batch = MlxBatch(model, on_cpu=True)
    batch.add(key, prompt, sampler(key), [], guide(key))
    said = [token for _, token in batch.read([(key, len(prompt))])]
    while len(said) < count:
        said += [token for _, token in batch.step()]
    return said


def main(shape: str, seed: str, suspensions: str, *options: str) -> None:
    mx.disable_compile()
    model, rng = model_of(shape), random.Random(int(seed))
    prompts = {key: [rng.randrange(1, 200) for _ in range(n)] for key, n in enumerate(PROMPTS, start=1)}
    disturbed = Disturbed(model, prompts, rng, slow=rng.random() < 0.5)
    if "--one-off" in options:
        going_on = batch_module._going_on

        def one_off(model, rows):
            batch = going_on(model, rows)
            batch._next_tokens = mx.array([row.tokens[-2 if row.decodes else -1] for row in rows], dtype=mx.uint32)
            return batch

        batch_module._going_on = one_off
    while disturbed.suspensions < int(suspensions) or min(map(len, disturbed.said.values())) < LEAST_TOKENS:
        disturbed.turn()
    alone = {key: undisturbed(model, key, prompt, len(disturbed.said[key])) for key, prompt in prompts.items()}
    differ = [sum(a != b for a, b in zip(said, alone[key], strict=False)) for key, said in disturbed.said.items()]
    print(
        json.dumps(
            {
                "differ": differ,
                "distinct": [len(set(tokens)) for tokens in alone.values()],
                "suspensions": disturbed.suspensions,
                "drops": disturbed.drops,
                "measured": measured_size(model),
                "reuse": tried_reuse(model),
                "formed": [has_form(said) for key, said in disturbed.said.items() if guide(key)],
            }
        )
    )
    disturbed.batch.close()
    mx.clear_streams()


if __name__ == "__main__":
    main(*sys.argv[1:])
