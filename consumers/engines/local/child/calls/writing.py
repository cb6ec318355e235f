"""Earlier calls as text, as a model writes them, for chat templates that take no calls. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Writer = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], str]
"""Takes calls, each a name and its arguments, and returns the text of them all."""


def write_list(start: str, end: str) -> Writer:
    """A list of objects between marks."""
    return lambda calls: start + _json([_object(*call) for call in calls]) + end


def write_each(start: str, end: str) -> Writer:
    """An object for each call, between marks of its own, on lines of their own."""
    return lambda calls: "\n".join(start + _json(_object(*call)) + end for call in calls)


def write_python(start: str, end: str) -> Writer:
    """A list of Python's calls between marks."""
    return lambda calls: f"{start}[{', '.join(_python_call(*call) for call in calls)}]{end}"


def _object(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def _python_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"


def _python(value: Any) -> str:
    return _json(value) if isinstance(value, str) else repr(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
