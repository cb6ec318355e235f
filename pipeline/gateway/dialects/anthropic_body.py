"""The body of `POST /v1/messages`, and how its conversation, tools and limits become a chat completion's. No I/O.

Source of the shapes: Anthropic's API reference (Messages, Count tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NoReturn

import msgspec
from msgspec import Meta, Struct

from pipeline.wire.errors import ErrorCode, HeadraceError, quoted

# A system block that Claude Code puts first, with a value of its own in each request. It is for Anthropic's accounts
# and not for the model, and with it no two prompts would begin alike: each would be read anew.
_BILLING = "x-anthropic-billing-header:"
# The kinds of blocks by role.
_KINDS = {
    "system": ("text",),
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
}
# How Claude Code itself marks what the system says in the user's turn.
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
# The effort for a budget of thinking tokens: up to the number, that word.
_EFFORTS = ((2_048, "low"), (16_384, "medium"))


class ImageSource(Struct):
    """An image: in base64, or its address, which is refused."""

    type: str = ""
    media_type: str = ""
    data: str = ""
    url: str = ""


class ContentBlock(Struct):
    """One block of a message. `content` is that of a tool's result, `source` that of an image."""

    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Any = None
    tool_use_id: str = ""
    content: str | list[ContentBlock] | None = None
    is_error: bool | None = None
    source: ImageSource | None = None


Content = str | list[ContentBlock]


class MessageTurn(Struct):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content


class ClientTool(Struct):
    """A tool that the client runs. A tool of another `type` is one of Anthropic's own."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: str | None = None


class ToolChoice(Struct):
    """Whether and which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """Whether the model thinks before it answers, and for how many tokens at most."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | float | None = None


class OutputForm(Struct):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """The effort that the model makes, and the form of its answer."""

    effort: str | None = None
    format: OutputForm | None = None


class MessagesBody(Struct):
    """The body of `POST /v1/messages`. Unknown fields are ignored. The pipeline checks the numbers."""

    messages: Annotated[list[MessageTurn], Meta(min_length=1)]
    model: str | None = None
    system: Content | None = None
    max_tokens: int | float | None = None
    stop_sequences: list[str] | None = None
    temperature: int | float | None = None
    top_p: int | float | None = None
    top_k: int | float | None = None
    stream: bool | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputForm | None = None
    mcp_servers: list[Any] | None = None
    container: Any = None

    def fields(self) -> dict[str, Any]:
        """The fields of the same request as a chat completion.

        Raises:
            HeadraceError: `unsupported_parameter` for content, a tool or a server of which no engine can do anything;
                `invalid_request` for a forced tool without a name.
        """
        for name in ("mcp_servers", "container"):
            if getattr(self, name):
                _unsupported(name, f"`{name}` is not supported. Leave it out.")
        fields = {
            "messages": list(self._conversation()),
            "stream": bool(self.stream),
            "stop": self.stop_sequences,
            "tools": [_tool(index, tool) for index, tool in enumerate(self.tools or ())] or None,
            "reasoning_effort": self._effort(),
            "response_format": self._form(),
        }
        fields |= {name: getattr(self, name) for name in ("model", "max_tokens", "temperature", "top_p", "top_k")}
        fields |= _choice(self.tool_choice)
        return {name: value for name, value in fields.items() if value is not None}

    def _conversation(self) -> Iterator[dict[str, Any]]:
        if system := _system(self.system):
            yield {"role": "system", "content": system}
        called: dict[str, str] = {}
        for role, blocks in _turns(self.messages):
            if role == "assistant":
                yield _assistant(blocks, called)
            else:
                yield from _given(blocks, called)

    def _effort(self) -> str | None:
        """The effort of thinking, in the words of a chat completion."""
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        if self.output_config is not None and self.output_config.effort:
            return self.output_config.effort
        if self.thinking is None:
            return None
        budget = self.thinking.budget_tokens
        return "medium" if budget is None else next((word for most, word in _EFFORTS if budget <= most), "high")

    def _form(self) -> dict[str, Any] | None:
        form = self.output_format or (self.output_config.format if self.output_config else None)
        if form is None:
            return None
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.schema}}


def _system(given: Content | None) -> str:
    blocks = _blocks(given or "", "system", ("text",))
    return _text(block for block in blocks if not block.text.startswith(_BILLING))


def _turns(messages: Iterable[MessageTurn]) -> list[tuple[str, list[ContentBlock]]]:
    """The turns of user and assistant, in alternation: turns of one role that follow each other are one.

    A message of the system in mid-conversation is a reminder in the user's turn: many chat templates refuse one there.
    """
    turns: list[tuple[str, list[ContentBlock]]] = []
    for index, message in enumerate(messages):
        blocks = _blocks(message.content, f"messages[{index}]", _KINDS[message.role])
        role: str = message.role
        if role == "system":
            role, blocks = "user", [ContentBlock("text", _REMINDER.format(_text(blocks)))]
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((role, blocks))
    return turns


def _blocks(content: Content, where: str, kinds: tuple[str, ...]) -> list[ContentBlock]:
    """The blocks of a content, which must be of these kinds."""
    if isinstance(content, str):
        return [ContentBlock("text", content)]
    for block in content:
        if block.type not in kinds:
            message = f"`{where}`: content of type {quoted(block.type, 40)} is not supported. Send text."
            _unsupported(where.partition("[")[0], message)
        if block.type == "tool_result" and block.content is not None:
            _blocks(block.content, f"{where}.content", ("text",))
    return list(content)


def _text(blocks: Iterable[ContentBlock], *, between: str = "\n\n") -> str:
    """The text of blocks, each a paragraph. Empty ones are left out."""
    return between.join(block.text for block in blocks if block.type == "text" and block.text)


def _assistant(blocks: list[ContentBlock], called: dict[str, str]) -> dict[str, Any]:
    """A turn of the assistant. Its tool calls are noted in `called`, the name by the id, for their results."""
    calls = [block for block in blocks if block.type == "tool_use"]
    called |= {block.id: block.name for block in calls}
    # The model wrote it without the empty lines that separate a client's blocks.
    text = _text(blocks, between="")
    thought = "\n\n".join(block.thinking for block in blocks if block.type == "thinking" and block.thinking)
    reasoning = {"reasoning_content": thought} if thought else {}
    if not calls:
        return {"role": "assistant", "content": text} | reasoning
    functions = [
        {"id": block.id, "function": {"name": block.name, "arguments": _arguments(block.input)}} for block in calls
    ]
    return {"role": "assistant", "content": text or None, "tool_calls": functions} | reasoning


def _arguments(given: Any) -> str:
    """The arguments of an earlier call. A string is what a model wrote that is no object."""
    return given if isinstance(given, str) else msgspec.json.encode({} if given is None else given).decode()


def _given(blocks: list[ContentBlock], called: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A turn of the user: the results of tools as messages of their own, then what the user says."""
    results = [block for block in blocks if block.type == "tool_result"]
    for block in results:
        content = block.content or ""
        text = content if isinstance(content, str) else _text(content)
        message = {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": f"Error: {text}" if block.is_error else text,
        }
        if name := called.get(block.tool_use_id):
            message["name"] = name
        yield message
    if len(results) < len(blocks) or not blocks:
        images = [{"type": "image_url", "image_url": _url(block.source)} for block in blocks if block.type == "image"]
        text = _text(blocks)
        yield {"role": "user", "content": [{"type": "text", "text": text}, *images] if images else text}


def _url(source: ImageSource | None) -> str:
    if source is None:
        return ""
    return f"data:{source.media_type};base64,{source.data}" if source.type == "base64" else source.url


def _tool(index: int, tool: ClientTool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        message = f"`tools[{index}]`: Anthropic's tool {quoted(tool.type, 40)} is not supported. Leave it out."
        _unsupported("tools", message)
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema or {}}
    if tool.description:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    fields: dict[str, Any] = {"tool_choice": {"auto": "auto", "any": "required", "none": "none"}.get(choice.type)}
    if choice.type == "tool":
        if not choice.name:
            raise HeadraceError(ErrorCode.INVALID_REQUEST, "`tool_choice.name` is required.", param="tool_choice")
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _unsupported(param: str, message: str) -> NoReturn:
    raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
