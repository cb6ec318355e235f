"""From sampled tokens to the answer: text, stop strings, tool calls, the finish reason and exact token counts.

Tokens are fed one at a time. They pass three stages, and each stage holds text back until it can decide: characters
with incomplete bytes, text that could become a stop string, and text that could become the marker of a tool call.

To resume an answer, its tokens are replayed through the same stages. Only the text after them comes out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from pipeline.engine import Piece
from pipeline.wire.messages import FinishReason, FunctionCall, PromptDetails, TokenScore, ToolCall, Usage


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
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, marker: str) -> int:
    """The length of the longest suffix of text that is a proper prefix of marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[len(text) - n :])), 0)


@dataclass(frozen=True)
class ToolSyntax:
    """How a model writes a tool call: the markers around it, and the parser of the text between them.

    An empty `end` means that the call extends to the end of the answer. `parse` returns one call or a list of calls,
    each with `name` and `arguments`. It may raise any exception on malformed text.
    """

    start: str
    end: str
    parse: Callable[[str], Any]


class ToolSplitter:
    """Extracts complete tool calls from text. A malformed call stays text, with its markers."""

    def __init__(self, syntax: ToolSyntax) -> None:
        self._syntax = syntax
        self._held = ""
        self._inside = False
        self._after_call = False

    def push(self, chunk: str) -> tuple[str, list[FunctionCall]]:
        """The plain text and the calls that chunk completes."""
        self._held += chunk
        text, calls = "", list[FunctionCall]()
        while True:
            marker = self._syntax.end if self._inside else self._syntax.start
            at = self._held.find(marker) if marker else -1
            if at < 0:
                break
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            if self._inside:
                plain, found = self._close(before, marker)
                text += plain
                calls += found
            else:
                text += self._plain(before)
            self._inside = not self._inside
        if not self._inside:
            keep = _overlap(self._held, self._syntax.start)
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            text += self._plain(ready)
        return text, calls

    def flush(self) -> tuple[str, list[FunctionCall]]:
        """What remains at the end: a call whose end marker is missing, or text."""
        held, self._held = self._held, ""
        if not self._inside:
            return self._plain(held), []
        self._inside = False
        return self._close(held, "")

    def _close(self, body: str, end: str) -> tuple[str, list[FunctionCall]]:
        calls = self._parse(body)
        if calls is None:
            return self._plain(self._syntax.start + body + end), []
        self._after_call = True
        return "", calls

    def _plain(self, text: str) -> str:
        """The text, without white space that only separates calls."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text

    def _parse(self, body: str) -> list[FunctionCall] | None:
        try:
            parsed = self._syntax.parse(body)
            found = parsed if isinstance(parsed, list) else [parsed]
            return [_function_call(call) for call in found] or None
        except Exception:  # each parser of a foreign format has its own exceptions
            return None


def _function_call(call: Any) -> FunctionCall:
    name, arguments = call["name"], call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = msgspec.json.decode(arguments)
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        raise ValueError("not a function call")
    return FunctionCall(name, msgspec.json.encode(arguments).decode())


@dataclass
class Transcript:
    """One growing answer.

    Args:
        request_id: the ids of tool calls are derived from it, so that any engine that resumes the answer uses the same.
        prompt_tokens: the length of the prompt as the model read it.
        max_tokens: the most tokens that the answer may have, including replayed ones.
        detokenizer: a new one, for this answer alone.
        end_tokens: tokens that end a turn. They are sampled, so they count as completion tokens. They have no text.
        silent_tokens: other tokens without text.
        stops: strings that end the answer. They are matched against the raw text, even inside a tool call.
        tools: how the model writes calls, if the request offers tools.
        resume_chars: the number of characters that the reader already has.
        one_call: whether the answer ends with its first tool call. The worker keeps that one alone.
        notes: on parameters that the engine did not take as they were written.
        score: gives the log-probabilities of a token that was just sampled; None if the request asks for none.

    Attributes:
        cached_tokens: how many tokens of the prompt were not computed, because an earlier request had left them.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    detokenizer: Detokenizer
    end_tokens: Collection[int] = ()
    silent_tokens: Collection[int] = ()
    stops: Sequence[str] = ()
    tools: ToolSyntax | None = None
    resume_chars: int = 0
    one_call: bool = False
    notes: Sequence[str] = ()
    score: Callable[[int], TokenScore] | None = None
    finish_reason: FinishReason | None = field(default=None, init=False)
    tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._stop = StopMatcher(self.stops)
        self._splitter = ToolSplitter(self.tools) if self.tools else None
        self._calls = 0
        self._skip = self.resume_chars

    def took_over(self, tokens: int) -> None:
        """So many tokens of the prompt are not computed for this request."""
        self.cached_tokens = tokens

    def replay(self, tokens: Sequence[int]) -> Piece:
        """Replay the tokens of earlier attempts. Returns a piece with the text after `resume_chars`, and no tokens.

        The piece has no tool calls: a call is sent together with the token that completes it, so the reader has it. If
        the answer is already complete, the piece has a finish reason.
        """
        text, last = "", Piece()
        for token in tokens:
            last = self._take(token)
            text += last.text
            if last.finish_reason is not None:
                break
        return Piece(text=text, finish_reason=last.finish_reason, stop=last.stop, usage=last.usage, notes=last.notes)

    def feed(self, token: int) -> Piece:
        """The piece that one sampled token adds. No token may follow after `finish_reason` is set."""
        piece = self._take(token)
        if self.score is not None:
            scored = self.score(token)
            piece.scores = [] if token in self.end_tokens else [scored]
        return piece

    def _take(self, token: int) -> Piece:
        self.tokens += 1
        ended = token in self.end_tokens
        silent = ended or token in self.silent_tokens
        raw = self._stop.push("" if silent else self.detokenizer.push(token))
        text, calls = self._split(raw)
        ended = ended or (self.one_call and self._calls > 0)
        if ended or self._stop.matched or self.tokens >= self.max_tokens:
            rest, more = self._finish()
            text, calls = text + rest, calls + more
            # Only a model that ended its turn has stopped in order to call a tool.
            stopped: FinishReason = "tool_calls" if self._calls else "stop"
            self.finish_reason = stopped if ended or self._stop.matched else "length"
        return Piece(
            text=self._beyond_resumed(text),
            token_ids=[token],
            tool_calls=calls,
            finish_reason=self.finish_reason,
            stop=self._stop.matched if self.finish_reason == "stop" else "",
            usage=self._usage() if self.finish_reason else None,
            notes=list(self.notes) if self.finish_reason else [],
        )

    def _finish(self) -> tuple[str, list[ToolCall]]:
        raw = ""
        if not self._stop.matched:
            raw = self._stop.push(self.detokenizer.flush())
            raw += self._stop.flush()
        text, calls = self._split(raw)
        if self._splitter is None:
            return text, calls
        rest, more = self._splitter.flush()
        return text + rest, calls + self._numbered(more)

    def _split(self, raw: str) -> tuple[str, list[ToolCall]]:
        if self._splitter is None:
            return raw, []
        text, found = self._splitter.push(raw)
        return text, self._numbered(found)

    def _numbered(self, found: Sequence[FunctionCall]) -> list[ToolCall]:
        calls = []
        for function in found:
            digest = hashlib.blake2b(f"{self.request_id}/{self._calls}".encode(), digest_size=12).hexdigest()
            calls.append(ToolCall(function, id=f"call_{digest}"))
            self._calls += 1
        return calls

    def _beyond_resumed(self, text: str) -> str:
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        return text[skipped:]

    def _usage(self) -> Usage:
        details = PromptDetails(self.cached_tokens)
        return Usage(self.prompt_tokens, self.tokens, self.prompt_tokens + self.tokens, details)
