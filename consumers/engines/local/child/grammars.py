"""The grammar of an answer that must have a form: what a request asks for, in the language of llguidance (Lark).

Pure: a request in, a text out. `forms` has the calls of each family of models.
"""

from __future__ import annotations

import re
from typing import Final

from consumers.engines.local.child.forms.families import CallForm, Channels
from consumers.engines.local.child.forms.lark import ANY_TEXT, json_of, one_of
from consumers.engines.local.child.schemas import narrowed
from pipeline.wire.constraints import Constraint
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, FunctionSpec, NamedToolChoice

_ANY_OBJECT: Final = {"type": "object"}

# llguidance's complaints, and what they mean.
_THEIR_WORDS = {
    r"Unimplemented keys: \[(.*)\]": r"the JSON schema uses \1",
    r"Invalid type: (.*)": r'the JSON schema has the unknown type "\1"',
    r"Resource '(.*?)' is not present in a registry.*": r"the JSON schema refers to another document (\1)",
    r"invalid regex (.*) \(in .*\): regex parse error": r"the regular expression \1 has an error",
    r"unknown name: (.*)": r"the grammar does not define \1",
}


def refusal(reason: str, param: str) -> HeadraceError:
    """The error of a request for a form that cannot be compiled, or followed. `reason` is llguidance's."""
    # The place in its grammar stands before the reason, and the grammar below it.
    lines = [re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", reason.strip().partition("\n")[0])]
    lines += [line.removeprefix("error: ") for line in reason.splitlines()[1:] if line.startswith("error: ")]
    stated = "; ".join(_reworded(line.strip(" .:")) for line in lines)[:300]
    message = f"The form of answer that this request asks for is not supported: {stated}."
    return HeadraceError(ErrorCode.INVALID_REQUEST, message, param=param)


def _reworded(line: str) -> str:
    """A complaint of llguidance in our words; an unknown one as it is."""
    for theirs, ours in _THEIR_WORDS.items():
        if found := re.fullmatch(theirs, line):
            return found.expand(ours)
    return line


def grammar_of(request: ChatRequest, form: CallForm | None) -> str:
    """The grammar of the answer to a request; empty if any text will do.

    Args:
        request: it may force a tool call, offer strict tools, or ask for a form.
        form: how the model writes calls; None if calls cannot be forced.

    Raises:
        HeadraceError: `unsupported_parameter`: the model's calls cannot be forced. `invalid_request`: a form cannot
            stand beside tools, or a grammar is in neither language.
    """
    calls = _calls(request)
    if not calls:
        return _alone(request.constraint) if request.constraint else ""
    if (form is None or not form.can_follow_text) and not (request.forces_tools or request.constraint):
        return ""  # `strict` promises something that this model's format has no grammar for
    if form is None:
        param = "tool_choice" if request.forces_tools else "response_format"
        message = f"This model's tool calls cannot be guided. Leave out `{param}`."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
    return "\n".join(_with_calls(request, calls, form))


def _calls(request: ChatRequest) -> list[FunctionSpec]:
    """The functions whose calls the grammar describes; empty if calls are left to the model."""
    functions = [tool.function for tool in request.tools or ()]
    if not functions or request.tool_choice == "none":
        return []
    if isinstance(request.tool_choice, NamedToolChoice):
        return [function for function in functions if function.name == request.tool_choice.function.name]
    strict = any(function.strict for function in functions)
    return functions if request.forces_tools or strict or request.constraint else []


def _with_calls(request: ChatRequest, functions: list[FunctionSpec], form: CallForm) -> list[str]:
    one = isinstance(request.tool_choice, NamedToolChoice) or request.parallel_tool_calls is False or not form.several
    more = "" if one else f" ({form.between} call)*"
    rest = f"call{more} {form.end}"
    lines = ["%llguidance {}"]
    if form.channels is not None:
        lines += _of_channels(request, form.channels, rest)
    elif request.forces_tools:
        lines.append(f"start: {form.start} {rest}")
    elif request.constraint:
        lines += [f"start: content | {form.start} {rest}", f"content: {_inline(request.constraint)}"]
    else:
        # Text first, then calls: the model decides whether it calls anything. A marker that is text ends the first part
        # where it first occurs.
        lines += [f"start: TEXT | opening {rest}", f"TEXT: {ANY_TEXT}"]
        lines.append(f"opening: TEXT {form.start}" if form.special else f"opening[lazy]: TEXT {form.start}")
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    for index, function in enumerate(functions):
        lines += form.rules(function, f"call_{index}")
    return lines


def _of_channels(request: ChatRequest, channels: Channels, call: str) -> list[str]:
    """The rules of an answer of messages, reasoning included."""
    lines = [f"aside: {channels.aside}"]
    if request.forces_tools:
        return [f"start: aside* {call}", *lines]
    content = _inline(request.constraint) if request.constraint else ANY_TEXT
    return [f"start: aside* (content | {call})", f"content: {channels.final} {content}", *lines]


def _alone(constraint: Constraint) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if constraint.kind == "regex":
        return LLMatcher.grammar_from_regex(constraint.value)
    if constraint.kind == "grammar":
        try:
            return any_to_lark(constraint.value)
        except Exception as error:  # it has an exception of its own, and raises others on what it does not expect
            raise refusal(str(error), constraint.param) from None
    return f"%llguidance {{}}\nstart: {_inline(constraint)}"


def _inline(constraint: Constraint) -> str:
    """A form as a part of a rule."""
    match constraint.kind:
        case "json_schema":
            return json_of(narrowed(constraint.value))
        case "json_object":
            return json_of(_ANY_OBJECT)
        case "choice":
            return one_of(constraint.value)
        case kind:
            message = f"`{constraint.param}.{kind}` cannot be used together with `tools`. Send one of them."
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param=constraint.param)
