"""Checks of a request before it reaches a model, and the limits of its answer."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.wire.answers import ToolCall
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatMessage, ChatRequest
from pipeline.wire.validation import UNREADABLE


def offers_tools(request: ChatRequest) -> bool:
    """Whether the model may call tools."""
    return bool(request.tools) and request.tool_choice != "none"


def refuse_unsupported(request: ChatRequest, *, calls_tools: bool) -> None:
    """Refuse parameters that would change the answer and are not supported.

    Raises:
        HeadraceError: `unsupported_parameter`.
    """
    if name := request.needs_ollama:
        message = f"Only Ollama supports `{name}`. Name one of its models, or leave `{name}` out."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)
    if calls_tools:
        return
    if offers_tools(request):
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER, "This model's chat template does not support tools.", param="tools"
        )
    if any(message.tool_calls or message.role == "tool" for message in request.chat):
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER,
            "This model's chat template does not support tool calls and their results.",
            param="messages",
        )


# Options of Ollama's that say how it uses the machine, and not how it answers.
_OF_THE_MACHINE = frozenset(
    "num_ctx num_batch num_gpu num_keep num_thread main_gpu use_mmap use_mlock low_vram f16_kv numa vocab_only".split()  # noqa: SIM905 - names
)


def notes_of(request: ChatRequest, *, simulated: bool = False) -> list[str]:
    """A note for each parameter that asks for something which this engine does not do. Those about reasoning have
    theirs from `Reasoning`, where a model runs.
    """
    asks = {
        "think": request.think not in (None, False, "", "none") and simulated,
        "reasoning_effort": request.reasoning_effort not in (None, "", "none") and simulated,
        "enable_thinking": bool(request.enable_thinking) and simulated,
        "verbosity": request.verbosity not in (None, "", "medium"),
        "logit_bias": bool(request.logit_bias) and simulated,
        "chat_template_kwargs": bool(request.chat_template_kwargs) and simulated,
    }
    options = request.ollama.options if request.ollama is not None else {}
    asks |= {f"options.{name}": True for name in options if name not in _OF_THE_MACHINE}
    asks |= dict.fromkeys(request.of_others, True)
    return [f"`{name}` has no effect on this model." for name, asked in asks.items() if asked]


def check_bias(request: ChatRequest, vocabulary: int) -> dict[int, float]:
    """The `logit_bias` of a request by token. MLX writes outside an array for a token that the model does not have.

    Raises:
        HeadraceError: `invalid_request`.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    if bias and max(bias) >= vocabulary:
        message = f"`logit_bias` has token {max(bias)}. This model has {vocabulary} tokens, from 0."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="logit_bias")
    return bias


def answer_limit(wanted: int | None, *, prompt_tokens: int, room_tokens: int, default: int) -> int:
    """The most tokens that the answer may have: the client's limit or the default, reduced to what fits.

    Raises:
        HeadraceError: `context_length_exceeded`: the prompt leaves no room for an answer.
    """
    room = room_tokens - prompt_tokens
    if room > 0:
        return min(default if wanted is None else wanted, room)
    raise HeadraceError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"The prompt has {prompt_tokens} tokens. Prompt and answer together must fit in {room_tokens}.",
        param="messages",
    )


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation for a chat template: plain text, arguments as objects, `developer` as `system`.

    Arguments that are not a JSON object, as a model may have written them, stay text.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    rendered: dict[str, Any] = {"role": role, "content": message.text()}
    if message.name is not None:
        rendered["name"] = message.name
    if message.role == "assistant" and message.thought:
        # Each family's template has its own name for it. GPT-OSS's refuses `thinking` beside a content and a call.
        rendered |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.thought)
        if message.tool_calls and message.text():
            rendered["thinking"] = ""
    if message.tool_call_id is not None:
        rendered["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        rendered["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return rendered


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments: dict[str, Any] | str
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except UNREADABLE:
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
