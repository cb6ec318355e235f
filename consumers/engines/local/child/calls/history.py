"""Earlier tool calls and their results, in the form that a chat template takes. No I/O.

Templates differ: they take arguments as objects or as JSON text, ids of nine characters, one call in a turn, or no text
beside a call. Some take no calls at all: their models' makers write calls into the text. What a template takes is found
by rendering a short conversation when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, Final, NamedTuple

from consumers.engines.local.child.calls.ids import nine_characters
from consumers.engines.local.child.calls.writing import Writer

Turn = dict[str, Any]
Render = Callable[..., str]
"""A chat template: takes turns, and `tools`, and returns the prompt."""

# Each stands in one place of the conversation, so that it is in the prompt only if the template writes that place.
_PROBE: Final = "headrace_probe"
_KEY: Final = "headrace_key"
_VALUES: Final = ("headrace_first", "headrace_second")
_SAID: Final = "headrace_said"
_ID: Final = "call_0123456789abcdef01234567"
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": ""}}, "required": []},
    },
}


class CallHistory(NamedTuple):
    """How a template takes earlier calls.

    Attributes:
        text: arguments as JSON text, not as objects.
        wrapped: arguments that are no object must be put into one.
        nine: ids have nine letters and digits.
        single: a turn has one call.
        null: the content of a turn with calls is null, not empty.
        apart: the text before calls is a turn of its own.
        write: writes calls into the text, for a template that takes none.
    """

    text: bool = False
    wrapped: bool = False
    nine: bool = False
    single: bool = False
    null: bool = False
    apart: bool = False
    write: Writer | None = None

    def rewritten(self, turns: list[Turn]) -> list[Turn]:
        """A conversation, as turns of a template, in this form. Each result has the name of its function."""
        if not any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns):
            return turns
        names = {call["id"]: call["function"]["name"] for turn in turns for call in turn.get("tool_calls") or ()}
        made = [self._turn(turn, names) for turn in turns]
        if self.single:
            made = list(_one_by_one(made))
        if self.apart:
            made = [part for turn in made for part in _text_and_calls(turn)]
        return [_with_null(turn) for turn in made] if self.null else made

    def _turn(self, turn: Turn, names: dict[str, str]) -> Turn:
        turn = dict(turn)
        if turn["role"] == "tool" and "name" not in turn and turn.get("tool_call_id") in names:
            turn["name"] = names[turn["tool_call_id"]]
        if self.nine and turn.get("tool_call_id") is not None:
            turn["tool_call_id"] = nine_characters(turn["tool_call_id"])
        if turn.get("tool_calls"):
            turn["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        if self.write is not None and turn.get("tool_calls"):
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in turn.pop("tool_calls")]
            turn["content"] = "\n".join(filter(None, [turn["content"], self.write(calls)]))
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


def _text_and_calls(turn: Turn) -> list[Turn]:
    """A turn with text and calls as two."""
    if not (turn.get("tool_calls") and turn["content"]):
        return [turn]
    return [{"role": turn["role"], "content": turn["content"]}, {**turn, "content": ""}]


def _with_null(turn: Turn) -> Turn:
    return {**turn, "content": turn["content"] or None} if turn.get("tool_calls") else turn


def history_of(render: Render, write: Writer | None = None) -> CallHistory:
    """What a template takes. The default if it takes no calls at all.

    Args:
        render: the template.
        write: writes calls into the text as the model does; None if that is not known.
    """
    for null, nine, text in product((False, True), (False, True), (False, True)):
        form = CallHistory(text=text, nine=nine, null=null)
        if _is_taken(render, form):
            form = form._replace(wrapped=not text and not _is_taken(render, form, as_text=True))
            form = form._replace(single=not _is_taken(render, form, calls=2))
            apart = form._replace(apart=True)
            return apart if not _is_taken(render, form, said=_SAID) and _is_taken(render, apart, said=_SAID) else form
    form = CallHistory(wrapped=True, write=write)
    return form if write is not None and _is_taken(render, form, calls=2) else CallHistory()


def _is_taken(render: Render, form: CallHistory, *, as_text: bool = False, calls: int = 1, said: str = "") -> bool:
    """Whether a template writes a conversation in a form, and all of its calls.

    Args:
        render: the template.
        form: of the conversation.
        as_text: whether the arguments are no object.
        calls: how many calls the turn has.
        said: the text before them.
    """
    ids, values = [f"{_ID}{index}" for index in range(calls)], _VALUES[:calls]
    functions = [{"name": _PROBE, "arguments": value if as_text else {_KEY: value}} for value in values]
    made = [
        {"id": call_id, "type": "function", "function": function}
        for call_id, function in zip(ids, functions, strict=True)
    ]
    turns: list[Turn] = [
        {"role": "user", "content": "Begin."},
        {"role": "assistant", "content": said, "tool_calls": made},
        *({"role": "tool", "tool_call_id": call_id, "content": "Done."} for call_id in ids),
    ]
    try:
        text = render(form.rewritten(turns), tools=[_TOOL])
    except Exception:
        return False
    # An object written as Python writes it, or text written as a string within JSON, is not what the model knows.
    wrong = any(f"'{value}'" in text or f'\\"{value}\\"' in text for value in values)
    return all(value in text for value in (*values, said)) and not wrong
