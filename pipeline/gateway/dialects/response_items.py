"""The items of a Responses call's `input`, as the messages of a chat. No I/O.

Source of the shapes: the OpenAI API reference (responses, input items).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from pipeline.wire.answers import Completion
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.validation import explain

Turn = dict[str, Any]
_Item = TypeVar("_Item", bound=Struct)

# Between the name of a namespace and that of its function, in the name under which the model sees the function.
_IN_NAMESPACE = "__"
# An item's id: its kind, the id of its response, and its number among those of its kind.
_ITEM_ID = re.compile(r"(msg|fc|rs)_([A-Za-z0-9_-]{1,128})_([0-9]{1,6})", re.ASCII)
# The most responses to whose items one call can refer. Each is read from the broker.
MAX_REFERRED = 128
# The parts that are text. Each part of another type reaches the chat's own check, which refuses it by its type.
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class ItemPart(Struct):
    """One part of the content of an item."""

    type: str
    text: str = ""
    refusal: str = ""
    image_url: str | None = None


_Content = str | list[ItemPart] | None


class _MessageItem(Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content = None


class _ReasoningItem(Struct):
    content: list[ItemPart] | None = None
    summary: list[ItemPart] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ()) or "\n\n".join(
            part.text for part in self.summary or ()
        )


class _CallItem(Struct):
    name: str
    call_id: str = ""
    arguments: Any = None
    namespace: str | None = None


class _OutputItem(Struct):
    call_id: str = ""
    output: str | list[ItemPart] | dict[str, Any] | None = None


def referred_to(given: str | list[dict[str, Any]]) -> list[str]:
    """The ids of the responses to whose items an `input` refers.

    Raises:
        HeadraceError: `invalid_request`: they are too many.
    """
    items = [] if isinstance(given, str) else given
    references = [_ITEM_ID.fullmatch(str(item.get("id"))) for item in items if item.get("type") == "item_reference"]
    found = list(dict.fromkeys(reference[2] for reference in references if reference))
    if len(found) > MAX_REFERRED:
        message = f"`input` refers to items of {len(found)} responses. The limit is {MAX_REFERRED}: send the items."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="input")
    return found


def turns(given: str | list[dict[str, Any]], answers: Mapping[str, Completion]) -> list[Turn]:
    """An `input` as messages of a chat. Reasoning belongs to the assistant's message that follows it, if one does.

    Args:
        given: the input.
        answers: those that it refers to, by the ids of their responses.

    Raises:
        HeadraceError: `invalid_request` for an item that is not of its type, or an answer that is missing;
            `unsupported_parameter` for an item of a type that is not supported.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    made: list[Turn] = []
    thought = ""
    for index, item in enumerate(given):
        found = _add(made, item, index, answers)
        if found is not None:
            thought = found
        elif thought:
            if made[-1]["role"] == "assistant":
                made[-1].setdefault("reasoning_content", thought)
            thought = ""
    return made


def _add(made: list[Turn], item: dict[str, Any], index: int, answers: Mapping[str, Completion]) -> str | None:
    """Add an item to the turns before it. Returns the text of one that is reasoning, which is no turn."""
    match item.get("type") or ("message" if "role" in item else ""):
        case "message":
            message = _read(item, _MessageItem, index)
            made.append({"role": message.role, "content": _content(message.content)})
        case "function_call":
            call = _read(item, _CallItem, index)
            function = {"name": joined_name(call.namespace, call.name), "arguments": call.arguments}
            _add_call(made, {"id": call.call_id, "type": "function", "function": function})
        case "function_call_output":
            result = _read(item, _OutputItem, index)
            made.append({"role": "tool", "tool_call_id": result.call_id, "content": _output(result.output)})
        case "item_reference":
            return _add_referred(made, str(item.get("id")), answers)
        case "reasoning":
            return _read(item, _ReasoningItem, index).text
        case other:
            raise _refused(str(other), index)
    return None


def joined_name(namespace: str | None, name: str) -> str:
    """The name under which the model sees a function."""
    return f"{namespace}{_IN_NAMESPACE}{name}" if namespace else name


def answer_turn(answer: Completion) -> Turn:
    """An earlier answer as a message of a chat."""
    message = answer.choices[0].message
    turn: Turn = {"role": "assistant", "content": message.content or ""}
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        turn["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    return turn


def _add_call(made: list[Turn], call: Turn) -> None:
    """The calls of one answer, and the text before them, are one message of a chat."""
    if not made or made[-1]["role"] != "assistant":
        made.append({"role": "assistant", "content": ""})
    made[-1].setdefault("tool_calls", []).append(call)


def _add_referred(made: list[Turn], item_id: str, answers: Mapping[str, Completion]) -> str | None:
    """An item of an earlier answer, by the id that it had in its response. Returns as `_add`."""
    found = _ITEM_ID.fullmatch(item_id)
    answer = answers.get(found[2]) if found else None
    if found is None or answer is None:
        message = f"Item {quoted(item_id, 160)} is not kept. Send the item itself."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="input")
    turn, number = answer_turn(answer), int(found[3])
    calls = turn.pop("tool_calls", [])
    if found[1] == "rs":
        return str(turn.get("reasoning_content", ""))
    if found[1] == "fc" and number < len(calls):
        _add_call(made, calls[number])
    elif found[1] == "msg" and number == 0:
        # The record has the text of all messages of a response as one.
        made.append(turn)
    return None


def _content(content: _Content) -> str | list[Turn]:
    """Text as one string. Otherwise the parts, images among them; the chat refuses those of other types."""
    if content is None or isinstance(content, str):
        return content or ""
    if all(part.type in (*_TEXT_PARTS, "refusal") for part in content):
        return "".join(part.text or part.refusal for part in content)
    return [_part(part) for part in content]


def _part(part: ItemPart) -> Turn:
    if part.type == "input_image":
        return {"type": "image_url", "image_url": part.image_url or ""}
    return {"type": "text", "text": part.text} if part.type in _TEXT_PARTS else {"type": part.type}


def _output(output: str | list[ItemPart] | dict[str, Any] | None) -> str | list[Turn]:
    return msgspec.json.encode(output).decode() if isinstance(output, dict) else _content(output)


def _read(item: dict[str, Any], kind: type[_Item], index: int) -> _Item:
    try:
        return msgspec.convert(item, kind)
    except msgspec.ValidationError as error:
        problem = explain(error, kind, item)
        at = f"input[{index}].{problem.field}" if problem.field else f"input[{index}]"
        message = problem._replace(field=at).sentence()
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="input") from None


def _refused(kind: str, index: int) -> HeadraceError:
    if not kind:
        message = f"`input[{index}]` must have a `type`, or a `role` and `content`."
        return HeadraceError(ErrorCode.INVALID_REQUEST, message, param="input")
    message = (
        f"`input[{index}]` is an item of type {quoted(kind, 40)}, which is not supported. "
        "Send messages, function calls and their outputs."
    )
    return HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="input")
