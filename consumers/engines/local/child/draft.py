"""A draft model: it proposes the next tokens of an answer that is written alone, and the model checks them in one pass.

A proposed token is accepted if the model samples the same one at its position. So each token is sampled from the
model's own probabilities with the key of its seed and position, as without a draft. Only the rounding is that of a pass
over several tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from consumers.engines.local.child.backend import LoadError
from pipeline.core.drafting import DraftPolicy
from pipeline.core.prefixes import common_tokens

_PIECE_TOKENS: Final = 256
"""The most tokens that the draft model reads beside one step, when it begins with a sequence or has lost it."""

_FEW_TOKENS: Final = 16
"""So many are read with the first proposal."""


@dataclass(slots=True)
class Draft:
    """The draft model and its cache, which holds some tokens of one sequence. One writer: the batch.

    Args:
        model: the draft model, whose caches can be cut.
        vocabulary: the number of the model's tokens. No other token is proposed.
        policy: says how many tokens are proposed.
    """

    model: Any
    vocabulary: int
    policy: DraftPolicy
    _cache: list[Any] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)

    def reads_along(self, tokens: list[int]) -> bool:
        """Read what is missing of a sequence, up to its last token: at most a piece. Returns whether it was little."""
        import mlx.core as mx

        self._cut(tokens)
        missing = len(tokens) - 1 - len(self._tokens)
        if missing <= _FEW_TOKENS:
            return True
        part = tokens[len(self._tokens) : -1][:_PIECE_TOKENS]
        self.model(mx.array([part]), cache=self._cache)
        mx.eval([layer.state for layer in self._cache])
        self._tokens += part
        return False

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest next tokens after a sequence that has been read along."""
        import mlx.core as mx

        part, proposed = mx.array([tokens[len(self._tokens) :]]), list[Any]()
        for _ in range(count):
            logits = self.model(part, cache=self._cache)[:, -1, : self.vocabulary]
            part = logits.argmax(axis=-1, keepdims=True)
            proposed.append(part)
        found = _integers(mx.concatenate(proposed, axis=1)[0])
        self._tokens = tokens + found[:-1]
        return found

    def forget(self) -> None:
        """Free the cache."""
        self._cache, self._tokens = [], []

    def _cut(self, tokens: list[int]) -> None:
        """Keep in the cache only what a sequence begins with, without its last token."""
        from mlx_lm.models.cache import make_prompt_cache

        kept = common_tokens(self._tokens, tokens[:-1])
        if not kept:
            self._cache = make_prompt_cache(self.model)
        else:
            for layer in self._cache:
                layer.trim(len(self._tokens) - kept)
        del self._tokens[kept:]


def check(model: Any, tokenizer: Any, draft: Any, draft_tokenizer: Any) -> None:
    """Check that one model can be the draft of another.

    Raises:
        LoadError: it cannot.
    """
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise LoadError("The draft model has other tokens than the model. Choose a draft_model of its family.")
    for what, each in (("draft model", draft), ("model", model)):
        kinds = {type(layer).__name__ for layer in make_prompt_cache(each) if type(layer) is not KVCache}
        if kinds:
            kind = ", ".join(sorted(kinds))
            raise LoadError(f"The {what} has caches that cannot be cut ({kind}). Remove draft_model.")


def verified(model: Any, array: Any, due: int, proposed: list[int], sampler: Any) -> list[int]:
    """Read the token that is due and the proposed ones in one pass. Returns the right ones, and the next one.

    Args:
        model: the model.
        array: a `GenerationBatch` of one sequence. It goes on from the tokens that are returned.
        due: the token that was sampled last.
        proposed: those that may follow it.
        sampler: of the sequence.
    """
    import mlx.core as mx

    logits = model(mx.array([[due, *proposed]]), cache=array.prompt_cache)[0]
    tokens = _accepted(sampler, logits - mx.logsumexp(logits, axis=-1, keepdims=True), proposed)
    for layer in array.prompt_cache:
        layer.trim(len(proposed) + 1 - len(tokens))
    array._next_tokens = mx.array(tokens[-1:], dtype=mx.uint32)  # noqa: SLF001 - the class has no other way in
    return tokens


def _accepted(sampler: Any, logprobs: Any, proposed: list[int]) -> list[int]:
    """The tokens that are sampled, up to the first one that was not proposed; at least one.

    Args:
        sampler: called once for each token, as it counts them; the greedy one once for all.
        logprobs: after the last token of the sequence, and after each proposed one.
        proposed: the tokens of the draft.
    """
    from mlx_lm.sample_utils import greedy_sampler

    if sampler is greedy_sampler:
        likeliest = _integers(sampler(logprobs))
        right = common_tokens(likeliest[: len(proposed)], proposed)
        return likeliest[: right + 1]
    tokens: list[int] = []
    for at in range(len(proposed) + 1):
        tokens.append(int(sampler(logprobs[at : at + 1]).item()))
        if at < len(proposed) and tokens[-1] != proposed[at]:
            break
    return tokens


def _integers(array: Any) -> list[int]:
    return [int(value) for value in array.tolist()]
