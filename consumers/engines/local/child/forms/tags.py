"""Calls whose arguments stand between tags, one by one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from consumers.engines.local.child.forms.lark import (
    NAME,
    Argument,
    Mark,
    Rules,
    arguments_of,
    arguments_schema,
    json_of,
    marked,
    one_of,
    text_until,
)
from pipeline.wire.requests import FunctionSpec


@dataclass(frozen=True)
class TagForm:
    """The texts around the names and the values of a call.

    Attributes:
        name: before the name of the function.
        named: after it.
        key: before the name of an argument.
        keyed: between that name and a value which is a string.
        keyed_json: the same before another value.
        value_end: after a value.
        end: after the call, in a section.
        section: whether a section holds several calls.
    """

    name: str
    named: str
    key: str
    keyed: str
    keyed_json: str
    value_end: str
    end: str = ""
    section: bool = False


GLM_WITH_LINES: Final = TagForm(
    "", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_key>\n<arg_value>", "</arg_value>\n"
)
"""GLM's templates before 4.7 have line breaks."""

_QWEN: Final = TagForm("\n<function=", ">\n", "<parameter=", ">\n", ">\n", "\n</parameter>\n", "</function>\n")
TAG_FORMS: Final = {
    "qwen3_coder": _QWEN,
    "seed_oss": _QWEN,
    "glm47": TagForm("", "", "<arg_key>", "</arg_key><arg_value>", "</arg_key><arg_value>", "</arg_value>"),
    "minimax_m2": TagForm(
        '<invoke name="', '">\n', '<parameter name="', '">', '">', "</parameter>\n", "</invoke>\n", section=True
    ),
    "deepseek_v32": TagForm(
        '<｜DSML｜invoke name="',
        '">\n',
        '<｜DSML｜parameter name="',
        '" string="true">',
        '" string="false">',
        "</｜DSML｜parameter>\n",
        "</｜DSML｜invoke>\n",
        section=True,
    ),
}


def in_tags(form: TagForm, mark: Mark, end: str = "") -> Rules:
    """A call in tags; `end` is an expression after it."""
    return partial(_in_tags, form, partial(marked, mark=mark), end)


_Text = Callable[[str], str]


def _in_tags(form: TagForm, text: _Text, end: str, function: FunctionSpec, rule: str) -> Iterator[str]:
    arguments = arguments_of(arguments_schema(function))
    head, after = text(form.name + function.name + form.named), text(form.end)
    if arguments is None:
        yield f"{rule}: {head} {rule}_any* {after} {end}"
        yield f"{rule}_any: {text(form.key)} {NAME} {text(form.keyed)} {rule}_text"
        yield from text_until(text(form.value_end), f"{rule}_text")
        return
    names = [f"{rule}_{at}" + ("" if one.required else "?") for at, one in enumerate(arguments)]
    yield f"{rule}: {head} {' '.join(names)} {after} {end}"
    for at, argument in enumerate(arguments):
        yield from _value(form, text, argument, f"{rule}_{at}")


def _value(form: TagForm, text: _Text, argument: Argument, rule: str) -> Iterator[str]:
    key, end = form.key + argument.name, text(form.value_end)
    if argument.choices is not None:
        yield f"{rule}: {text(key + form.keyed)} {one_of(argument.choices)} {end}"
    elif argument.is_string:
        yield f"{rule}: {text(key + form.keyed)} {rule}_text"
        yield from text_until(end, f"{rule}_text")
    else:
        yield f"{rule}: {text(key + form.keyed_json)} {json_of(argument.schema)} {end}"
