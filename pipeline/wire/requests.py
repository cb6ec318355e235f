"""The body of a request as msgspec structs: OpenAI's chat completion, or its embeddings.

`pipeline.wire.decoding` reads it. Source of the shapes: the OpenAI API reference (chat completions, embeddings) and
`docs/protocol.md`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from pipeline.wire.answers import FunctionCall, ToolCall
from pipeline.wire.constraints import Constraint, ResponseFormat, Schema, StructuredOutputs, constraint_of
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.particular import OllamaParticulars, Thinking, ThinkingParameters, image_data, thinking_of

MAX_STOPS = 64
# The limit of an answer that may be as long as the context allows.
NO_LIMIT = 2**31 - 1
MAX_TOOLS = 128
# As at OpenAI.
MAX_INPUTS = 2048


# The first is a chat's. Clients that keep a history in the form of the Responses API send the others.
_TEXTS = ("text", "input_text", "output_text", "refusal")


class ImageUrl(Struct):
    """Where an image is. Only `data:` URLs are read, which hold it."""

    url: str


class ContentPart(Struct, omit_defaults=True):
    """One part of a message's content: text, or an image (`image_url`)."""

    type: str
    text: str = ""
    refusal: Any = ""
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
            if part.type not in (*_TEXTS, "image_url") or not isinstance(part.refusal, str):
                raise HeadraceError(
                    ErrorCode.UNSUPPORTED_PARAMETER,
                    f"Content of type {quoted(part.type, 40)} is not supported. Send text.",
                    param="messages",
                )
        return "".join(part.text or part.refusal for part in self.content)

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
_Repetition = Annotated[float, Meta(gt=0, le=10)]
_Count = Annotated[int, Meta(ge=1, le=NO_LIMIT)]


# Other servers' parameters, and the values with which they change nothing.
_NEUTRAL_OF_OTHERS: dict[str, Any] = {
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "bad_words": [],
    "length_penalty": 1,
    "typical_p": 1,
    "mirostat": 0,
    "repeat_last_n": None,
    "repetition_context_size": None,
    "xtc_probability": 0,
    "thinking_budget": None,
}
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
    repetition_penalty: _Repetition | None = None
    # LM Studio's, llama.cpp's and Ollama's name. `decode_request` moves it to the field above.
    repeat_penalty: _Repetition | None = None
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
    # vLLM's older names, llama.cpp's and SGLang's. `decode_request` moves them to the two fields above.
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Schema | str | None = None
    grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    logprobs: bool | _Alternatives | None = None
    top_logprobs: _Alternatives | None = None
    logit_bias: dict[_TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    think: bool | str | None = None
    enable_thinking: bool | None = None
    reasoning: Any = None
    thinking_option: Any = field(default=None, name="thinking")
    chat_template_kwargs: dict[str, Any] | None = None
    suffix: str | None = None
    # The prompt goes to the model as it is, without the chat template.
    raw: bool | None = None
    ollama: OllamaParticulars | None = None
    # Parameters of other servers. One that has them gets them. Elsewhere, a note says that they have no effect.
    min_tokens: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    bad_words: Any = None
    length_penalty: Any = None
    typical_p: Any = None
    mirostat: Any = None
    repeat_last_n: Any = None
    repetition_context_size: Any = None
    xtc_probability: Any = None
    thinking_budget: Any = None
    # Read only to refuse values that would silently change the answer: see `pipeline.wire.decoding`.
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
    adapters: Any = None
    # Written by `decode_request`, whatever a body says: what became of values that are taken in another meaning.
    notes: list[str] = field(default_factory=list, name="headrace.notes")

    @property
    def streams(self) -> bool:
        """Whether the client wants chunks."""
        return bool(self.stream)

    @property
    def token_limit(self) -> int | None:
        """The limit on the tokens of the answer, `NO_LIMIT` for none, or None for the engine's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stated_limit(self) -> int | None:
        """The limit on the tokens of the answer that the client counts on; None if it has none."""
        return None if self.token_limit == NO_LIMIT else self.token_limit

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
        word = self._thinking_said[1]
        return isinstance(word, str) and bool(word)

    @property
    def _thinking_said(self) -> tuple[str, bool | str]:
        return ThinkingParameters(
            self.think,
            self.reasoning_effort,
            self.enable_thinking,
            self.reasoning,
            self.thinking_option,
            self.chat_template_kwargs,
        ).said

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
    def of_others(self) -> dict[str, Any]:
        """The parameters of other servers that would change the answer."""
        given = ((name, getattr(self, name)) for name in _NEUTRAL_OF_OTHERS)
        return {name: value for name, value in given if value not in (None, _NEUTRAL_OF_OTHERS[name])}

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


def wanted(model: str | None) -> str | None:
    """The model that a request names; None if any may answer."""
    return None if model in (None, "", "auto", "auto:latest") else model
