"""The form of the calls of each family: one that the reader of the same format (`calls.formats`) reads. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from consumers.engines.local.child.forms.brackets import gemma_call, python_call
from consumers.engines.local.child.forms.lark import ANY_TEXT, Mark, Rules, quote
from consumers.engines.local.child.forms.objects import after_header, in_object
from consumers.engines.local.child.forms.tags import GLM_WITH_LINES, TAG_FORMS, TagForm, in_tags

_NAME, _ARGUMENTS, _PARAMETERS = '{"name": "', '", "arguments": ', '", "parameters": '
_LISTS: Final = frozenset({"phi4_mini", "phi4", "granite", "nemotron", "jamba"})


@dataclass(frozen=True)
class Channels:
    """The messages of GPT-OSS, as expressions. A call is one of them.

    Attributes:
        aside: a message that is no answer: reasoning, or what the model says before it calls.
        final: the header of the answer.
    """

    aside: str
    final: str


@dataclass(frozen=True)
class CallForm:
    """How a model writes tool calls. All texts are expressions.

    Attributes:
        start: the marker before the first call; empty if there is none.
        rules: of a call.
        between: what comes between two calls.
        end: what comes after the last one.
        several: whether an answer can have more than one.
        channels: of a model that writes messages; None for others.
    """

    start: str
    rules: Rules
    between: str = ""
    end: str = ""
    several: bool = True
    channels: Channels | None = None

    @property
    def special(self) -> bool:
        """Whether the marker is a special token, which no text contains."""
        return self.start.startswith("<[")

    @property
    def can_follow_text(self) -> bool:
        """Whether the beginning of a call can be told from text before it."""
        return bool(self.start) or self.channels is not None


def call_form(name: str, mark: Mark, start: str = "", end: str = "", template: str = "") -> CallForm | None:
    """The form of the calls in a format of `calls.formats`; None if it is not known.

    Args:
        name: of the format.
        mark: makes a marker an expression.
        start: the marker before a section of calls.
        end: the marker after it.
        template: the chat template.
    """
    opening, closing = mark(start), mark(end)
    if name in TAG_FORMS:
        lines = name == "glm47" and re.search(r"</arg_key>(\\n|\n)", template)
        return _in_tags(GLM_WITH_LINES if lines else TAG_FORMS[name], mark, opening, closing)
    if name in _LISTS:
        return CallForm(f'{opening} "["', in_object(_NAME, _ARGUMENTS), quote(", "), f'"]" {closing}')
    match name:
        case "json_tools" | "hermes":
            rules = in_object(f"\n{_NAME}", _ARGUMENTS, "}\n", end=closing)
            return CallForm(opening, rules, f"{quote(chr(10))} {opening}")
        case "json" | "llama3":
            return CallForm(
                "", in_object(_NAME, _PARAMETERS if '"parameters"' in template else _ARGUMENTS), quote("; ")
            )
        case "mistral":
            return _mistral(mark, opening)
        case "harmony":
            return _harmony(mark)
        case "deepseek":
            return _deepseek(mark, opening, closing, template)
        case "kimi_k2":
            return _kimi(mark, opening, closing)
        case "pythonic":
            return CallForm(f'{opening} "["', python_call, quote(", "), f'"]" {closing}')
        case "gemma4":
            return CallForm(opening, gemma_call(mark('<|"|>'), closing), opening)
    return None


def _in_tags(form: TagForm, mark: Mark, opening: str, closing: str) -> CallForm:
    if form.section:
        return CallForm(f"{opening} {quote(chr(10))}", in_tags(form, mark), "", closing)
    return CallForm(opening, in_tags(form, mark, closing), f"{quote(chr(10))}? {opening}")


def _mistral(mark: Mark, opening: str) -> CallForm:
    if mark("[ARGS]").startswith("<["):
        return CallForm(opening, after_header("", mark("[ARGS]")), opening)
    return CallForm(f'{opening} "["', in_object(_NAME, _ARGUMENTS), quote(", "), '"]"')


def _harmony(mark: Mark) -> CallForm:
    channel, message = mark("<|channel|>"), mark("<|message|>")
    turn = f'{mark("<|end|>")} {mark("<|start|>")} "assistant"'
    aside = f'{channel} ("analysis" | "commentary") {message} {ANY_TEXT} {turn}'
    rules = after_header(f'{channel} "commentary to=functions."', f'" " {mark("<|constrain|>")} "json" {message}')
    # A call ends the turn.
    return CallForm("", rules, several=False, channels=Channels(aside, f'{channel} "final" {message}'))


def _deepseek(mark: Mark, opening: str, closing: str, template: str) -> CallForm:
    begin, separator, end = (mark(f"<｜tool▁{word}｜>") for word in ("call▁begin", "sep", "call▁end"))
    if "```json" in template:
        fence = quote("\n```json\n")
        return CallForm(
            opening,
            after_header(f'{begin} "function" {separator}', fence, f"{quote(chr(10) + '```')} {end}"),
            quote("\n"),
            closing,
        )
    return CallForm(opening, after_header(begin, separator, end), "", closing)


def _kimi(mark: Mark, opening: str, closing: str) -> CallForm:
    begin, arguments, end = (mark(f"<|tool_call_{word}|>") for word in ("begin", "argument_begin", "end"))
    return CallForm(opening, after_header(f'{begin} "functions."', f'":" /[0-9]{{1,2}}/ {arguments}', end), "", closing)
