"""What an engine of this package refuses before a request reaches a model, and how long an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ToolCall
from pipeline.wire.requests import ChatMessage, ChatRequest

_KV_STEP_TOKENS = 256
"""MLX grows a KV cache by this many tokens at a time."""


def offers_tools(request: ChatRequest) -> bool:
    """Whether the model is told of tools."""
    return bool(request.tools) and request.tool_choice != "none"


def refuse_unsupported(request: ChatRequest, *, calls_tools: bool) -> None:
    """Refuse what would silently change the answer.

    Raises:
        HeadraceError: `unsupported_parameter`.
    """
    if request.response_format is not None and request.response_format.type != "text":
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            f"this engine cannot force the form {request.response_format.type!r}: ask for it in the prompt",
            param="response_format",
        )
    if calls_tools:
        return
    if offers_tools(request):
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER, "the model's chat template has no place for tools", param="tools"
        )
    if any(message.tool_calls or message.role == "tool" for message in request.chat):
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            "the model's chat template has no place for tool calls and their results",
            param="messages",
        )


def answer_limit(wanted: int | None, *, prompt_tokens: int, room_tokens: int, default: int) -> int:
    """The most tokens the answer may have. A limit the client gave must fit; the default is cut to what fits.

    Raises:
        HeadraceError: `context_length_exceeded`.
    """
    room = room_tokens - prompt_tokens
    if wanted is None and room > 0:
        return min(default, room)
    if room > 0 and wanted is not None and wanted <= room:
        return wanted
    asked = f" and asks for {wanted}" if wanted is not None else ""
    raise HeadraceError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"the prompt has {prompt_tokens} tokens{asked}; there is room for {room_tokens}, prompt and answer together",
        param="messages" if room <= 0 or wanted is None else "max_tokens",
    )


def batch_kv_bytes(longest_tokens: Sequence[int], kv_bytes_per_token: int) -> int:
    """What a batch takes when each sequence has become as long as it may: all are padded to the longest."""
    if not longest_tokens:
        return 0
    padded = -(-max(longest_tokens) // _KV_STEP_TOKENS) * _KV_STEP_TOKENS
    return len(longest_tokens) * padded * kv_bytes_per_token


def room_tokens(context_tokens: int, *, kv_bytes_per_token: int, kv_bytes_limit: int) -> int:
    """How long a sequence may become: the model's context, or what of it the memory holds. A limit of 0 is none."""
    if not (kv_bytes_limit and kv_bytes_per_token):
        return context_tokens
    steps = kv_bytes_limit // (kv_bytes_per_token * _KV_STEP_TOKENS)
    return min(context_tokens, steps * _KV_STEP_TOKENS)


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it: plain text, arguments as objects, `developer` as `system`.

    Raises:
        HeadraceError: `invalid_request` for arguments that are no JSON object.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.text()}
    if message.name is not None:
        rendered["name"] = message.name
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return rendered


def _template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise HeadraceError(
            ErrorCode.INVALID_REQUEST,
            f"the arguments of the call to {call.function.name[:40]!r} are no JSON object: {error}",
            param="messages",
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
