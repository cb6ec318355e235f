"""What a loaded model does with tools: how it writes calls, and how its template takes earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import msgspec

from consumers.engines.local.child.calls.answer import AnswerCalls
from consumers.engines.local.child.calls.formats import format_of
from consumers.engines.local.child.calls.history import CallHistory, history_of
from consumers.engines.local.child.checks import offers_tools
from pipeline.wire.requests import ChatRequest

Tool = dict[str, Any]

_BARE: Final[Tool] = {"type": "function", "function": {"name": "headrace_probe"}}


class ModelCalls:
    """The tool calls of one model.

    Args:
        tokenizer: the model's, in mlx-lm's wrapper. It is used here, and not kept.
        alone: whether a call without the marks of the model's family is a call.

    Attributes:
        supported: whether the chat template shows tools to the model.
        tokens: the tokens of the markers of calls. In some models they are special tokens, which would have no text.
        history: how the template takes earlier calls.
    """

    def __init__(self, tokenizer: Any, *, alone: bool = True) -> None:
        self._alone = alone
        self._format = format_of(tokenizer)
        self.supported = self._format is not None
        self.tokens = frozenset[int]()
        self.history = CallHistory()
        self._fills = False
        if self._format is None:
            return
        render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        self.history = history_of(render, self._format.write)
        self._fills = not _is_taken(render, _BARE) and _is_taken(render, _filled(_BARE))
        if self.history.nine:
            self._format = replace(self._format, ids="nine")
        sections = self._format.sections([])
        markers = [*self._format.marks, *(section.start for section in sections), *(one.end for one in sections)]
        self.tokens = frozenset(token for mark in markers for token in tokenizer.encode(mark, add_special_tokens=False))

    def shown(self, request: ChatRequest) -> list[Tool] | None:
        """The tools of a request for the chat template; None if the model may not call any."""
        if not offers_tools(request):
            return None
        tools: list[Tool] = msgspec.to_builtins(request.tools)
        return [_filled(tool) for tool in tools] if self._fills else tools

    def of_answer(self, request: ChatRequest, request_id: str) -> AnswerCalls | None:
        """What takes the calls out of the answer to a request; None if the model may not call tools."""
        if self._format is None or not offers_tools(request):
            return None
        # Where the answer must have a form, JSON is the answer.
        alone = self._alone and request.constraint is None
        return AnswerCalls(self._format, msgspec.to_builtins(request.tools), request_id, alone=alone)


def _filled(tool: Tool) -> Tool:
    """A tool with the members that clients may leave out and some templates need (GPT-OSS's)."""
    return {**tool, "function": {"description": "", "parameters": {"type": "object"}, **tool["function"]}}


def _is_taken(render: Callable[..., str], tool: Tool) -> bool:
    try:
        render([{"role": "user", "content": "Begin."}], tools=[tool])
    except Exception:  # a template is a program by the model's author, and may raise anything
        return False
    return True
