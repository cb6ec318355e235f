"""From sampled tokens to the answer: text, stop strings, tool calls, the finish reason and exact token counts.

Tokens are fed one at a time. They pass four stages, and each stage holds text back until it can decide: characters
with incomplete bytes, text that could become a mark of reasoning, text that could become a stop string, and text that
could become the marker of a tool call. Reasoning leaves after the second stage: it has no stop strings and no calls.

To resume an answer, its tokens are replayed through the same stages. Only the text after them comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from consumers.engines.local.child.calls.answer import AnswerCalls
from consumers.engines.local.child.separator import Separator, Stretch, overlap
from pipeline.engine import CUT_IN_REASONING, Piece
from pipeline.wire.answers import CompletionDetails, FinishReason, PromptDetails, TokenScore, ToolCall, Usage

_MORE: Final = "x"
"""Stands for the text that follows: the white space before it is shown then."""


class Detokenizer(Protocol):
    """Turns a growing list of tokens into text, without incomplete characters."""

    def push(self, token: int) -> str:
        """The text that token completes, possibly empty."""
        ...

    def flush(self) -> str:
        """The text that is still held back. No token may follow."""
        ...


class StopMatcher:
    """Cuts text at the stop string that ends first. If two end at the same character, the longer wins.

    Text that could be the beginning of a stop string is held back, so that no part of a stop string comes out, however
    it is split into chunks.

    Attributes:
        matched: the stop string that was found; empty before that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.matched = ""

    def push(self, chunk: str) -> str:
        """The text that certainly comes before any stop string."""
        if self.matched or not self._stops:
            return "" if self.matched else chunk
        text = self._held + chunk
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.matched, self._held = text[at:end], ""
            return text[:at]
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


@dataclass
class Transcript:
    """One growing answer.

    Args:
        prompt_tokens: the length of the prompt as the model read it.
        max_tokens: the most tokens that the answer may have, including replayed ones.
        detokenizer: a new one, for this answer alone.
        end_tokens: tokens that end a turn. They are sampled, so they count as completion tokens. They have no text.
        silent_tokens: other tokens without text.
        separator: separates reasoning from the answer; None if the model's text is the answer.
        stops: strings that end the answer. They are matched against its raw text, even inside a tool call, and not
            against reasoning.
        calls: takes tool calls out of this answer; None if the request offers no tools.
        resume_chars: the number of characters of the answer that the reader already has.
        resume_reasoning_chars: the same of reasoning.
        one_call: whether the answer ends with its first tool call. The worker keeps that one alone.
        notes: on parameters that the engine did not take as they were written.
        score: gives the log-probabilities of a token that was just sampled; None if the request asks for none.

    Attributes:
        cached_tokens: how many tokens of the prompt were not computed, because an earlier request had left them.
    """

    prompt_tokens: int
    max_tokens: int
    detokenizer: Detokenizer
    end_tokens: Collection[int] = ()
    silent_tokens: Collection[int] = ()
    separator: Separator | None = None
    stops: Sequence[str] = ()
    calls: AnswerCalls | None = None
    resume_chars: int = 0
    resume_reasoning_chars: int = 0
    one_call: bool = False
    notes: Sequence[str] = ()
    score: Callable[[int], TokenScore] | None = None
    finish_reason: FinishReason | None = field(default=None, init=False)
    tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._stop = StopMatcher(self.stops)
        self._skip = self.resume_chars
        self._skip_reasoning = self.resume_reasoning_chars
        self._reasoning_tokens = 0

    def took_over(self, tokens: int) -> None:
        """Note how many tokens of the prompt came from the prompt cache and are not computed for this request."""
        self.cached_tokens = tokens

    def replay(self, tokens: Sequence[int]) -> Piece:
        """Replay the tokens of earlier attempts. Returns a piece with the text after `resume_chars`, and no tokens.

        The piece has no tool calls: a part of a call is sent together with its token, so the reader has it. If the
        answer is already complete, the piece has a finish reason.
        """
        text, reasoning, last = "", "", Piece()
        for token in tokens:
            last = self._take(token)
            text += last.text
            reasoning += last.reasoning
            if last.finish_reason is not None:
                break
        return msgspec.structs.replace(last, text=text, reasoning=reasoning, token_ids=[], tool_calls=[])

    def feed(self, token: int) -> Piece:
        """The piece that one sampled token adds. No token may follow after `finish_reason` is set."""
        reasoned = self._reasoning_tokens
        piece = self._take(token)
        if self.score is not None:
            scored = self.score(token)
            piece.scores = [] if token in self.end_tokens or self._reasoning_tokens > reasoned else [scored]
        return piece

    def _take(self, token: int) -> Piece:
        self.tokens += 1
        ended = token in self.end_tokens
        silent = ended or token in self.silent_tokens
        reasoning, raw = self._separate("" if silent else self.detokenizer.push(token))
        text, calls = self._split(self._stop.push(raw))
        ended = ended or (self.one_call and self.calls is not None and self.calls.first_is_complete)
        if ended or self._stop.matched or self.tokens >= self.max_tokens:
            thought, rest, more = self._finish()
            reasoning, text, calls = reasoning + thought, text + rest, calls + more
            # Only a model that ended its turn has stopped in order to call a tool.
            stopped: FinishReason = "tool_calls" if self.calls is not None and self.calls.begun else "stop"
            self.finish_reason = stopped if ended or self._stop.matched else "length"
        return Piece(
            text=self._beyond_resumed(text),
            reasoning=self._beyond_resumed_reasoning(reasoning),
            token_ids=[token],
            tool_calls=calls,
            finish_reason=self.finish_reason,
            stop=self._stop.matched if self.finish_reason == "stop" else "",
            usage=self._usage() if self.finish_reason else None,
            notes=self._notes_at_end() if self.finish_reason else [],
        )

    def _separate(self, text: str) -> tuple[str, str]:
        """The reasoning and the answer's raw text that text completes. Counts a token of reasoning or of its marks."""
        if self.separator is None:
            return "", text
        before = self.separator.place
        parts = self.separator.push(text)
        self._reasoning_tokens += "reasoning" in (before, self.separator.place)
        return _of_kinds(parts)

    def _finish(self) -> tuple[str, str, list[ToolCall]]:
        reasoning, raw = "", ""
        if not self._stop.matched:
            rest, parts = self.detokenizer.flush(), list[Stretch]()
            if self.separator is not None:
                parts, rest = [*self.separator.push(rest), *self.separator.flush()], ""
            reasoning, raw = _of_kinds(parts)
            raw = self._stop.push(raw + rest)
            raw += self._stop.flush()
        text, calls = self._split(raw)
        if self.calls is None:
            return reasoning, text, calls
        rest, more = self.calls.flush()
        return reasoning, text + rest, calls + more

    def _split(self, raw: str) -> tuple[str, list[ToolCall]]:
        return (raw, []) if self.calls is None else self.calls.push(raw)

    def _beyond_resumed(self, text: str) -> str:
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]

    def _beyond_resumed_reasoning(self, text: str) -> str:
        skipped = min(self._skip_reasoning, len(text))
        self._skip_reasoning -= skipped
        return text[skipped:]

    def _notes_at_end(self) -> list[str]:
        cut = self.finish_reason == "length" and self.separator is not None and self.separator.place == "reasoning"
        of_calls = self.calls.notes if self.calls is not None else ()
        return [*self.notes, *of_calls, *([CUT_IN_REASONING] if cut else [])]

    def _usage(self) -> Usage:
        cached = PromptDetails(self.cached_tokens)
        usage = Usage(self.prompt_tokens, self.tokens, self.prompt_tokens + self.tokens, cached)
        if self.separator is not None:
            usage.completion_tokens_details = CompletionDetails(self._reasoning_tokens)
        return usage


def shown_of(text: str, separator: Separator | None) -> tuple[int, int]:
    """How many characters of reasoning and of the answer a transcript has shown after a text that goes on.

    What another engine has shown of the same text can have other white space around the reasoning.
    """
    if separator is None:
        return 0, len(text)
    parts = [*separator.push(text + _MORE), *separator.flush()]
    reasoning, answer = _of_kinds(parts)
    goes_on_thinking = bool(parts) and parts[-1].kind == "reasoning"
    return len(reasoning) - goes_on_thinking, len(answer) - (not goes_on_thinking)


def _of_kinds(parts: Sequence[Stretch]) -> tuple[str, str]:
    """The reasoning in parts, and the rest."""
    reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
    return reasoning, "".join(part.text for part in parts if part.kind != "reasoning")
