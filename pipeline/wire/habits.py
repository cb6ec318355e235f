"""Values that clients send by habit, in the meaning that other servers give them.

`mlx_lm.server`, Ollama, LM Studio and vLLM take them, so clients write them: `max_tokens` -1 for no limit, `top_k` -1
for all tokens, an empty `stop`, whole numbers as 256.0, null in a history, the tools and choices of another API. A body
is read strictly first. Only one that is refused comes here, so that a body without such values costs nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeGuard

from pipeline.wire.requests import NO_LIMIT

_INTEGERS = ("max_tokens", "max_completion_tokens", "top_k", "seed", "n", "best_of", "dimensions", "top_logprobs")
_LIMITS = ("max_tokens", "max_completion_tokens")
_OF_A_FUNCTION = ("name", "description", "parameters", "strict")
# Mistral's and Anthropic's word for a forced call is `any`.
_CHOICES = {"": None, "none": "none", "auto": "auto", "any": "required", "required": "required"}

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Note = Callable[[str], None]


def mended(body: bytes) -> tuple[bytes, list[str]]:
    """A JSON body with the values that are meant, and a note for each that changes how the request is answered.

    Raises:
        ValueError, RecursionError: it is not a JSON object.
    """
    given = json.loads(body)
    if not isinstance(given, dict):
        raise TypeError("the body is not an object")
    notes: list[str] = []
    given = _without_surrogates(given)
    _numbers(given, notes.append)
    _stop(given, notes.append)
    _tools(given)
    if isinstance(form := given.get("response_format"), dict):
        _drop_nulls(form.get("json_schema"), "name", "schema")
    for message in _dicts(given.get("messages")):
        _message(message)
    # Not a number and infinity are no JSON: what has them is refused as before.
    return json.dumps(given, ensure_ascii=False, allow_nan=False).encode(), notes


def with_whole_characters(body: bytes) -> bytes:
    """A JSON body without halves of characters: each becomes U+FFFD.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    return json.dumps(_without_surrogates(json.loads(body)), ensure_ascii=False, allow_nan=False).encode()


def without_null_keywords(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON Schema without keywords that are null, except those whose value can be null."""
    return {
        name: _below(name, value) for name, value in schema.items() if value is not None or name in ("const", "default")
    }


def _below(name: str, value: Any) -> Any:
    """The value of a keyword, with the schemas in it tidied. A name in `properties` is no keyword."""
    if name in ("properties", "$defs", "definitions") and isinstance(value, dict):
        return {key: without_null_keywords(one) if isinstance(one, dict) else one for key, one in value.items()}
    if name in ("items", "additionalProperties") and isinstance(value, dict):
        return without_null_keywords(value)
    if name in ("anyOf", "oneOf", "allOf") and isinstance(value, list):
        return [without_null_keywords(one) if isinstance(one, dict) else one for one in value]
    return value


def _numbers(given: dict[str, Any], note: Note) -> None:
    for name in _INTEGERS:
        value = given.get(name)
        if isinstance(value, float) and math.isfinite(value) and value.is_integer():
            given[name] = int(value)
    for name in _LIMITS:
        value = given.get(name)
        if _is_whole(value) and not 1 <= value <= NO_LIMIT:
            note(f"`{name}` {value} means no limit.")
            given[name] = NO_LIMIT
    top_k = given.get("top_k")
    if _is_whole(top_k) and top_k < 0:
        note(f"`top_k` {top_k} means all tokens.")
        del given["top_k"]
    if _is_zero(given.get("top_p")):
        note("`top_p` 0 means the likeliest token, as `temperature` 0.")
        del given["top_p"]
        given["temperature"] = 0
    for name in ("repetition_penalty", "repeat_penalty"):
        if _is_zero(given.get(name)):
            note(f"`{name}` 0 means no penalty.")
            del given[name]


def _stop(given: dict[str, Any], note: Note) -> None:
    stop = given.get("stop")
    if stop == "":
        del given["stop"]
    elif isinstance(stop, list) and any(item in ("", None) for item in stop):
        given["stop"] = [item for item in stop if item not in ("", None)]
    else:
        return
    note("An empty `stop` string stops nothing.")


def _tools(given: dict[str, Any]) -> None:
    """Tools as the Responses API has them, and choices as it and other servers name them."""
    for tool in _dicts(given.get("tools")):
        if "function" not in tool and "name" in tool:
            tool["function"] = {name: tool[name] for name in _OF_A_FUNCTION if name in tool}
        _drop_nulls(tool, "type")
        _drop_nulls(tool.get("function"), "description", "parameters")
    choice = given.get("tool_choice")
    if isinstance(choice, dict) and isinstance(kind := choice.get("type"), str):
        if kind == "allowed_tools":
            choice = _allow(given, choice.get("allowed_tools", choice))
        elif kind in ("function", "tool") and "function" not in choice:
            choice = {"function": {"name": choice.get("name")}}
        elif kind in _CHOICES:
            choice = kind
    if isinstance(choice, str):
        choice = _CHOICES.get(choice, choice)
    given["tool_choice"] = choice


def _allow(given: dict[str, Any], allowed: Any) -> Any:
    """Leave only the allowed tools, and return the choice among them."""
    if not isinstance(allowed, dict):
        return allowed
    functions = [tool.get("function", tool) for tool in _dicts(allowed.get("tools"))]
    names = {function.get("name") for function in functions if isinstance(function, dict)}
    given["tools"] = [tool for tool in _dicts(given.get("tools")) if _name_of(tool) in names]
    return allowed.get("mode", "auto")


def _name_of(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None


def _message(message: dict[str, Any]) -> None:
    """A message as clients keep it in a history, with null in places of texts."""
    if message.get("role") == "function":  # the predecessor of `tool`
        message["role"] = "tool"
    if isinstance(content := message.get("content"), dict):  # a tool's result that is no text
        message["content"] = json.dumps(content, ensure_ascii=False)
    elif isinstance(content, list):
        message["content"] = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        for part in _dicts(content):
            _drop_nulls(part, "text")
    _arguments(message.get("function_call"))
    for call in _dicts(message.get("tool_calls")):
        _drop_nulls(call, "id", "type")
        _arguments(call.get("function"))


def _arguments(function: Any) -> None:
    """Arguments of an earlier tool call that are an object, or null, where a string belongs."""
    if not isinstance(function, dict):
        return
    arguments = function.get("arguments")
    if arguments is None:
        function["arguments"] = "{}"
    elif not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)


def _drop_nulls(fields: Any, *names: str) -> None:
    if isinstance(fields, dict):
        for name in names:
            if name in fields and fields[name] is None:
                del fields[name]


def _dicts(items: Any) -> list[dict[str, Any]]:
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def _without_surrogates(value: Any) -> Any:
    """A halved character (an emoji cut by a program that counts in UTF-16) becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    return value
