"""The parameters of a request that only some engines or models have: thinking, images, a template, Ollama's own.

They have one form here, whatever the dialect of the client, and each engine does with them what it can.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from msgspec import Struct, field

from pipeline.wire.errors import ErrorCode, HeadraceError

Thinking = Literal["none", "low", "medium", "high"]
_AMOUNTS: dict[str, Thinking] = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
# Words for yes and no, where a parameter takes a word.
_YES_NO = dict.fromkeys(("true", "on", "enabled", "adaptive", "auto"), True) | dict.fromkeys(
    ("false", "off", "disabled"), False
)
# The arguments of chat templates that turn reasoning on and off.
SWITCHES = ("enable_thinking", "thinking", "reasoning")
_IMAGE = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE | re.ASCII)
# The arguments of a chat template that headrace sets itself, and those of the function that applies it.
_OURS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class OllamaParticulars(Struct, omit_defaults=True):
    """What Ollama's API has and no other, by its names there.

    Attributes:
        options: those without a field of their own in the request, such as `num_ctx`.
        keep_alive: how long the model stays loaded afterwards: seconds, or a duration such as `5m`.
        raw: as `raw` of the request itself.
        template: stands in for the model's template.
        context: the tokens of an earlier answer that this one continues.
    """

    options: dict[str, bool | int | float | str | list[str] | None] = field(default_factory=dict)
    keep_alive: float | str | None = None
    raw: bool | None = None
    template: str | None = None
    context: list[int] | None = None

    @property
    def needed(self) -> str:
        """The first of the fields that change the answer and that only Ollama has; empty if none is set."""
        return next((name for name in ("template", "context") if getattr(self, name)), "")


class ThinkingParameters(NamedTuple):
    """The parameters by which clients say how much a model thinks, in the order in which they count.

    Attributes:
        think: Ollama's.
        reasoning_effort: OpenAI's.
        enable_thinking: Qwen's.
        reasoning: an object with `effort`, `enabled` or `max_tokens`, as Ollama and OpenRouter take it beside OpenAI's
            parameters.
        thinking: an object with `type`, as DeepSeek, GLM and Kimi take it there.
        chat_template_kwargs: the arguments of the chat template.
    """

    think: bool | str | None
    reasoning_effort: str | None
    enable_thinking: bool | None
    reasoning: Any
    thinking: Any
    chat_template_kwargs: Mapping[str, Any] | None

    @property
    def said(self) -> tuple[str, bool | str]:
        """The first that is set, and its value; `("", "")` if none is."""
        template = self.chat_template_kwargs or {}
        said = (
            ("think", self.think),
            ("reasoning_effort", self.reasoning_effort),
            ("enable_thinking", self.enable_thinking),
            *(("reasoning", value) for value in _parts(self.reasoning, "effort", "enabled", "max_tokens")),
            *(("thinking", value) for value in _parts(self.thinking, "type")),
            *(("chat_template_kwargs", template.get(name)) for name in (*SWITCHES, "reasoning_effort")),
        )
        meant = ((name, yes_or_no(value)) for name, value in said)
        return next(((name, value) for name, value in meant if isinstance(value, bool | str) and value != ""), ("", ""))


def _parts(given: Any, *names: str) -> list[Any]:
    """What a parameter says, which may be an object with these members."""
    return [given.get(name) for name in names] if isinstance(given, Mapping) else [given]


def yes_or_no(value: Any) -> Any:
    """A value; true or false for a word that means it, and for a number, which is one of tokens, or 0 or 1."""
    if isinstance(value, int):
        return value > 0
    return _YES_NO.get(value.casefold(), value) if isinstance(value, str) else value


def thinking_of(said: bool | str) -> Thinking | None:  # noqa: FBT001 - as the parameters are
    """How much a model thinks, from the value of a parameter. None for an empty one. An unknown word means thinking."""
    if isinstance(said, str):
        return _AMOUNTS.get(said.casefold(), "medium") if said else None
    return "medium" if said else "none"


def image_data(url: str) -> str:
    """The image in a `data:` URL, in base64.

    Raises:
        HeadraceError: `unsupported_parameter` for the address of an image: headrace fetches none. `invalid_request` for
            broken base64.
    """
    if (head := _IMAGE.match(url)) is None:
        message = "An image must be a `data:image/...;base64,` URL. Images are not fetched from an address."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="messages")
    data = url[head.end() :]
    try:
        b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "The image is not valid base64.", param="messages") from None
    return data


def check_template_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that would replace the conversation or the template itself.

    Raises:
        HeadraceError: `unsupported_parameter`.
    """
    for name in arguments:
        if name in _OURS:
            message = f"`chat_template_kwargs.{name}` cannot be set."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="chat_template_kwargs")
