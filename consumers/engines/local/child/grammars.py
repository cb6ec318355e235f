"""The grammar of an answer that must have a form: what a request asks for, in the language of llguidance (Lark).

Pure: a request in, a text out. Source of the language: llguidance's documentation of its syntax.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from consumers.engines.local.child.schemas import narrowed
from pipeline.wire.constraints import Constraint
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, FunctionSpec, NamedToolChoice

_JSON_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"\x20|\n\x20{0,24}"}
"""White space between the tokens of JSON: one space, or a new line with its indentation. Unlimited white space would
let a small model fill its answer with it."""

_KNOWN: Final = frozenset({"json_tools", "mistral"})
_ANY_OBJECT: Final = {"type": "object"}
_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class CallForm:
    """How a model writes a tool call. All but `special` are Lark expressions.

    Attributes:
        start: the marker before a call.
        special: whether that marker is a special token, which no text contains.
        prefix: what comes between the marker and the name of the function.
        between: what comes between the name and the arguments.
        end: what comes after the arguments.
        separator: what comes between two calls.
    """

    start: str
    special: bool
    prefix: str
    between: str
    end: str
    separator: str = ""

    def rule(self, function: FunctionSpec) -> str:
        """The expression of a call of one function, without its marker."""
        arguments = f"%json {_json(arguments_schema(function))}"
        name = quote(_json(function.name)[1:-1])
        return f"{self.prefix} {name} {self.between} {arguments} {self.end}"


def quote(text: str) -> str:
    """A text as a Lark string; nothing for an empty one."""
    return _json(text) if text else ""


def call_form(parser: str, marker: Callable[[str], str], start: str, end: str) -> CallForm | None:
    """The form of the calls that a parser of mlx-lm reads; None if this module does not know it.

    Args:
        parser: the name of the parser's module.
        marker: a marker as a Lark expression: `<[7]>` if it is the special token 7.
        start: the marker before a call.
        end: the marker after it.
    """
    if parser not in _KNOWN:
        return None
    opening = marker(start)
    special = opening.startswith("<[")
    if parser == "json_tools":
        name, arguments = quote('\n{"name": "'), quote('", "arguments": ')
        return CallForm(opening, special, name, arguments, f"{quote('}' + chr(10))} {marker(end)}", quote("\n"))
    if parser == "mistral" and marker("[ARGS]").startswith("<["):
        return CallForm(opening, special, "", marker("[ARGS]"), "")
    return None


def refusal(reason: str, param: str) -> HeadraceError:
    """The error of a request for a form that cannot be compiled, or followed. `reason` is llguidance's."""
    # The place in its grammar stands before the reason, and the grammar below it.
    lines = [re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", reason.strip().partition("\n")[0])]
    lines += [line.removeprefix("error: ") for line in reason.splitlines()[1:] if line.startswith("error: ")]
    stated = "; ".join(line.strip(" .:") for line in lines)[:300]
    message = f"`{param}` asks for a form that is not supported: {stated}."
    return HeadraceError(ErrorCode.INVALID_REQUEST, message, param=param)


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
    if form is None and not (request.forces_tools or request.constraint):
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
    one = isinstance(request.tool_choice, NamedToolChoice) or request.parallel_tool_calls is False
    more = "" if one else f" ({form.separator} {form.start} call)*"
    calls = f"{form.start} call{more}"
    lines = ["%llguidance {}"]
    if request.forces_tools:
        lines.append(f"start: {calls}")
    elif request.constraint:
        lines += [f"start: content | {calls}", f"content: {_inline(request.constraint)}"]
    else:
        # Text first, then calls: the model decides whether it calls anything. A marker that is text ends the first part
        # where it first occurs.
        lines += [f"start: TEXT | opening call{more}", r"TEXT: /(.|\n)*/"]
        lines.append(f"opening: TEXT {form.start}" if form.special else f"opening[lazy]: TEXT {form.start}")
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(functions))))
    return lines + [f"call_{index}: {form.rule(function)}" for index, function in enumerate(functions)]


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
            return f"%json {_json(_with_options(narrowed(constraint.value)))}"
        case "json_object":
            return f"%json {_json(_with_options(_ANY_OBJECT))}"
        case "choice":
            return "(" + " | ".join(quote(choice) for choice in constraint.value) + ")"
        case kind:
            message = f"`{constraint.param}.{kind}` cannot be used together with `tools`. Send one of them."
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param=constraint.param)


def arguments_schema(function: FunctionSpec) -> dict[str, Any]:
    """The schema of a function's arguments, always an object. A function without parameters takes none."""
    if not function.parameters:
        return _with_options(_NO_ARGUMENTS)
    return _with_options(narrowed({"type": "object", **function.parameters}))


def _with_options(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _JSON_OPTIONS}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
