"""The form that an answer must have: JSON, a JSON Schema, a regular expression, one of some texts, or a grammar.

OpenAI and Ollama have the first two, in `response_format` and `format`. vLLM has them all, in `structured_outputs` and
its older `guided_*`. llama.cpp and SGLang have some, under names of their own. A request in hand has JSON in
`response_format` and the others in `structured_outputs`.
Sources: OpenAI's API reference (chat completions), vLLM's documentation (structured outputs), llama.cpp's server
documentation (`schema` in `response_format`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from pipeline.wire.validation import UNREADABLE

MAX_CHOICES: Final = 1000
MAX_PATTERN_CHARS: Final = 65_536

Schema = dict[str, Any]
_Text = Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN_CHARS)]
_Choices = Annotated[list[_Text], Meta(min_length=1, max_length=MAX_CHOICES)]


class JsonSchemaFormat(Struct, omit_defaults=True):
    """The schema in `response_format`."""

    name: str = ""
    schema: Schema = field(default_factory=dict)


class ResponseFormat(Struct, omit_defaults=True):
    """The form of the answer. `schema` is llama.cpp's place for a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: Schema | None = None


class StructuredOutputs(Struct, omit_defaults=True):
    """vLLM's forms of an answer, of which one is set. `json` is a schema, or its text."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = None
    structural_tag: Any = None


class Constraint(NamedTuple):
    """The form that an answer must have.

    Attributes:
        kind: `json_object`, `json_schema`, `regex`, `choice` or `grammar`.
        value: the schema, the expression, the texts or the grammar; an empty schema for `json_object`.
        param: the parameter of the request that asks for it.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    value: Any
    param: str


class ConstraintError(ValueError):
    """A request asks for a form that cannot be. The message is a sentence; `param` is the parameter."""

    def __init__(self, message: str, param: str, *, unsupported: bool = False) -> None:
        super().__init__(message)
        self.param = param
        self.unsupported = unsupported


def unified(
    form: ResponseFormat | None, structured: StructuredOutputs | None, older: Mapping[str, tuple[str, Any]]
) -> tuple[ResponseFormat | None, StructuredOutputs | None]:
    """The two fields as a request in hand has them: JSON in the first, the others in the second.

    Args:
        form: `response_format`, as given.
        structured: `structured_outputs`, as given.
        older: what the parameters with other names ask for, by these names: a field of `StructuredOutputs`, and its
            value as given.

    Raises:
        ConstraintError: two forms are asked for, or one that is not supported.
    """
    form = None if form is None or form.type == "text" else _openai_form(form)
    asked: dict[str, Any] = {} if form is None else {"response_format": form}
    if structured is not None:
        asked |= {f"structured_outputs.{name}": value for name, value in _given(structured).items()}
    asked |= {name: value for name, (_, value) in older.items()}
    if not asked:
        return None, None
    if len(asked) > 1:
        names = " and ".join(f"`{name}`" for name in asked)
        raise ConstraintError(f"{names} cannot be used together. Send one of them.", next(iter(asked)))
    ((param, value),) = asked.items()
    kind = older[param][0] if param in older else param.removeprefix("structured_outputs.")
    if kind == "response_format":
        return form, None
    if kind == "structural_tag":
        raise ConstraintError("`structural_tag` is not supported. Use `tools`.", param, unsupported=True)
    if kind == "json_object":
        return ResponseFormat("json_object"), None
    if kind == "json":
        return ResponseFormat("json_schema", JsonSchemaFormat(schema=_schema(value, param))), None
    return None, _only(kind, value, param)


def constraint_of(form: ResponseFormat | None, structured: StructuredOutputs | None) -> Constraint | None:
    """The form that a request in hand asks for; None for any text."""
    if form is not None and form.type == "json_schema":
        schema = form.json_schema.schema if form.json_schema else form.schema
        return Constraint("json_schema", schema or {}, "response_format")
    if form is not None and form.type == "json_object":
        return Constraint("json_object", {}, "response_format")
    if structured is None:
        return None
    if structured.regex is not None:
        return Constraint("regex", structured.regex, "structured_outputs")
    if structured.choice is not None:
        return Constraint("choice", structured.choice, "structured_outputs")
    if structured.grammar is not None:
        return Constraint("grammar", structured.grammar, "structured_outputs")
    return None


def _openai_form(form: ResponseFormat) -> ResponseFormat:
    if form.json_schema is not None and form.type == "json_schema":
        return ResponseFormat("json_schema", form.json_schema)
    if form.schema is not None:
        return ResponseFormat("json_schema", JsonSchemaFormat(schema=form.schema))
    if form.type == "json_schema":
        raise ConstraintError("`response_format.json_schema` is required.", "response_format")
    return ResponseFormat("json_object")


def _given(structured: StructuredOutputs) -> dict[str, Any]:
    """What is set. `json_object: false` asks for nothing."""
    given = {name: getattr(structured, name) for name in structured.__struct_fields__}
    return {name: value for name, value in given.items() if value is not None and value is not False}


def _only(kind: str, value: Any, param: str) -> StructuredOutputs:
    """A form with the bounds that `guided_*` does not declare."""
    try:
        return msgspec.convert({kind: value}, StructuredOutputs)
    except msgspec.ValidationError:
        texts = f"{'1 to ' + str(MAX_CHOICES) + ' texts' if kind == 'choice' else 'a text'}"
        message = f"`{param}` must be {texts} of 1 to {MAX_PATTERN_CHARS} characters."
        raise ConstraintError(message, param) from None


def _schema(value: Schema | str, param: str) -> Schema:
    if isinstance(value, dict):
        return value
    try:
        return msgspec.json.decode(value, type=Schema)
    except UNREADABLE:
        raise ConstraintError(f"`{param}` must be a JSON schema: an object, or its text.", param) from None
