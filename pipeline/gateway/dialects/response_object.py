"""The object of OpenAI's Responses API: what a call asked for, and the answer to it. No I/O.

Source of the shapes: the OpenAI API reference (responses, the response object).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, structs
from msgspec import field as struct_field

from pipeline.wire.answers import (
    Account,
    AssistantMessage,
    Completion,
    ErrorBody,
    FinishReason,
    FunctionCall,
    TokenScore,
    Usage,
)

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Struct, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[Any] = struct_field(default_factory=list)
    logprobs: list[TokenScore] = struct_field(default_factory=list)


class OutputMessage(Struct, tag_field="type", tag="message"):
    """The model's words."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(Struct, tag_field="type", tag="function_call"):
    """A call of a function. `namespace` is present if the function belongs to one."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus
    namespace: str | UnsetType = UNSET


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """What the model thought."""

    text: str


class OutputReasoning(Struct, tag_field="type", tag="reasoning"):
    """The model's reasoning. There is no summary of it."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Any] = struct_field(default_factory=list)


OutputItem = OutputMessage | OutputCall | OutputReasoning


class CachedDetails(Struct):
    """Of the input's tokens, those that a cache served, and those that it took in, which no engine reports."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class ReasoningDetails(Struct):
    """Of the output's tokens, those of reasoning; 0 if the engine does not report them."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    """Exact token counts."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: CachedDetails = struct_field(default_factory=CachedDetails)
    output_tokens_details: ReasoningDetails = struct_field(default_factory=ReasoningDetails)


class IncompleteDetails(Struct):
    """Why an answer is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseError(Struct):
    """Why there is no answer."""

    code: str
    message: str


class ResponseObject(Struct):
    """The response. Parameters are as the call has them; null is the engine's default.

    `headrace` is the pipeline's own account of the request.
    """

    id: str
    created_at: int
    status: ResponseStatus
    model: str
    output: list[OutputItem]
    object: Literal["response"] = "response"
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | float | None = None
    metadata: dict[str, Any] = struct_field(default_factory=dict)
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] = struct_field(default_factory=lambda: {"effort": None, "summary": None})
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = False
    temperature: float | None = None
    text: dict[str, Any] = struct_field(default_factory=lambda: {"format": {"type": "text"}})
    tool_choice: Any = "auto"
    tools: list[Any] = struct_field(default_factory=list)
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    headrace: Account | UnsetType = UNSET


@dataclass(slots=True)
class Frame:
    """What the responses to one call have in common.

    Attributes:
        given: the fields of the response that repeat the call's.
        model: as the call names it.
        named: as `Offered.named`.
        notes: sentences about what of the call was left out.
    """

    given: dict[str, Any] = field(default_factory=dict)
    model: str = "auto"
    named: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def response(
        self, request_id: str, created: int, status: ResponseStatus, output: list[OutputItem], *, model: str = ""
    ) -> ResponseObject:
        """A response in any state."""
        return ResponseObject(request_id, created, status, model or self.model, output, **self.given)

    def failed(self, request_id: str, created: int, output: list[OutputItem], error: ErrorBody) -> ResponseObject:
        """The response of a request that ended with an error."""
        response = self.response(request_id, created, "failed", output)
        response.error = ResponseError(error.code, error.message)
        return response

    def ended(self, completion: Completion, output: list[OutputItem]) -> ResponseObject:
        """The response of a request that was answered."""
        cut = completion.choices[0].finish_reason == "length"
        response = self.response(
            completion.id,
            completion.created,
            "incomplete" if cut else "completed",
            output,
            model=completion.model,
        )
        response.incomplete_details = IncompleteDetails("max_output_tokens") if cut else None
        response.usage = usage_of(completion.usage)
        notes = [*self.notes, *(completion.headrace.notes or [])]
        response.headrace = structs.replace(completion.headrace, notes=notes or UNSET)
        return response

    def output_call(self, request_id: str, number: int, call_id: str, call: FunctionCall) -> OutputCall:
        """A function call, complete; number counts the calls of a response from 0."""
        namespace, name = self.named.get(call.name, (UNSET, call.name))
        return OutputCall(
            f"fc_{request_id}_{number}",
            call_id or f"call_{request_id}_{number}",
            name,
            call.arguments,
            "completed",
            namespace,
        )

    def whole(self, completion: Completion) -> ResponseObject:
        """The response of a request that was not streamed: the reasoning, the text, and then the calls."""
        message, finish = completion.choices[0].message, completion.choices[0].finish_reason
        output: list[OutputItem] = []
        if message.reasoning_content:
            output.append(output_reasoning(completion.id, 0, message.reasoning_content, "completed"))
        if has_text(message):
            spoken = output_message(completion.id, 0, message.content or "", item_status(finish))
            if scores := completion.choices[0].logprobs:
                spoken.content[0].logprobs = scores.content
            output.append(spoken)
        for number, call in enumerate(message.tool_calls or ()):
            output.append(self.output_call(completion.id, number, call.id, call.function))
        return self.ended(completion, output)


def has_text(message: AssistantMessage) -> bool:
    """Whether an answer has a message: an empty one, unless it has calls."""
    return bool(message.content) or not message.tool_calls


def output_message(request_id: str, number: int, text: str, status: ItemStatus) -> OutputMessage:
    """A message with its text; number counts the messages of a response from 0."""
    return OutputMessage(f"msg_{request_id}_{number}", status, [OutputText(text)])


def output_reasoning(request_id: str, number: int, text: str, status: ItemStatus) -> OutputReasoning:
    """Reasoning with its text; number counts those of a response from 0."""
    return OutputReasoning(f"rs_{request_id}_{number}", status, [ReasoningText(text)])


def item_status(finish: FinishReason) -> ItemStatus:
    """The status of the message with which an answer ends."""
    return "incomplete" if finish == "length" else "completed"


def usage_of(usage: Usage) -> ResponseUsage:
    """The token counts under the names of this API."""
    cached = CachedDetails(usage.prompt_tokens_details.cached_tokens)
    given = ResponseUsage(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, cached)
    if details := usage.completion_tokens_details:
        given.output_tokens_details = ReasoningDetails(details.reasoning_tokens)
    return given
