"""How close the two likeliest tokens were where two answers to the same prompt part."""

from __future__ import annotations

from itertools import pairwise


def first_difference(one: str, other: str) -> int:
    """The index of the first character in which two texts differ."""
    same = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))


def gap_at(path: str, prompt: str, one: str, other: str) -> float:
    """The difference of the logarithms of the two greatest probabilities, at the first token in which two answers part.

    It runs the model in this process, with whatever BLAS MLX has here.
    """
    import mlx.core as mx
    import mlx_lm

    model, tokenizer = mlx_lm.load(path)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in (one, other)]
    pairs = zip(*tokens, strict=False)
    shared = next((at for at, (a, b) in enumerate(pairs) if a != b), min(map(len, tokens)))
    logits = model(mx.array([[*asked, *tokens[0][:shared]]]))[0, -1].astype(mx.float32)
    best = sorted((logits - mx.logsumexp(logits)).tolist(), reverse=True)[:2]
    return next(a - b for a, b in pairwise(best))
