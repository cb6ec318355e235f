"""From a request to the tokens of its prompt: the model's chat template, what it refuses, and prompts without one.

A template is a program by the model's author. What it raises is the template's own complaint about a conversation.
`pipeline.core.dialogue` rewrites the conversation until the template takes it; the answer's notes say how.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from consumers.engines.local.child.backend import LoadError
from pipeline.core.dialogue import USER_LINE, Turn, as_plain_text, is_kept, unfinished, variants
from pipeline.wire.errors import ErrorCode, HeadraceError

log = logging.getLogger(__name__)

_MARK: Final = "\u2063headrace\u2063"
"""Ends the text that an answer continues, while the template writes it. No conversation has it."""

_CONTINUED: Final = "The answer continues the assistant's message at the end."
_NO_TEMPLATE: Final = "This model has no chat template. The conversation was written as plain text."

Render = Callable[..., str]
"""A chat template: takes the turns and `add_generation_prompt`, and returns the prompt."""


class Prompt(NamedTuple):
    """A prompt as text.

    Attributes:
        text: what the model reads.
        special: whether the tokenizer adds its special tokens, which a template writes itself.
        notes: how it differs from the conversation that the client sent.
        stops: what ends the answer, beside the stop strings of the request.
        goes_on: whether the answer goes on in the midst of a text, so that a space at its beginning counts.
        turns: the conversation as the chat template took it; empty without a template.
    """

    text: str
    special: bool = False
    notes: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    goes_on: bool = False
    turns: Sequence[Turn] = ()


def raw_prompt(text: str) -> Prompt:
    """A text that the model continues."""
    return Prompt(text, special=True, goes_on=True)


def plain_prompt(turns: list[Turn]) -> Prompt:
    """A conversation for a model without a chat template."""
    begun, text = bool(unfinished(turns)), as_plain_text(turns)
    notes = (_NO_TEMPLATE, _CONTINUED) if begun else (_NO_TEMPLATE,)
    if text == turns[0]["content"]:
        return Prompt(text, special=True, notes=notes, goes_on=True)
    return Prompt(text, special=True, notes=notes, stops=(USER_LINE,), goes_on=begun)


def templated(turns: list[Turn], render: Render) -> Prompt:
    """A conversation as the model's chat template writes it.

    Raises:
        HeadraceError: `invalid_request`: the template refuses the conversation in every form.
    """
    complaint: Exception | None = None
    worse: Prompt | None = None
    for variant in variants(turns):
        try:
            text, continued = _written(variant.turns, render)
        except Exception as error:  # a template is a program, and may raise anything
            complaint = complaint or error
            continue
        prompt = Prompt(text, notes=(*variant.notes, *continued), goes_on=bool(continued), turns=variant.turns)
        if is_kept(variant.turns, text):
            return prompt
        worse = worse or prompt
    if worse is not None:
        return worse
    message = f"The model's chat template rejects this conversation: {complaint}"
    raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="messages")


def heads(turns: Sequence[Turn], render: Render) -> Iterator[str]:
    """The beginnings that later conversations may share with this one: all its turns, and the system prompt alone."""
    system = turns[:1] if len(turns) > 1 and turns[0]["role"] == "system" else ()
    for head in (turns, system):
        if head:
            with contextlib.suppress(Exception):  # a template can refuse a system prompt alone
                yield render(list(head), add_generation_prompt=False)


def _written(turns: list[Turn], render: Render) -> tuple[str, list[str]]:
    """One form of a conversation as the template writes it, and a note if the answer continues its last turn."""
    begun = unfinished(turns)
    if not begun:
        return render(turns, add_generation_prompt=True), []
    text = render([*turns[:-1], {**turns[-1], "content": begun + _MARK}], add_generation_prompt=False)
    at = text.rfind(_MARK)
    if at < 0:  # the template drops or changes the text of such a turn
        return render(turns[:-1], add_generation_prompt=True) + begun, [_CONTINUED]
    return text[:at], [_CONTINUED]


def read_template(path: str) -> str:
    """The text of the chat template that the settings name.

    Raises:
        LoadError: the file cannot be read, or is no template.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise LoadError(f"The chat template {path} cannot be read ({what}). Set --chat-template to a file.") from None
    try:
        render_jinja_template([[]], chat_template=text)
    except TemplateSyntaxError as error:
        message = f"The chat template {path} has an error in line {error.lineno}: {error.message}."
        raise LoadError(message) from None
    except Exception:  # a template may refuse this conversation, which is empty
        log.debug("The chat template refuses an empty conversation.", exc_info=True)
    return text
