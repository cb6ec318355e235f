"""From a request's body to the request: decoded strictly, and refused where no engine can answer it as it is meant.

A parameter that would change the answer and is not supported is refused. An unknown field is ignored.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from pipeline.wire.answers import ToolCall
from pipeline.wire.constraints import ConstraintError, unified
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.habits import BYTE_ORDER_MARK, mended, without_null_keywords
from pipeline.wire.linking import link
from pipeline.wire.particular import SWITCHES, check_template_arguments, yes_or_no
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, NamedToolChoice, Request
from pipeline.wire.validation import NotValid, decode

MAX_NESTING = 64
_R = TypeVar("_R", ChatRequest, EmbeddingRequest)

# Parameters that are not supported, and the values (beside null) with which they do not change the answer.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "echo": (False,),
    "web_search_options": (),
    "adapters": (),
}
# The older names of forms, and what each asks for.
_FORMS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
    "regex": "regex",
    "ebnf": "grammar",
}
_EMPTY_TEXT = "An empty text has no embedding. A space stands for it."


def decode_request(body: bytes, *, max_body_bytes: int) -> Request:
    """Read a request's body: JSON if its first character is `{`, otherwise plain text, which is the prompt.

    A request with an `input`, and neither `messages` nor a `prompt`, is a request for embeddings.

    Raises:
        HeadraceError: `request_too_large`, `invalid_request` (with the field in `param`), or
            `unsupported_parameter` for a parameter that would change the answer and that no engine supports.
    """
    chat = _read_chat(body, max_body_bytes)
    # The search comes first: decoding a long body a second time takes longer than everything else here.
    if chat.messages is None and chat.prompt is None and b'"input"' in body:
        return decode_embedding(body, max_body_bytes=max_body_bytes)
    _check(chat)
    _tidy(chat)
    return chat


def decode_chat(body: bytes, *, max_body_bytes: int) -> ChatRequest:
    """As `decode_request`, for a body that must be a chat."""
    chat = _read_chat(body, max_body_bytes)
    _check(chat)
    _tidy(chat)
    return chat


def decode_embedding(body: bytes, *, max_body_bytes: int) -> EmbeddingRequest:
    """As `decode_request`, for a body that must be a request for embeddings."""
    _check_size(body, max_body_bytes)
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        request, notes = _decode_leniently(body, EmbeddingRequest)
    except NotValid as error:
        if error.problem.field.startswith("input[") and _is_tokens(error.problem.value):
            message = "`input` must be text. Token ids are not supported: they belong to one model's vocabulary."
            raise _unsupported("input", message) from None
        raise _invalid(error.sentence, error.problem.param) from None
    given = [request.input] if isinstance(request.input, str) else request.input
    request.notes = [*notes, _EMPTY_TEXT] if "" in given else notes
    return request


def _is_tokens(item: Any) -> bool:
    """Whether an item of an `input` is a token id, or a list of them: some of OpenAI's clients tokenize texts."""
    return isinstance(item, int | list) and not isinstance(item, bool)


def _read_chat(body: bytes, max_body_bytes: int) -> ChatRequest:
    _check_size(body, max_body_bytes)
    body = body.removeprefix(BYTE_ORDER_MARK)
    if not body.startswith(b"{"):
        return ChatRequest(prompt=_decode_text(body))
    try:
        chat, notes = _decode_leniently(body, ChatRequest)
    except NotValid as error:
        raise _invalid(error.sentence, error.problem.param) from None
    chat.notes = notes
    _unify(chat)
    if chat.repetition_penalty is None:
        chat.repetition_penalty = chat.repeat_penalty
    chat.repeat_penalty = None
    if chat.chat_template_kwargs:
        # A template takes any text for true.
        given = chat.chat_template_kwargs
        chat.chat_template_kwargs = given | {name: yes_or_no(given[name]) for name in SWITCHES if name in given}
    for index, message in enumerate(chat.messages or ()):
        if message.function_call is not None:  # the predecessor of `tool_calls`
            message.tool_calls = [*(message.tool_calls or ()), ToolCall(message.function_call, f"call_{index}")]
            message.function_call = None
    link(chat.messages or ())
    return chat


def _unify(chat: ChatRequest) -> None:
    """Write the form of the answer where a request in hand has it, whichever parameter asks for it."""
    # llama.cpp's clients send an empty grammar for none.
    given = {name: value for name in _FORMS if (value := getattr(chat, name)) is not None}
    older = {name: (_FORMS[name], value) for name, value in given.items() if value != "" or name.startswith("guided_")}
    try:
        chat.response_format, chat.structured_outputs = unified(chat.response_format, chat.structured_outputs, older)
    except ConstraintError as error:
        code = ErrorCode.UNSUPPORTED_PARAMETER if error.unsupported else ErrorCode.INVALID_REQUEST
        raise HeadraceError(code, str(error), param=error.param.partition(".")[0]) from None
    for name in given:
        setattr(chat, name, None)


def _decode_leniently(body: bytes, kind: type[_R]) -> tuple[_R, list[str]]:
    """Read a body strictly, and where that fails with the values that are meant. Returns notes on these as well.

    Raises:
        NotValid: the first problem that is none of habit.
    """
    try:
        return decode(body, kind), []
    except NotValid as strict:
        try:
            meant, notes = mended(body)
        except (TypeError, ValueError, RecursionError):
            raise strict from None
        return decode(meant, kind), notes


def _check_size(body: bytes, max_body_bytes: int) -> None:
    if len(body) > max_body_bytes:
        raise HeadraceError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"The body has {len(body)} bytes. The limit is {max_body_bytes} bytes.",
        )


def _decode_text(body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise _invalid("The body is not valid UTF-8.") from None
    if not text.strip():
        raise _invalid("The body is empty. Send a prompt or a chat completion.")
    return text


def _check(request: ChatRequest) -> None:
    if request.messages is None and request.prompt is None:
        raise _invalid("`messages` is required.", "messages")
    if request.messages is not None and request.prompt is not None:
        raise _invalid("Send either `messages` or `prompt`, and not both.", "messages")
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(request, name)) is not None and value not in neutral:
            values = " or ".join(f"`{_as_json(value)}`" for value in neutral)
            raise _unsupported(
                name, f"`{name}` is not supported. Leave it out{f', or set it to {values}' if neutral else ''}."
            )
    for tool in request.tools or ():
        _check_nesting(tool.function.parameters, "tools")
    if (constraint := request.constraint) is not None:
        _check_nesting(constraint.value, constraint.param)
    _check_choice(request)
    _check_raw(request)
    for message in request.chat:
        message.text()
        message.images()
    if (template := request.chat_template_kwargs) is not None:
        check_template_arguments(template)
        _check_nesting(template, "chat_template_kwargs")


def _tidy(request: ChatRequest) -> None:
    """Drop null from the schemas of tools, where Go's clients write it for a list or an object that is not there."""
    for tool in request.tools or ():
        tool.function.parameters = without_null_keywords(tool.function.parameters)


def _check_choice(request: ChatRequest) -> None:
    """Refuse a tool choice that no answer can satisfy."""
    if not request.forces_tools:
        return
    names = [tool.function.name for tool in request.tools or ()]
    if not names:
        raise _invalid("`tool_choice` forces a tool call, and `tools` is empty.", "tool_choice")
    if isinstance(request.tool_choice, NamedToolChoice) and request.tool_choice.function.name not in names:
        wanted = quoted(request.tool_choice.function.name, 40)
        raise _invalid(f"`tool_choice` names the tool {wanted}, which is not in `tools`.", "tool_choice")


def _check_raw(request: ChatRequest) -> None:
    """Refuse what only a chat template could write into a prompt."""
    if not request.is_raw:
        return
    if [message.role for message in request.chat] != ["user"]:
        raise _invalid("`raw` needs one prompt. Leave out the system message and the earlier turns.", "raw")
    if request.tools:
        raise _invalid("`raw` leaves out the chat template, so there can be no `tools`.", "raw")


def _check_nesting(value: Any, param: str) -> None:
    """Refuse a schema that decodes here, but is deep enough to exhaust the stack of a recursive reader."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_NESTING):
        containers = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in containers for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise _invalid(f"`{param}` is nested too deeply. The limit is {MAX_NESTING} levels.", param)


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) and value else msgspec.json.encode(value).decode()


def _invalid(message: str, param: str | None = None) -> HeadraceError:
    return HeadraceError(ErrorCode.INVALID_REQUEST, message, param=param)


def _unsupported(param: str, message: str) -> HeadraceError:
    return HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
