"""Answers that must have a form: which tokens may come next, as masks on the logits of a batch.

`Grammars` compiles what a request asks for into a `Guide`, one for each answer. `GuidedModel` stands between the model
and mlx-lm's batch and masks the logits of the sequences that have a guide. The masks of a step are computed while its
forward pass runs. A batch without guides runs as if this module did not exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from consumers.engines.local.child.calls.formats import format_of
from consumers.engines.local.child.checks import offers_tools
from consumers.engines.local.child.forms.families import CallForm, call_form
from consumers.engines.local.child.forms.lark import quote
from consumers.engines.local.child.grammars import grammar_of, refusal
from consumers.engines.local.child.separator import Separator
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

_WORD_BITS: Final = 32
_ALL: Final = 0xFFFFFFFF
_MOST_BLANKS: Final = 2


class Gate:
    """Tells the tokens of the answer, which have a form, from those of the reasoning before it, which have none.

    Args:
        separator: of the answer, a new one.
        text: gives the text of a token.
        opening: the token with which reasoning begins, where the prompt does not begin it; None if none may.
        blanks: tokens of white space, of which a few may follow reasoning.
    """

    def __init__(
        self, separator: Separator, text: Callable[[int], str], opening: int | None, blanks: Collection[int] = ()
    ) -> None:
        self._separator = separator
        self._text = text
        self._blanks = frozenset(blanks)
        self._answers = separator.place == "answer"
        self._reasoned = not self._answers
        self._opening = frozenset() if opening is None else frozenset({opening})
        self._blanks_left = 0
        self.besides: frozenset[int] = self._opening if self._answers else frozenset()
        """The tokens that may follow now, although the form does not have them."""

    @property
    def free(self) -> bool:
        """Whether any token may follow."""
        return not self._answers

    def take(self, token: int) -> bool:
        """Whether a token is one of the answer's form."""
        if self._answers and token not in self.besides:
            self.besides = frozenset()
            return True
        if self._blanks_left:
            self._blanks_left -= 1
            self.besides = self._blanks if self._blanks_left else frozenset()
            return False
        self._separator.push(self._text(token))
        self._reasoned |= self._separator.place != "answer"
        self._answers = self._reasoned and self._separator.place == "answer"
        if self._answers and self._blanks:
            self._blanks_left, self.besides = _MOST_BLANKS, self._blanks
        return False


class Guide:
    """What may follow in one answer.

    The main thread uses it, after the reading thread has made it.

    Args:
        matcher: llguidance's, with the tokens of earlier attempts consumed.
        param: the parameter of the request that asks for the form.
        gate: tells where the reasoning ends; None if there is none.
        ends: the tokens that end an answer. They may not follow in the reasoning: the answer would have no form.
    """

    def __init__(self, matcher: Any, param: str, gate: Gate | None = None, ends: Collection[int] = ()) -> None:
        self.matcher = matcher
        self.ends = ends
        self._param = param
        self._gate = gate
        self._sampled = False

    def follow(self, token: int) -> None:
        """The model reads token. It is the last one of the prompt, or the one that was sampled before."""
        if self._sampled and (self._gate is None or self._gate.take(token)):
            self.matcher.consume_token(token)
        self._sampled = True

    @property
    def free(self) -> bool:
        """Whether any token may follow."""
        return self._gate is not None and self._gate.free

    @property
    def besides(self) -> Collection[int]:
        """The tokens that may follow besides those of the form."""
        return () if self._gate is None else self._gate.besides

    def check(self) -> None:
        """Raise HeadraceError if the form can be followed no further, because it is too complex."""
        if self.matcher.is_error():
            raise refusal(self.matcher.get_error(), self._param)


class Grammars:
    """Compiles the forms of answers for one tokenizer. The reading thread uses it.

    The vocabulary is prepared at the first request that needs it. That takes half a second for 49,000 tokens, and holds
    the interpreter.

    Args:
        tokenizer: mlx-lm's wrapper of a Hugging Face tokenizer, of which the main thread has another copy.
        vocabulary: the number of logits.
        end_tokens: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = sorted(end_tokens)
        self._prepared: Any = None
        self._lock = threading.Lock()

    def guide(self, request: ChatRequest, resumed: Sequence[int], gate: Gate | None = None) -> Guide | None:
        """The guide of the answer to a request, after the tokens of earlier attempts; None if any text will do.

        The form begins where `gate` says that the answer does.

        Raises:
            HeadraceError: `invalid_request`: the form cannot be compiled, or the earlier tokens do not have it.
                `unsupported_parameter`: the calls of this model cannot be forced.
        """
        if not (request.constraint or request.forces_tools or _has_strict_tools(request)):
            return None
        from llguidance import LLMatcher

        form = self._form() if offers_tools(request) else None
        grammar = grammar_of(request, form)
        if not grammar:
            return None
        if form is not None and form.channels is not None and offers_tools(request):
            gate = None  # the grammar has the messages before the answer, too
        param = request.constraint.param if request.constraint else "tools"
        matcher = LLMatcher(self._vocabulary_of_tokens(), grammar, log_level=0)
        if matcher.is_error():
            raise refusal(matcher.get_error(), param)
        told = list(resumed)
        while told and told[-1] in self._end_tokens:
            told.pop()
        if gate is not None:
            told = [token for token in told if gate.take(token)]
        if matcher.try_consume_tokens(told) < len(told):
            message = "The answer so far, by another engine, does not have the form that the request asks for."
            raise HeadraceError(ErrorCode.ENGINE_FAILED, message)
        # The first mask takes longest. The lexer keeps what it has learnt.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(matcher.get_error(), param)
        return Guide(matcher, param, gate, self._end_tokens)

    def _form(self) -> CallForm | None:
        """How the model writes calls; None if they cannot be guided."""
        format_ = format_of(self._tokenizer)
        if format_ is None:
            return None
        section = next(iter(format_.sections([])), None)
        marks = (section.start, section.end) if section is not None else ("", "")
        template = self._tokenizer.chat_template
        return call_form(format_.name, self._marker, *marks, template if isinstance(template, str) else "")

    def _marker(self, text: str) -> str:
        """A marker in a grammar: its token if that is a special one, else its text."""
        tokens = self._tokenizer.encode(text, add_special_tokens=False) if text else []
        if len(tokens) == 1 and self._vocabulary_of_tokens().is_special_token(tokens[0]):
            return f"<[{tokens[0]}]>"
        return quote(text)

    def _vocabulary_of_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._prepared is None:
                inner = self._tokenizer._tokenizer  # noqa: SLF001 - the wrapper has no name for it
                try:
                    self._prepared = from_tokenizer(inner, n_vocab=self._vocabulary, eos_token=self._end_tokens)
                except Exception as error:  # the tokenizers that llguidance reads are listed nowhere
                    message = f"The tokenizer of this model cannot be guided: {error}"
                    raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="response_format") from None
            return self._prepared


def _has_strict_tools(request: ChatRequest) -> bool:
    return request.tool_choice != "none" and any(tool.function.strict for tool in request.tools or ())


class GuidedModel:
    """A model for mlx-lm's batch, whose logits are masked where a sequence has a guide.

    The main thread uses it.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._guides: dict[int, Guide] = {}
        self._sampling: tuple[Sequence[int], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the model's, such as its layers."""
        return getattr(self._model, name)

    def guide(self, key: int, guide: Guide | None) -> None:
        """Let guide say what may follow in a sequence. None if any token may."""
        if guide is not None:
            self._guides[key] = guide

    def forget(self, key: int) -> None:
        """The sequence has ended."""
        self._guides.pop(key, None)

    @contextmanager
    def sampling(self, keys: Sequence[int], tokens: Callable[[], Any]) -> Iterator[None]:
        """Within it, a pass of the model reads a token of each of these sequences and is followed by sampling.

        Args:
            keys: the sequences, in the order of the batch.
            tokens: gives the tokens as a list, or as an array whose computation has begun.
        """
        if not self._guides:
            yield
            return
        self._sampling = list(keys), tokens()
        try:
            yield
        finally:
            self._sampling = None

    def __call__(self, inputs: Any, cache: Any = None) -> Any:
        """The logits, masked in a pass that is followed by sampling."""
        logits = self._model(inputs, cache=cache)
        if self._sampling is None:
            return logits
        keys, tokens = self._sampling
        guides = [(guide, row) for row, key in enumerate(keys) if (guide := self._guides.get(key)) is not None]
        return self._masked(logits, guides, tokens) if guides else logits

    def _masked(self, logits: Any, guides: list[tuple[Guide, int]], tokens: Any) -> Any:
        import mlx.core as mx

        # The pass runs from here on. The tokens come before it, so that reading them does not wait for it.
        begin: Callable[..., None] = mx.async_eval
        if not isinstance(tokens, list):
            begin(tokens)
        begin(logits)
        read = tokens if isinstance(tokens, list) else tokens.tolist()
        for guide, row in guides:
            guide.follow(int(read[row]))
        allowed = mx.array(self._allowed(guides, logits.shape[0], logits.shape[-1]))
        return mx.where(allowed[:, None, :], logits, mx.array(-float("inf"), dtype=logits.dtype))

    def _allowed(self, guides: list[tuple[Guide, int]], rows: int, vocabulary: int) -> Any:
        """Which tokens may follow in each row, as booleans."""
        import numpy as np

        words = (vocabulary + _WORD_BITS - 1) // _WORD_BITS
        bits = np.full((rows, words), _ALL, dtype=np.uint32)
        for guide, row in guides:
            if guide.free:
                for token in guide.ends:
                    bits[row, token // _WORD_BITS] &= np.uint32(_ALL ^ (1 << token % _WORD_BITS))
                continue
            # In this thread: to wake others for each step takes longer than some masks of 50 µs.
            guide.matcher.unsafe_compute_mask_ptr(bits[row].ctypes.data, bits.strides[0])
            for token in guide.besides:
                bits[row, token // _WORD_BITS] |= np.uint32(1 << token % _WORD_BITS)
        return np.unpackbits(bits.view(np.uint8), axis=1, count=vocabulary, bitorder="little").view(np.bool_)
