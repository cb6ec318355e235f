"""Results of tools and the calls that they answer, where a client's history has no ids. No I/O.

Ollama's clients name the tool of a result and have no ids. The predecessor of tool calls, `function_call`, had none
either. Templates of some families reject a result without an id.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.wire.answers import ToolCall
from pipeline.wire.requests import ChatMessage


def link(messages: Iterable[ChatMessage]) -> None:
    """Give each call an id, and each result the id of its call: the next one of its name that has no result yet."""
    waiting: list[ToolCall] = []
    for index, message in enumerate(messages):
        if message.tool_calls:
            for number, call in enumerate(message.tool_calls):
                call.id = call.id or f"call_{index}_{number}"
            waiting = list(message.tool_calls)
        elif message.role == "tool":
            at = next((at for at, call in enumerate(waiting) if _answers(message, call)), None)
            if at is None:
                continue
            call = waiting.pop(at)
            if not message.tool_call_id:
                message.tool_call_id, message.name = call.id, call.function.name


def _answers(message: ChatMessage, call: ToolCall) -> bool:
    if message.tool_call_id:
        return message.tool_call_id == call.id
    return message.name in (None, "", call.function.name)
