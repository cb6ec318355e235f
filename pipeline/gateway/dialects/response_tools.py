"""The tools of a Responses call, and its choice among them, as those of a chat. No I/O.

Source of the shapes: the OpenAI API reference (responses, tools and tool choice), and the namespaces that Codex sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct

from pipeline.gateway.dialects.response_items import joined_name
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted


class ResponseTool(Struct, omit_defaults=True):
    """A tool: a function, or a `namespace` of functions. The other types are OpenAI's own."""

    type: str
    name: Annotated[str, Meta(max_length=128)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: list[ResponseTool] | None = None


class AllowedTool(Struct):
    """A tool that `tool_choice` names."""

    type: str
    name: str = ""


class ToolChoiceObject(Struct):
    """`tool_choice` that names a function, or lists the allowed ones."""

    type: str
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[AllowedTool] | None = None


ToolChoice = Literal["none", "auto", "required"] | ToolChoiceObject


class Offered(NamedTuple):
    """The tools of a call as a chat has them.

    Attributes:
        tools: the functions.
        choice: the chat's `tool_choice`; None where the call has none.
        named: namespace and name of each function of a namespace, by the name under which the model sees it.
        left_out: the types of the tools that are left out.
    """

    tools: list[dict[str, Any]]
    choice: str | dict[str, Any] | None
    named: dict[str, tuple[str, str]]
    left_out: list[str]

    @property
    def notes(self) -> list[str]:
        """A sentence about each tool that is left out."""
        return [f"Tool {quoted(kind, 40)} is left out: only function tools are supported." for kind in self.left_out]


def offered(tools: Iterable[ResponseTool], choice: ToolChoice | None) -> Offered:
    """The tools and the choice of a call.

    A tool that OpenAI runs itself is refused. It is left out, with a note, where the call has functions as well:
    an agent such as Codex offers it beside its own functions, and works without it.

    Raises:
        HeadraceError: `unsupported_parameter` for a tool, or a choice, that is not supported.
    """
    functions: list[dict[str, Any]] = []
    named: dict[str, tuple[str, str]] = {}
    others: list[str] = []
    for tool in tools:
        if tool.type == "function":
            functions.append(_function(tool, None))
        elif tool.type == "namespace":
            inner = [each for each in tool.tools or () if each.type == "function"]
            functions += [_function(each, tool.name) for each in inner]
            named |= {joined_name(tool.name, each.name or ""): (tool.name or "", each.name or "") for each in inner}
        else:
            others.append(tool.type)
    if others and (not functions or "custom" in others):
        kind = "custom" if "custom" in others else others[0]
        raise _unsupported("tools", f"Tool {quoted(kind, 40)} is not supported. Send function tools only.")
    if isinstance(choice, ToolChoiceObject):
        functions, chosen = _chosen(functions, choice)
        return Offered(functions, chosen, named, others)
    return Offered(functions, choice, named, others)


def _function(tool: ResponseTool, namespace: str | None) -> dict[str, Any]:
    if not tool.name:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "Each function tool must have a `name`.", param="tools")
    function: dict[str, Any] = {"name": joined_name(namespace, tool.name)}
    for field in ("description", "parameters", "strict"):
        if (value := getattr(tool, field)) is not None:
            function[field] = value
    return {"type": "function", "function": function}


def _chosen(functions: list[dict[str, Any]], choice: ToolChoiceObject) -> tuple[list[dict[str, Any]], Any]:
    """The functions that a choice leaves, and the chat's choice among them."""
    if choice.type == "function":
        return functions, {"type": "function", "function": {"name": choice.name}}
    if choice.type == "allowed_tools":
        allowed = {tool.name for tool in choice.tools or () if tool.type == "function"}
        return [each for each in functions if each["function"]["name"] in allowed], choice.mode
    raise _unsupported("tool_choice", f"`tool_choice` of type {quoted(choice.type, 40)} is not supported.")


def _unsupported(param: str, message: str) -> HeadraceError:
    return HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
