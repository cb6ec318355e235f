"""What a model does about reasoning: its marks, and what its chat template takes to turn reasoning on and off.

The marks are mlx-lm's where it knows them, otherwise those of a list. What a template takes is found by rendering a
conversation with each argument and comparing. The reading thread uses it, with its own copy of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, NamedTuple

from consumers.engines.local.child.separator import HARMONY_MARKS, HarmonySeparator, Separator, ThinkSeparator
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.particular import SWITCHES, Thinking
from pipeline.wire.requests import ChatRequest

_PAIRS: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("◁think▷", "◁/think▷"),
)
_LINES: Final = ("\n", "\n", "\n\n")
_SPACES: Final = {"[THINK]": ("", "", ""), "<|START_THINKING|>": ("", "", ""), "<|channel>thought": ("\n", "\n", "")}
"""The white space after the first mark, before the second, and after it. Other marks have lines of their own."""
_BUDGET: Final = "thinking_budget"
"""The tokens that reasoning may have, as Seed-OSS's template takes it; 0 turns it off."""
_AMOUNTS: Final[tuple[Thinking, ...]] = ("low", "medium", "high")
_UNHEARD: Final = "unheard-of"
_DIFFERENT: Final = 2
_TURN: Final = "<|start|>assistant"
_TAIL_TOKENS: Final = 24
_ASKED: Final = [{"role": "user", "content": "Hello"}]


class ReasoningPlan(NamedTuple):
    """What becomes of the request's wish about reasoning.

    Attributes:
        arguments: for the chat template.
        notes: on what the template does not take as it was written.
    """

    arguments: dict[str, Any]
    notes: list[str]


class Marks(NamedTuple):
    """How a model marks its reasoning. Without `start` it writes messages with channels.

    Attributes:
        silent: other marks, around the answer.
        tokens: those of the marks. Their text is needed, though they may be special tokens.
        opening: the first token of `start`; None if that is not a token of its own.
        blanks: the tokens of one and of two line ends, which models write after `end`.
    """

    start: str
    end: str
    silent: tuple[str, ...]
    tokens: frozenset[int]
    opening: int | None
    blanks: frozenset[int]


class Reasoning:
    """The reasoning of one model.

    Args:
        tokenizer: mlx-lm's wrapper of a tokenizer.
        end_tokens: the tokens that end an answer.

    Attributes:
        marks: of the model; None if it has none.
    """

    def __init__(self, tokenizer: Any, end_tokens: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = frozenset(end_tokens)
        self.marks = _marks_of(tokenizer)
        self._switch = next((name for name in SWITCHES if self._differs(name)), "")
        self._amounts, self._none = self._read_amounts()
        # mlx-lm turns reasoning off by default where it knows no marks.
        unknown = self.marks is not None and self._switch == "enable_thinking" and not tokenizer.has_thinking
        self._default: dict[str, Any] = {"enable_thinking": True} if unknown else {}
        self._budget = not self._switch and self._render(**{_BUDGET: 0}) not in (None, self._render())
        self._always = self._opens(self._render() or "") and not (self._switch or self._amounts or self._budget)

    @property
    def thinks(self) -> bool:
        """Whether the model may reason before it answers."""
        return self.marks is not None

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer. In a model with channels, a call and the last message do."""
        if self.marks is None or self.marks.start:
            return self._end_tokens
        vocabulary = self._tokenizer.get_added_vocab()
        return self._end_tokens | {vocabulary[mark] for mark in ("<|call|>", "<|return|>") if mark in vocabulary}

    def plan(self, request: ChatRequest) -> ReasoningPlan:
        """The template's arguments for the amount of reasoning that a request asks for.

        Raises:
            HeadraceError: `unsupported_parameter`: the request turns reasoning off, and the model always reasons.
        """
        wanted, param = request.thinking, request.thinking_param
        unknown = [_no_effect(f"chat_template_kwargs.{name}") for name in self._unknown(request)]
        if wanted is None:
            return ReasoningPlan(self._default, unknown)
        plan = self._off(param) if wanted == "none" else self._on(wanted, param, worded=request.worded_thinking)
        return plan._replace(notes=plan.notes + unknown)

    def separator(self, prompt: list[int], *, calls: bool) -> Separator | None:
        """The separator of an answer to a prompt; None for a model without marks.

        Args:
            prompt: its tokens.
            calls: whether functions are offered.
        """
        marks = self.marks
        if marks is None:
            return None
        if not marks.start:
            separator = HarmonySeparator(calls=calls)
            separator.push(self._tokenizer.decode(prompt[-_TAIL_TOKENS:]).rpartition(_TURN)[2])
            return separator
        return ThinkSeparator(marks.start, marks.end, opened=self.opened(prompt), silent=marks.silent)

    def opened(self, prompt: list[int]) -> bool:
        """Whether a prompt ends with the mark before reasoning."""
        return self.marks is not None and self._opens(self._tokenizer.decode(prompt[-_TAIL_TOKENS:]))

    def written(self, reasoning: str, text: str, prompt: list[int]) -> str:
        """A part of an answer, with marks, as the model itself would have written it after a prompt.

        Args:
            reasoning: the reasoning.
            text: the answer after it. If it is empty, the reasoning is not closed, and the model continues it.
            prompt: the tokens before.
        """
        marks = self.marks
        if marks is None:
            return text
        if not marks.start:
            thought = f"<|channel|>analysis<|message|>{reasoning}" if reasoning else ""
            said = f"<|channel|>final<|message|>{text}" if text else ""
            return thought + ("<|end|><|start|>assistant" if thought and said else "") + said
        if not reasoning and not self.opened(prompt):
            return text
        first, last, then = _SPACES.get(marks.start, _LINES)
        start = "" if self.opened(prompt) else marks.start + first
        return start + reasoning + (last + marks.end + then + text if text else "")

    def _unknown(self, request: ChatRequest) -> list[str]:
        """The arguments for the chat template that it does not have, without those about reasoning."""
        template = self._tokenizer.chat_template
        if not isinstance(template, str):
            return []
        known = (*SWITCHES, "reasoning_effort")
        return [name for name in request.chat_template_kwargs or () if name not in known and name not in template]

    # ---- the template ------------------------------------------------------------------------------------------------

    def _off(self, param: str) -> ReasoningPlan:
        if self._switch:
            return ReasoningPlan({self._switch: False}, [])
        if self._none:
            return ReasoningPlan({"reasoning_effort": "none"}, [])
        if self._budget:
            return ReasoningPlan({_BUDGET: 0}, [])
        if self._amounts:
            least = self._amounts[0]
            note = f"`{param}`: this model always reasons. Its least reasoning effort, `{least}`, is used."
            return ReasoningPlan({"reasoning_effort": least}, [note])
        if self._always:
            message = f"This model always reasons: its chat template cannot turn that off. Leave out `{param}`."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
        return ReasoningPlan({}, [_no_effect(param)] if self.marks else [])

    def _on(self, wanted: Thinking, param: str, *, worded: bool) -> ReasoningPlan:
        arguments: dict[str, Any] = {self._switch: True} if self._switch else {}
        if self._amounts:
            amount = self._nearest(wanted)
            notes = [f"`{param}`: this model has no `{wanted}`; `{amount}` is used."] if amount != wanted else []
            return ReasoningPlan(arguments | {"reasoning_effort": amount}, notes if worded else [])
        if self._switch:
            note = f"`{param}`: this model's reasoning has no amounts. It is turned on."
            return ReasoningPlan(arguments, [note] if worded else [])
        reasons = self._always or self._budget
        return ReasoningPlan({}, [] if reasons and not worded else [_no_effect(param)])

    def _nearest(self, wanted: Thinking) -> Thinking:
        """The amount that the template takes: the wanted one, else the next larger one, else the largest."""
        above = _AMOUNTS[_AMOUNTS.index(wanted) :]
        return next((word for word in above if word in self._amounts), self._amounts[-1])

    def _read_amounts(self) -> tuple[list[Thinking], bool]:
        """The amounts that the template takes, and whether `none` turns reasoning off."""
        prompts = {word: self._render(reasoning_effort=word) for word in ("none", *_AMOUNTS)}
        if len({prompt for prompt in prompts.values() if prompt is not None}) < _DIFFERENT:
            return [], False
        unheard, none = self._render(reasoning_effort=_UNHEARD), prompts["none"]
        amounts = [word for word in _AMOUNTS if _is_known(word, prompts[word], unheard)]
        # A template that writes any word into the prompt does not know what it means.
        means_off = none not in (None, unheard) and _UNHEARD not in (unheard or "")
        return amounts, means_off and all(prompts[word] != none for word in amounts)

    def _differs(self, switch: str) -> bool:
        on, off = self._render(**{switch: True}), self._render(**{switch: False})
        return on is not None and off is not None and on != off

    def _render(self, **arguments: Any) -> str | None:
        """A conversation with these arguments; None if the template refuses it."""
        if not self._tokenizer.has_chat_template:
            return None
        render: Callable[..., Any] = self._tokenizer.apply_chat_template
        try:
            return str(render(_ASKED, add_generation_prompt=True, tokenize=False, **arguments))
        except Exception:  # a template is a program by the model's author, and may raise anything
            return None

    def _opens(self, prompt: str) -> bool:
        start = self.marks.start if self.marks else ""
        return bool(start) and prompt.rstrip().endswith(start)


def _is_known(word: str, prompt: str | None, unheard: str | None) -> bool:
    """Whether a template takes a word, and not only as it takes any: with that one the prompt is `unheard`."""
    return prompt is not None and (prompt != unheard or word in prompt.casefold())


def _no_effect(param: str) -> str:
    return f"`{param}` has no effect on this model."


def _marks_of(tokenizer: Any) -> Marks | None:
    # Marks are added tokens. The whole vocabulary is slow to read.
    vocabulary = tokenizer.get_added_vocab()
    if all(mark in vocabulary for mark in ("<|channel|>", "<|message|>", "<|start|>")):
        tokens = frozenset(vocabulary[mark] for mark in HARMONY_MARKS if mark in vocabulary)
        return Marks("", "", (), tokens, None, frozenset())
    if tokenizer.has_thinking:
        return _pair(tokenizer, tokenizer.think_start, tokenizer.think_end, tuple(tokenizer.structural_markers))
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    for start, end in _PAIRS:
        if (start in vocabulary and end in vocabulary) or (start in template and end in template):
            return _pair(tokenizer, start, end, ())
    return None


def _pair(tokenizer: Any, start: str, end: str, silent: tuple[str, ...]) -> Marks:
    marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in (start, end, *silent)]
    added = set(tokenizer.get_added_vocab().values())
    opening = marks[0][0] if marks[0] and marks[0][0] in added else None
    blanks = [tokenizer.encode(blank, add_special_tokens=False) for blank in ("\n", "\n\n")]
    return Marks(
        start,
        end,
        silent,
        frozenset(token for tokens in marks for token in tokens),
        opening,
        frozenset(tokens[0] for tokens in blanks if len(tokens) == 1),
    )
