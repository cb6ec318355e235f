"""The events of a streamed response of OpenAI's Responses API. No I/O.

Source of the shapes: the OpenAI API reference (responses, streaming events).
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from pipeline.gateway.dialects.response_object import (
    Frame,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    ResponseObject,
    item_status,
    output_message,
    output_reasoning,
)
from pipeline.wire.answers import Chunk, Completion, ErrorBody, TokenScore, ToolCallDelta


class ResponseEvents:
    """Writes the events of one stream, numbered from 0. One writer: the response that streams them.

    Each method returns the bytes of the events that follow, and begins the stream if that has not happened.

    Args:
        frame: of the responses in the events.
        request_id: the id of the response.
    """

    def __init__(self, frame: Frame, request_id: str) -> None:
        self._frame = frame
        self._id = request_id
        self._created = 0
        self._model = ""
        self._sequence = 0
        self._output: list[OutputItem] = []
        self._calls = 0
        # The one that grows, the last of the output.
        self._message: OutputMessage | None = None
        self._reasoning: OutputReasoning | None = None
        self._call: OutputCall | None = None

    def waiting(self) -> bytes:
        """The response is not complete yet."""
        return self._opening() or self._with_response("response.in_progress", self._so_far())

    def chunk(self, chunk: Chunk) -> bytes:
        """The reasoning, the text and the calls of a chunk."""
        self._model = self._model or chunk.model
        delta = chunk.choices[0].delta
        events = self._opening(chunk.created)
        if delta.reasoning_content:
            events += self._close_message() + self._close_call() + self._think(delta.reasoning_content)
        if delta.content:
            scores = chunk.choices[0].logprobs
            events += self._close_reasoning() + self._text(delta.content, scores.content if scores else [])
        for call in delta.tool_calls or ():
            events += self._part_of_call(call)
        return events

    def end(self, completion: Completion) -> bytes:
        """The answer is complete, or was cut off at its limit."""
        self._model = completion.model
        events = self._opening(completion.created)
        events += self._close_reasoning()
        if all(isinstance(item, OutputReasoning) for item in self._output):
            events += self._open_message()
        if self._message is not None:
            self._message.status = item_status(completion.choices[0].finish_reason)
        if self._call is not None:
            self._call.status = item_status(completion.choices[0].finish_reason)
        events += self._close_message() + self._close_call()
        response = self._frame.ended(completion, self._output)
        response.created_at = self._created
        return events + self._with_response(f"response.{response.status}", response)

    def failed(self, error: ErrorBody) -> bytes:
        """The request ended with an error. OpenAI's clients raise the first event, and Codex reads the second."""
        fields = {"code": error.code, "message": error.message, "param": error.param}
        events = self._opening() + self._event("error", error={"type": error.type, **fields}, **fields)
        for item in (self._message, self._reasoning, self._call):
            if item is not None:
                item.status = "incomplete"
        response = self._frame.failed(self._id, self._created, self._output, error)
        response.model = self._model or response.model
        return events + self._with_response("response.failed", response)

    def _opening(self, created: int = 0) -> bytes:
        if self._created:
            return b""
        self._created = created or int(time.time())
        response = self._so_far()
        return self._with_response("response.created", response) + self._with_response("response.in_progress", response)

    def _so_far(self) -> ResponseObject:
        return self._frame.response(self._id, self._created, "in_progress", self._output, model=self._model)

    def _think(self, delta: str) -> bytes:
        events = b"" if self._reasoning else self._open_reasoning()
        reasoning = self._reasoning
        assert reasoning is not None  # noqa: S101 - just opened
        reasoning.content[0].text += delta
        return events + self._event("response.reasoning_text.delta", **self._at_text(reasoning), delta=delta)

    def _open_reasoning(self) -> bytes:
        number = sum(isinstance(item, OutputReasoning) for item in self._output)
        self._reasoning = reasoning = output_reasoning(self._id, number, "", "in_progress")
        self._output.append(reasoning)
        bare = msgspec.structs.replace(reasoning, content=[])
        place = self._at_text(reasoning)
        return self._event("response.output_item.added", output_index=place["output_index"], item=bare) + self._event(
            "response.content_part.added", **place, part=ReasoningText("")
        )

    def _close_reasoning(self) -> bytes:
        reasoning, self._reasoning = self._reasoning, None
        if reasoning is None:
            return b""
        reasoning.status = "completed"
        place, part = self._at_text(reasoning), reasoning.content[0]
        return (
            self._event("response.reasoning_text.done", **place, text=part.text)
            + self._event("response.content_part.done", **place, part=part)
            + self._event("response.output_item.done", output_index=place["output_index"], item=reasoning)
        )

    def _text(self, delta: str, scores: list[TokenScore]) -> bytes:
        events = self._close_call() + (b"" if self._message else self._open_message())
        message = self._message
        assert message is not None  # noqa: S101 - just opened
        message.content[0].text += delta
        message.content[0].logprobs += scores
        place = self._at_text(message)
        return events + self._event("response.output_text.delta", **place, delta=delta, logprobs=scores)

    def _open_message(self) -> bytes:
        number = sum(isinstance(item, OutputMessage) for item in self._output)
        message = output_message(self._id, number, "", "in_progress")
        self._output.append(message)
        self._message = message
        bare = msgspec.structs.replace(message, content=[])
        place = self._at_text(message)
        return self._event("response.output_item.added", output_index=place["output_index"], item=bare) + self._event(
            "response.content_part.added", **place, part=OutputText("")
        )

    def _close_message(self) -> bytes:
        message, self._message = self._message, None
        if message is None:
            return b""
        if message.status == "in_progress":
            message.status = "completed"
        place, part = self._at_text(message), message.content[0]
        return (
            self._event("response.output_text.done", **place, text=part.text, logprobs=part.logprobs)
            + self._event("response.content_part.done", **place, part=part)
            + self._event("response.output_item.done", output_index=place["output_index"], item=message)
        )

    def _at_text(self, message: OutputMessage | OutputReasoning) -> dict[str, Any]:
        """Where the text of the last item belongs."""
        return {"item_id": message.id, "output_index": len(self._output) - 1, "content_index": 0}

    def _part_of_call(self, delta: ToolCallDelta) -> bytes:
        """A call that begins, or more of its arguments."""
        events = b""
        if delta.begins or self._call is None:
            events += self._close_reasoning() + self._close_message() + self._close_call() + self._open_call(delta)
        call, arguments = self._call, delta.function.arguments
        assert call is not None  # noqa: S101 - just opened
        if not arguments:
            return events
        call.arguments += arguments
        return events + self._event("response.function_call_arguments.delta", **self._at_call(call), delta=arguments)

    def _open_call(self, delta: ToolCallDelta) -> bytes:
        function = msgspec.structs.replace(delta.function, arguments="")
        call = self._frame.output_call(self._id, self._calls, delta.id, function)
        call.status = "in_progress"
        self._calls += 1
        self._output.append(call)
        self._call = call
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=call)

    def _close_call(self) -> bytes:
        call, self._call = self._call, None
        if call is None:
            return b""
        if call.status == "in_progress":
            call.status = "completed"
        place = self._at_call(call)
        return self._event(
            "response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments
        ) + self._event("response.output_item.done", output_index=place["output_index"], item=call)

    def _at_call(self, call: OutputCall) -> dict[str, Any]:
        """Where a call, the last item, belongs."""
        return {"item_id": call.id, "output_index": len(self._output) - 1}

    def _with_response(self, kind: str, response: ResponseObject) -> bytes:
        return self._event(kind, response=response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
