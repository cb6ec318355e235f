"""Scores that could order requests by how easy they are, each fitted without the subjects that it is measured on.

`bench.classifier` compares them with the rules of triage. None of them is part of the pipeline.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[dict[str, Any]]
Matrix = Any  # a numpy array; its type is no help here

WORDS = 2000
SPARE = 1e-9
_TOKEN = re.compile(r"\w+")
_SYMBOLS = frozenset("=^+*/<>()[]{}|\\$_")
_MOST_TOKENS = 400
_DIMENSIONS = 128


def question(row: dict[str, Any]) -> str:
    """A multiple-choice question without its options: most requests offer none."""
    return str(row["prompt"]).partition("\nA. ")[0]


def lost(rows: Rows) -> Matrix:
    """What each question loses at the weaker model: 1 if only the stronger one is right, -1 if only the weaker one."""
    return np.array([float(row["strong_correct"]) - float(row["weak_correct"]) for row in rows])


def without(groups: Sequence[str], features: Matrix, target: Matrix, penalty: float) -> Matrix:
    """The score of each row by a ridge regression that has not seen the row's group. Rows of a large group count less,
    by the root of its size.
    """
    names = np.array(groups)
    sizes = Counter(groups)
    weights = np.array([sizes[group] ** -0.5 for group in groups])
    weights /= weights.mean()
    table = np.hstack([features, np.ones((len(features), 1))])
    whole, aim = (table * weights[:, None]).T @ table, (table * weights[:, None]).T @ target
    penalties = np.diag([penalty] * features.shape[1] + [SPARE])
    scores = np.zeros(len(groups))
    for group in sorted(sizes):
        there = names == group
        part = table[there]
        heavy = part * weights[there][:, None]
        fitted = np.linalg.solve(whole - heavy.T @ part + penalties, aim - heavy.T @ target[there])
        scores[there] = part @ fitted
    return scores


def fitted(features: Matrix, target: Matrix, penalty: float) -> Callable[[Matrix], Matrix]:
    """A ridge regression on all rows, for other kinds of request."""
    table = np.hstack([features, np.ones((len(features), 1))])
    penalties = np.diag([penalty] * features.shape[1] + [SPARE])
    weights = np.linalg.solve(table.T @ table + penalties, table.T @ target)
    return lambda more: np.hstack([more, np.ones((len(more), 1))]) @ weights


# ---- features --------------------------------------------------------------------------------------------------------


def surface(texts: Sequence[str]) -> Matrix:
    """The form of a text: its length, its parts of digits, symbols and capitals, its words and sentences."""
    return np.array([_surface(text) for text in texts])


def _surface(text: str) -> list[float]:
    size, words = max(1, len(text)), [len(word) for word in text.split()] or [0]
    return [
        math.log(size),
        10 * sum(letter.isdigit() for letter in text) / size,
        10 * sum(letter in _SYMBOLS for letter in text) / size,
        10 * sum(letter.isupper() for letter in text) / size,
        sum(words) / len(words) / 3,
        max(words) / 10,
        math.log1p(text.count(".")),
        float(text.endswith("?")),
        float(" not " in text.lower()),
        math.log1p(text.lower().count(" if ")),
    ]


def words(known: Sequence[str]) -> Callable[[Sequence[str]], Matrix]:
    """The weights of the words and pairs of words that are the most frequent in known texts (tf-idf)."""
    counts = [Counter(_terms(text)) for text in known]
    frequency = Counter(term for count in counts for term in count)
    chosen = {term: place for place, (term, _) in enumerate(frequency.most_common(WORDS))}
    rarity = np.array([math.log(len(known) / frequency[term]) + 1 for term in chosen])

    def features(texts: Sequence[str]) -> Matrix:
        table = np.zeros((len(texts), len(chosen)))
        for row, text in enumerate(texts):
            for term, count in Counter(_terms(text)).items():
                if (place := chosen.get(term)) is not None:
                    table[row, place] = 1 + math.log(count)
        return _unit(table * rarity)

    return features


def _terms(text: str) -> list[str]:
    found = _TOKEN.findall(text.lower())
    return [*found, *(f"{first} {then}" for first, then in pairwise(found))]


def vectors(folder: Path) -> Callable[[Sequence[str]], Matrix]:
    """The mean of the token vectors of a model, rare tokens counting more, in its first 128 principal directions.

    Args:
        folder: of the store, with the GGUF file and the MLX folder of one model.
    """
    from gguf import GGUFReader  # noqa: PLC0415 - only this score needs it
    from gguf.quants import dequantize  # noqa: PLC0415
    from tokenizers import Tokenizer  # noqa: PLC0415

    stored = next(tensor for tensor in GGUFReader(folder / "model.gguf").tensors if tensor.name == "token_embd.weight")
    table = dequantize(stored.data, stored.tensor_type).astype(np.float64)
    table -= table.mean(axis=0)
    frequent = table[: len(table) // 2]
    directions, _, _ = np.linalg.svd(frequent.T @ frequent)
    table = table @ directions[:, :_DIMENSIONS]
    rarity = np.log(2 + np.arange(len(table))) ** 2  # byte-pair tokens are numbered by their frequency
    tokenizer = Tokenizer.from_file(str(folder / "mlx" / "tokenizer.json"))

    def one(text: str) -> Matrix:
        ids = tokenizer.encode(text, add_special_tokens=False).ids[:_MOST_TOKENS] or [0]
        return rarity[ids] @ table[ids]

    return lambda texts: _unit(np.array([one(text) for text in texts]))


def _unit(table: Matrix) -> Matrix:
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), SPARE)


# ---- measures --------------------------------------------------------------------------------------------------------


def relative_loss(scores: Matrix, loss: Matrix, part: float = 0.3) -> float:
    """What spilling the part with the lowest scores loses, over what spilling at random loses."""
    chosen = np.argsort(scores, kind="stable")[: int(part * len(scores))]
    return float(loss[chosen].mean() / loss.mean())


def within(groups: Sequence[str], scores: Matrix, loss: Matrix, part: float = 0.3) -> float:
    """As `relative_loss`, where the same part of each group is spilled: what the score knows beside the subject."""
    names = np.array(groups)
    spilled = random = 0.0
    for group in set(groups):
        there = np.flatnonzero(names == group)
        chosen = there[np.argsort(scores[there], kind="stable")[: int(part * len(there))]]
        spilled += loss[chosen].sum()
        random += loss[there].mean() * len(chosen)
    return spilled / random


def interval(groups: Sequence[str], measure: Callable[[Matrix], float], draws: int = 400) -> tuple[float, float]:
    """The 95 % interval of a measure of row numbers, over draws of whole groups with replacement."""
    random = np.random.default_rng(1)
    names = np.array(groups)
    rows = {group: np.flatnonzero(names == group) for group in sorted(set(groups))}
    values = [
        measure(np.concatenate([rows[group] for group in random.choice(list(rows), len(rows))])) for _ in range(draws)
    ]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The probability that a positive scores above a negative; a tie counts half (Mann-Whitney U)."""
    values, marks = np.array(scores), np.array(positive)
    apart = values[marks][:, None] - values[~marks][None, :]
    return float((apart > 0).mean() + (apart == 0).mean() / 2)
