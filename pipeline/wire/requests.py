"""The body of a request: OpenAI's chat completion, or its embeddings, as msgspec structs, decoded strictly.

A parameter that would change the answer and is not supported is refused. An unknown field is ignored. Source of the
shapes: the OpenAI API reference (chat completions, embeddings) and this project's `docs/protocol.md`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from pipeline.wire.constraints import (
    Constraint,
    ConstraintError,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    constraint_of,
    unified,
)
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.habits import BYTE_ORDER_MARK, mended
from pipeline.wire.messages import FunctionCall, ToolCall
from pipeline.wire.particular import (
    OllamaParticulars,
    Thinking,
    check_template_arguments,
    image_data,
    thinking_of,
    thinking_said,
)
from pipeline.wire.validation import NotValid, decode

MAX_STOPS = 64
MAX_TOOLS = 128
MAX_NESTING = 64
# As at OpenAI.
MAX_INPUTS = 2048


class ImageUrl(Struct):
    """Where an image is. Only `data:` URLs are read, which hold it."""

    url: str


class ContentPart(Struct, omit_defaults=True):
    """One part of a message's content: text, or an image (`image_url`)."""

    type: str
    text: str = ""
    image_url: ImageUrl | str | None = None


class ChatMessage(Struct, omit_defaults=True):
    """One turn of the conversation. What the model thought before it has different names at different clients."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    thinking: Any = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    def text(self) -> str:
        """The text of the content as one string, without images.

        Raises:
            HeadraceError: `unsupported_parameter` for a part that is neither text nor an image.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type not in ("text", "image_url"):
                raise HeadraceError(
                    ErrorCode.UNSUPPORTED_PARAMETER,
                    f"Content of type {quoted(part.type, 40)} is not supported. Send text.",
                    param="messages",
                )
        return "".join(part.text for part in self.content)

    @property
    def thought(self) -> str:
        """What the model thought before it wrote this; empty if that is not known, or not text."""
        return next((said for said in (self.reasoning_content, self.reasoning, self.thinking) if _is_text(said)), "")

    @property
    def shows(self) -> bool:
        """Whether the content has an image."""
        return isinstance(self.content, list) and any(part.type == "image_url" for part in self.content)

    def images(self) -> list[str]:
        """The images of the content, in base64.

        Raises:
            HeadraceError: as `image_data`.
        """
        if self.content is None or isinstance(self.content, str):
            return []
        urls = [part.image_url for part in self.content if part.type == "image_url"]
        return [image_data(url.url if isinstance(url, ImageUrl) else url or "") for url in urls]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


class FunctionSpec(Struct, omit_defaults=True):
    """A function that the model can call. Its JSON schema is passed to the chat template unchanged."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool | None = None


class Tool(Struct, kw_only=True):
    """A tool that the model can call. Chat templates show its members as JSON in this order, which models know."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class NamedFunction(Struct):
    """The name in a forced tool choice."""

    name: str


class NamedToolChoice(Struct):
    """`tool_choice` that names one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


_Stop = Annotated[str, Meta(min_length=1, max_length=256)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]


_ModelName = Annotated[str, Meta(max_length=256)]
# As many alternatives to a token as OpenAI gives.
_Alternatives = Annotated[int, Meta(ge=0, le=20)]
_TokenId = Annotated[str, Meta(pattern="^[0-9]{1,9}$", description="token ids")]


class ChatRequest(Struct, omit_defaults=True):
    """A request for an answer: the parameters of OpenAI's chat completion, `prompt` as a short form of `messages`, and
    some sampling parameters of MLX and Ollama (`top_k`, `min_p`, `repetition_penalty`). Absent and null are the same.
    `exact` asks for a text that depends on nothing but the request, its seed, the model and the machine.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    model: _ModelName | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    exact: bool | None = None
    stream: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # Older names of vLLM's. `decode_request` moves them to the two fields above.
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    logprobs: bool | _Alternatives | None = None
    top_logprobs: _Alternatives | None = None
    logit_bias: dict[_TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    think: bool | str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    suffix: str | None = None
    # The prompt goes to the model as it is, without the chat template.
    raw: bool | None = None
    ollama: OllamaParticulars | None = None
    # Read only to refuse values that would silently change the answer: see `_NEUTRAL`.
    n: int | None = None
    best_of: int | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    echo: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    # Written by `decode_request`, whatever a body says: what became of values that are taken in another meaning.
    notes: list[str] = field(default_factory=list, name="headrace.notes")

    @property
    def streams(self) -> bool:
        """Whether the client wants chunks."""
        return bool(self.stream)

    @property
    def token_limit(self) -> int | None:
        """The limit on the tokens of the answer, or None for the engine's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer. They are not part of it."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def constraint(self) -> Constraint | None:
        """The form that the answer must have, or None for any text."""
        return constraint_of(self.response_format, self.structured_outputs)

    @property
    def forces_tools(self) -> bool:
        """Whether the answer must be a tool call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def alternatives(self) -> int | None:
        """How many alternatives are wanted beside the log-probability of each token; None if none of it is wanted."""
        if self.logprobs is None or self.logprobs is False:
            return self.top_logprobs or None
        return self.top_logprobs or (0 if self.logprobs is True else self.logprobs)

    @property
    def thinking(self) -> Thinking | None:
        """How much the model thinks before it answers, by whichever parameter says it; None if none does."""
        return thinking_of(self._thinking_said[1])

    @property
    def thinking_param(self) -> str:
        """The parameter by which the request says that; empty if it does not."""
        return self._thinking_said[0]

    @property
    def worded_thinking(self) -> bool:
        """Whether it says so with a word for an amount."""
        return isinstance(self._thinking_said[1], str)

    @property
    def _thinking_said(self) -> tuple[str, bool | str]:
        return thinking_said(self.think, self.reasoning_effort, self.enable_thinking, self.chat_template_kwargs)

    @property
    def needs_mlx(self) -> str:
        """The parameter that only MLX honours, because Ollama's API has nothing like it; empty if there is none."""
        if self.exact:
            return "exact"
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "tool_choice" if self.forces_tools else ""

    @property
    def needs_ollama(self) -> str:
        """What the request has that only Ollama can honour, by its name there; empty if it has nothing of this kind."""
        if any(message.shows for message in self.chat):
            return "images"
        return "suffix" if self.suffix else self.ollama.needed if self.ollama else ""

    @property
    def is_raw(self) -> bool:
        """Whether the prompt goes to the model without the chat template."""
        return bool(self.raw or (self.ollama is not None and self.ollama.raw))

    @property
    def wanted_model(self) -> str | None:
        """The requested model, or None where any engine can answer."""
        return wanted(self.model)

    @property
    def chat(self) -> list[ChatMessage]:
        """The conversation. A `prompt` is one turn of the user."""
        if self.messages is not None:
            return self.messages
        return [ChatMessage(role="user", content=self.prompt)]


EncodingFormat = Literal["float", "base64"]


class EmbeddingRequest(Struct, omit_defaults=True):
    """A request for embeddings: the parameters of OpenAI's, and Ollama's `truncate` (true, the default, cuts a text
    that is too long for the model; false refuses it). Texts only: token ids belong to one model's vocabulary.
    """

    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: _ModelName | None = None
    dimensions: _Count | None = None
    encoding_format: EncodingFormat | None = None
    truncate: bool | None = None
    ollama: OllamaParticulars | None = None
    # As `ChatRequest.notes`.
    notes: list[str] = field(default_factory=list, name="headrace.notes")

    @property
    def wanted_model(self) -> str | None:
        """The requested model, or None where any embedding model can be used."""
        return wanted(self.model)

    @property
    def texts(self) -> list[str]:
        """The texts to embed, in order. Engines refuse an empty one: a space stands for it."""
        given = [self.input] if isinstance(self.input, str) else self.input
        return [text or " " for text in given]


Request = ChatRequest | EmbeddingRequest
_R = TypeVar("_R", ChatRequest, EmbeddingRequest)


def wanted(model: str | None) -> str | None:
    """The model that a request names; None if any may answer."""
    return None if model in (None, "", "auto", "auto:latest") else model


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
    return chat


def decode_chat(body: bytes, *, max_body_bytes: int) -> ChatRequest:
    """As `decode_request`, for a body that must be a chat."""
    chat = _read_chat(body, max_body_bytes)
    _check(chat)
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
    for index, message in enumerate(chat.messages or ()):
        if message.function_call is not None:  # the predecessor of `tool_calls`
            message.tool_calls = [*(message.tool_calls or ()), ToolCall(message.function_call, f"call_{index}")]
            message.function_call = None
    return chat


def _unify(chat: ChatRequest) -> None:
    """Write the form of the answer where a request in hand has it, whichever parameter asks for it."""
    guided = {name: getattr(chat, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    try:
        chat.response_format, chat.structured_outputs = unified(chat.response_format, chat.structured_outputs, guided)
    except ConstraintError as error:
        code = ErrorCode.UNSUPPORTED_PARAMETER if error.unsupported else ErrorCode.INVALID_REQUEST
        raise HeadraceError(code, str(error), param=error.param.partition(".")[0]) from None
    chat.guided_json = chat.guided_regex = chat.guided_choice = chat.guided_grammar = None


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
