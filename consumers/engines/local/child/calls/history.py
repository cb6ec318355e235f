"""Earlier tool calls and their results, in the form that a chat template takes. No I/O.

Templates differ: they take arguments as objects or as JSON text, ids of nine characters, or one call in a turn. What a
template takes is found by rendering a short conversation when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, Final, NamedTuple

from consumers.engines.local.child.calls.ids import nine_characters

Turn = dict[str, Any]
Render = Callable[..., str]
"""A chat template: takes turns, and `tools`, and returns the prompt."""

_PROBE: Final = "headrace_probe"
_ID: Final = "call_0123456789abcdef01234567"
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "",
        "parameters": {"type": "object", "properties": {_PROBE: {"type": "string", "description": ""}}, "required": []},
    },
}


class CallHistory(NamedTuple):
    """How a template takes earlier calls.

    Attributes:
        text: arguments as JSON text, not as objects.
        wrapped: arguments that are no object must be put into one.
        nine: ids have nine letters and digits.
        single: a turn has one call.
    """

    text: bool = False
    wrapped: bool = False
    nine: bool = False
    single: bool = False

    def rewritten(self, turns: list[Turn]) -> list[Turn]:
        """A conversation, as turns of a template, in this form. Each result has the name of its function."""
        if not any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
            return turns
        names = {call["id"]: call["function"]["name"] for turn in turns for call in turn.get("tool_calls") or ()}
        made = [self._turn(turn, names) for turn in turns]
        return list(_one_by_one(made)) if self.single else made

    def _turn(self, turn: Turn, names: dict[str, str]) -> Turn:
        turn = dict(turn)
        if turn["role"] == "tool" and "name" not in turn and turn.get("tool_call_id") in names:
            turn["name"] = names[turn["tool_call_id"]]
        if self.nine and turn.get("tool_call_id") is not None:
            turn["tool_call_id"] = nine_characters(turn["tool_call_id"])
        if turn.get("tool_calls"):
            turn["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        return turn

    def _call(self, call: Turn) -> Turn:
        arguments = call["function"]["arguments"]
        if self.text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif self.wrapped and isinstance(arguments, str):
            arguments = {"arguments": arguments}
        call_id = nine_characters(call["id"]) if self.nine else call["id"]
        return {**call, "id": call_id, "function": {**call["function"], "arguments": arguments}}


def _one_by_one(turns: list[Turn]) -> Iterable[Turn]:
    """Each call in a turn of its own, with its result after it."""
    at = 0
    while at < len(turns):
        turn, at = turns[at], at + 1
        calls = turn.get("tool_calls") or []
        if len(calls) < 2:
            yield turn
            continue
        results = []
        while at < len(turns) and turns[at]["role"] == "tool":
            results.append(turns[at])
            at += 1
        for number, call in enumerate(calls):
            yield {**turn, "tool_calls": [call], **({"content": ""} if number else {})}
            own = [result for result in results if result.get("tool_call_id") == call["id"]]
            yield from own
            results = [result for result in results if result not in own]
        yield from results


def history_of(render: Render) -> CallHistory:
    """What a template takes. The default if it takes no calls at all."""
    for nine, text in product((False, True), (False, True)):
        form = CallHistory(text=text, nine=nine)
        if _is_taken(render, form, {_PROBE: _PROBE}):
            wrapped = not text and not _is_taken(render, form, _PROBE)
            several = _is_taken(render, form, {_PROBE: _PROBE}, calls=2)
            return CallHistory(text=text, wrapped=wrapped, nine=nine, single=not several)
    return CallHistory()


def _is_taken(render: Render, form: CallHistory, arguments: Any, *, calls: int = 1) -> bool:
    ids = [f"{_ID}{index}" for index in range(calls)]
    function = {"name": _PROBE, "arguments": arguments}
    made: list[Turn] = [{"id": call_id, "type": "function", "function": function} for call_id in ids]
    turns: list[Turn] = [
        {"role": "user", "content": "Begin."},
        {"role": "assistant", "content": "", "tool_calls": made},
        *({"role": "tool", "tool_call_id": call_id, "content": "Done."} for call_id in ids),
    ]
    try:
        text = render(form.rewritten(turns), tools=[_TOOL])
    except Exception:
        return False
    # An object written as Python writes it, or text written as a string within JSON, is not what the model knows.
    wrong = f"'{_PROBE}'" in text or f'\\"{_PROBE}\\"' in text
    return _PROBE in text and not wrong
