"""OpenAI's dialect: its requests as the pipeline's, the pipeline's answers as its responses. No I/O.

Source of the shapes: the OpenAI API reference (chat completions, completions, embeddings, models, errors). The wire
contract's requests are chat completions already, so those bodies are published unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.wire.answers import (
    Account,
    Chunk,
    Completion,
    CompletionDetails,
    Delta,
    EmbeddingList,
    ErrorBody,
    FinishReason,
    Logprobs,
    PromptDetails,
    Success,
    Usage,
)
from pipeline.wire.decoding import decode_chat, decode_embedding
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.habits import BYTE_ORDER_MARK
from pipeline.wire.requests import ChatRequest
from pipeline.wire.validation import shown

SSE = "text/event-stream; charset=utf-8"
JSON = "application/json"
KEEP_ALIVE = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"
# Each choice of a response is a request of its own.
MAX_CHOICES = 32
_SEEDS = 2**63


class StreamOptions(Struct):
    """What a stream carries beside its text."""

    include_usage: bool | None = None


class _Extras(Struct):
    """The fields of a request that the gateway reads. The pipeline reads the others."""

    stream_options: StreamOptions | None = None


class _TextRequest(Struct):
    """The fields of a text completion that differ from a chat's."""

    prompt: str | list[Any]
    stream_options: StreamOptions | None = None


def read_chat(body: bytes, max_body_bytes: int, _listed: Sequence[str] = ()) -> Asked:
    """The body of `POST /v1/chat/completions`.

    Raises:
        HeadraceError: as `decode_chat`.
    """
    body = _object(body)
    # The search comes first: decoding a long body a second time takes longer than everything else here.
    choices = 1
    if b'"n"' in body:
        fields = decode_body(body, dict[str, Any])
        if (choices := _choices(fields)) > 1:
            body = msgspec.json.encode(fields)
    request = decode_chat(body, max_body_bytes=max_body_bytes)
    if request.messages is None:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "`messages` is required.", param="messages")
    options = decode_body(body, _Extras).stream_options if b"stream_options" in body else None
    usage = _wants_usage(options)
    asked = [
        Asked(other, written, OpenAIChat(include_usage=usage, index=index), stream=request.streams)
        for index, (other, written) in enumerate(_drawn(request, body, choices))
    ]
    return asked[0]._replace(others=tuple(asked[1:]))


def _choices(fields: dict[str, Any]) -> int:
    """Take `n` out of a body: each choice is a request of its own.

    Raises:
        HeadraceError: `invalid_request` for more choices than a response has.
    """
    wanted = fields.get("n")
    if wanted is None:
        return 1
    number = isinstance(wanted, int | float) and not isinstance(wanted, bool)
    if not number or not 1 <= wanted <= MAX_CHOICES or wanted != int(wanted):
        message = f"`n` must be an integer from 1 to {MAX_CHOICES}, not {shown(wanted)}."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="n")
    del fields["n"]
    return int(wanted)


def _drawn(request: ChatRequest, body: bytes, choices: int) -> Iterable[tuple[ChatRequest, bytes]]:
    """A request once for each choice. With a seed, each has its own: equal ones would be answered alike."""
    yield request, body
    for number in range(1, choices):
        if request.seed is None:
            yield request, body
        else:
            seed = (request.seed + number) % _SEEDS
            fields = decode_body(body, dict[str, Any]) | {"seed": seed}
            yield msgspec.structs.replace(request, seed=seed), msgspec.json.encode(fields)


def read_text(body: bytes, max_body_bytes: int, _listed: Sequence[str] = (), *, raw: bool = True) -> Asked:
    """The body of `POST /v1/completions`. Each of its prompts is a request.

    Args:
        body, max_body_bytes: as in `decode_chat`.
        raw: whether a model reads the prompt as it is, unless the body says otherwise; else it is the user's turn of a
            chat, as is one with a `suffix`, whose template marks the gap.

    Raises:
        HeadraceError: as `decode_chat`, and `unsupported_parameter` for token ids.
    """
    body = _object(body)
    text = decode_body(body, _TextRequest)
    prompts = [text.prompt] if isinstance(text.prompt, str) else text.prompt
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        message = "`prompt` must be a string, or a list of strings. Token ids are not supported."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="prompt")
    fields = decode_body(body, dict[str, Any])
    del fields["prompt"]
    fields.pop("stream_options", None)
    if raw and not fields.get("suffix") and fields.get("raw") is None:
        fields["raw"] = True
    choices = _choices(fields)
    if len(prompts) * choices > MAX_CHOICES:
        message = f"A response has at most {MAX_CHOICES} choices. Send fewer prompts at once."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="prompt")
    usage, asked = _wants_usage(text.stream_options), list[Asked]()
    for prompt in prompts:
        body = msgspec.json.encode(fields | {"messages": [{"role": "user", "content": prompt}]})
        request = decode_chat(body, max_body_bytes=max_body_bytes)
        for other, written in _drawn(request, body, choices):
            shape = OpenAIText(include_usage=usage, index=len(asked))
            asked.append(Asked(other, written, shape, stream=request.streams))
    return asked[0]._replace(others=tuple(asked[1:]))


def read_embeddings(body: bytes, max_body_bytes: int, _listed: Sequence[str] = ()) -> Asked:
    """The body of `POST /v1/embeddings`. It is encoded again: a worker would read a body with `messages` as a chat.

    Raises:
        HeadraceError: as `decode_embedding`.
    """
    request = decode_embedding(_object(body), max_body_bytes=max_body_bytes)
    return Asked(request, msgspec.json.encode(request), OpenAIEmbeddings(), stream=False)


def _wants_usage(options: StreamOptions | None) -> bool:
    return bool(options and options.include_usage)


def _object(body: bytes) -> bytes:
    body = body.removeprefix(BYTE_ORDER_MARK).strip()
    if not body.startswith(b"{"):
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "The body must be a JSON object.")
    return body


# ---- chat completions ------------------------------------------------------------------------------------------------


class _ChunkChoice(Struct):
    delta: Delta | dict[str, Any]
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None


class _ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[_ChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET
    headrace: Account | UnsetType = UNSET


def _as_written(delta: Delta) -> Delta | dict[str, Any]:
    """A delta as OpenAI writes it: a part that continues a call has only its index and arguments."""
    if all(call.begins for call in delta.tool_calls or ()):
        return delta
    fields: dict[str, Any] = msgspec.to_builtins(delta)
    fields["tool_calls"] = [
        call
        if call["id"] or call["function"]["name"]
        else {"index": call["index"], "function": {"arguments": call["function"]["arguments"]}}
        for call in fields["tool_calls"]
    ]
    return fields


class OpenAIChat:
    """The responses to a chat completion.

    Args:
        include_usage: whether a stream ends with the usage. Every chunk before it then has `usage: null`.
        index: of the choice that the answer is.
    """

    stream_type = SSE
    keep_alive = KEEP_ALIVE
    request_id = ""

    def __init__(self, *, include_usage: bool = False, index: int = 0) -> None:
        self._include_usage = include_usage
        self._index = index

    def part(self, chunk: Chunk) -> bytes:
        """One server-sent event."""
        choices = [
            _ChunkChoice(_as_written(choice.delta), self._index, choice.finish_reason, choice.logprobs or None)
            for choice in chunk.choices
        ]
        usage = None if self._include_usage else UNSET
        return event(_ChatChunk(self.request_id or chunk.id, chunk.created, chunk.model, choices, usage=usage))

    def end(self, completion: Completion) -> bytes:
        """The end of a stream: the usage if it was requested, with the pipeline's account of the request."""
        if not self._include_usage:
            return _DONE
        last = completion
        return (
            event(_ChatChunk(last.id, last.created, last.model, [], usage=last.usage, headrace=last.headrace)) + _DONE
        )

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        return msgspec.json.encode(expected(answer, Completion))

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        return error_body(error)

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun. OpenAI's clients raise it."""
        return b"data: " + error_body(error) + b"\n\n"


# ---- text completions ------------------------------------------------------------------------------------------------


class _TextLogprobs(Struct):
    """The log-probabilities of a text completion: one entry for each token in each list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def _text_logprobs(given: Logprobs | UnsetType, start: int = 0) -> _TextLogprobs | None:
    """The log-probabilities of tokens, the first of which begins at `start` in the text."""
    if not given:
        return None
    offsets = list(accumulate((len(score.token) for score in given.content), initial=start))[:-1]
    return _TextLogprobs(
        [score.token for score in given.content],
        [score.logprob for score in given.content],
        [{other.token: other.logprob for other in score.top_logprobs} for score in given.content],
        offsets,
    )


class _TextChoice(Struct):
    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: _TextLogprobs | None = None


class _TextCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[_TextChoice]
    object: str = "text_completion"
    usage: Usage | UnsetType | None = UNSET
    headrace: Account | UnsetType = UNSET


class OpenAIText(OpenAIChat):
    """The responses to a text completion."""

    def __init__(self, *, include_usage: bool = False, index: int = 0) -> None:
        super().__init__(include_usage=include_usage, index=index)
        self._chars = 0

    def part(self, chunk: Chunk) -> bytes:
        """As `OpenAIChat.part`."""
        choices = []
        for choice in chunk.choices:
            text = choice.delta.content or ""
            logprobs = _text_logprobs(choice.logprobs, self._chars)
            self._chars += len(text)
            choices.append(_TextChoice(text, self._index, choice.finish_reason, logprobs))
        usage = None if self._include_usage else UNSET
        return event(_TextCompletion(self.request_id or chunk.id, chunk.created, chunk.model, choices, usage=usage))

    def end(self, completion: Completion) -> bytes:
        """As `OpenAIChat.end`."""
        if not self._include_usage:
            return _DONE
        last = self._completion(completion)
        last.choices = []
        return event(last) + _DONE

    def whole(self, answer: Success) -> bytes:
        """As `OpenAIChat.whole`."""
        return msgspec.json.encode(self._completion(expected(answer, Completion)))

    def _completion(self, completion: Completion) -> _TextCompletion:
        choices = [
            _TextChoice(
                choice.message.content or "", choice.index, choice.finish_reason, _text_logprobs(choice.logprobs)
            )
            for choice in completion.choices
        ]
        return _TextCompletion(
            completion.id,
            completion.created,
            completion.model,
            choices,
            usage=completion.usage,
            headrace=completion.headrace,
        )


# ---- embeddings ------------------------------------------------------------------------------------------------------


class OpenAIEmbeddings(OpenAIChat):
    """The response to a request for embeddings. It is never streamed."""

    def whole(self, answer: Success) -> bytes:
        """As `OpenAIChat.whole`."""
        return msgspec.json.encode(expected(answer, EmbeddingList))


def joined(completions: Sequence[Completion]) -> Completion:
    """The answers of a call with several choices as one, under the id and with the account of the first."""
    first = completions[0]
    choices = [
        msgspec.structs.replace(completion.choices[0], index=index) for index, completion in enumerate(completions)
    ]
    counts = [completion.usage for completion in completions]
    prompt, answer = (sum(getattr(usage, name) for usage in counts) for name in ("prompt_tokens", "completion_tokens"))
    cached = PromptDetails(sum(usage.prompt_tokens_details.cached_tokens for usage in counts))
    usage = Usage(prompt, answer, prompt + answer, cached)
    if details := [count.completion_tokens_details for count in counts if count.completion_tokens_details]:
        usage.completion_tokens_details = CompletionDetails(sum(detail.reasoning_tokens for detail in details))
    return msgspec.structs.replace(first, choices=choices, usage=usage)


# ---- the rest --------------------------------------------------------------------------------------------------------


def event(message: Struct) -> bytes:
    """A message as one server-sent event."""
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


def error_body(error: ErrorBody) -> bytes:
    """OpenAI's error envelope."""
    fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def models(names: Iterable[str]) -> dict[str, Any]:
    """The body of `GET /v1/models`."""
    return {"object": "list", "data": [model(name) for name in names]}


def model(name: str) -> dict[str, Any]:
    """The body of `GET /v1/models/{id}`. The time of a model's creation is not known, so `created` is 0."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "headrace"}
