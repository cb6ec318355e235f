"""Answers of the pipeline, as a record holds them, to be turned into a dialect's."""

from __future__ import annotations

import msgspec

from pipeline.wire.answers import (
    Account,
    Alternative,
    AssistantMessage,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    CompletionDetails,
    Delta,
    Embedding,
    EmbeddingList,
    EmbeddingUsage,
    FunctionCall,
    Logprobs,
    PromptDetails,
    TokenScore,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from pipeline.wire.subjects import Priority, Task

ACCOUNT = Account(
    engine="mlx",
    priority=Priority.HIGH,
    task=Task.SIMPLE,
    attempts=1,
    queue_ms=2.0,
    ttft_ms=10.0,
    total_ms=30.0,
    spilled=False,
    reason="mlx had a free slot",
)
CALL = FunctionCall("get_weather", '{"city":"Paris"}')


def _chunk(seq: int, delta: Delta, finish: str | None = None) -> Chunk:
    return Chunk(
        id="req-1",
        created=1700000000,
        model="headrace-demo",
        choices=[ChunkChoice(delta, finish_reason=finish, token_ids=[seq])],
        seq=seq,
        attempt=1,
    )


def _completion(message: AssistantMessage, finish: str) -> Completion:
    return Completion(
        id="req-1",
        created=1700000000,
        model="headrace-demo",
        choices=[Choice(message, finish)],
        usage=Usage(3, 2, 5, PromptDetails(1)),
        headrace=ACCOUNT,
    )


CHUNKS = [_chunk(0, Delta(role="assistant", content="Hello")), _chunk(1, Delta(content=" there"), "stop")]
COMPLETION = _completion(AssistantMessage("Hello there"), "stop")
CUT_OFF = _completion(AssistantMessage("Hello there"), "length")
TOOL_CHUNK = _chunk(0, Delta(role="assistant", tool_calls=[ToolCallDelta(0, "call_1", CALL)]), "tool_calls")
# The same call in parts, and the beginning of another.
CALL_PARTS = [
    _chunk(0, Delta(role="assistant", tool_calls=[ToolCallDelta(0, "call_1", FunctionCall("get_weather", ""))])),
    _chunk(1, Delta(tool_calls=[ToolCallDelta(0, "", FunctionCall("", '{"city":'))])),
    _chunk(
        2,
        Delta(
            tool_calls=[
                ToolCallDelta(0, "", FunctionCall("", '"Paris"}')),
                ToolCallDelta(1, "call_2", FunctionCall("get_weather", "[")),
            ]
        ),
    ),
    _chunk(3, Delta(tool_calls=[ToolCallDelta(1, "", FunctionCall("", "1]"))]), "tool_calls"),
]
PARTS_COMPLETION = _completion(
    AssistantMessage(
        None, tool_calls=[ToolCall(CALL, "call_1"), ToolCall(FunctionCall("get_weather", "[1]"), "call_2")]
    ),
    "tool_calls",
)
LAST_CHUNK = _chunk(1, Delta(), "stop")
TOOL_COMPLETION = _completion(AssistantMessage(None, tool_calls=[ToolCall(CALL, "call_1")]), "tool_calls")


EMBEDDINGS = EmbeddingList(
    id="req-1",
    created=1700000000,
    model="nomic-embed-text:latest",
    data=msgspec.Raw(msgspec.json.encode([Embedding([0.5, -0.25], 0), Embedding([1.0, 0.0], 1)])),
    usage=EmbeddingUsage(4, 4),
    headrace=ACCOUNT,
)

THOUGHTFUL = _completion(AssistantMessage("Four", reasoning_content="Hm. Two", reasoning="Hm. Two"), "stop")
THOUGHTFUL.usage.completion_tokens_details = CompletionDetails(7)
CUT_IN_THOUGHT = _completion(AssistantMessage("", reasoning_content="Hm."), "length")
THOUGHTFUL_CHUNKS = [
    _chunk(0, Delta(role="assistant", reasoning_content="Hm.", reasoning="Hm.")),
    _chunk(1, Delta(reasoning_content=" Two", reasoning=" Two", content="Fo")),
    _chunk(2, Delta(content="ur"), "stop"),
]

_SCORES = Logprobs([TokenScore("Hi", -0.5, [72, 105], [Alternative("Ho", -1.5, [72, 111])])])
SCORED_CHOICE = Choice(AssistantMessage("Hi", reasoning_content="Hm."), "stop", logprobs=_SCORES)
SCORED_CHUNK = msgspec.structs.replace(
    CHUNKS[0], choices=[ChunkChoice(Delta(reasoning_content="Hm."), token_ids=[1], logprobs=_SCORES)]
)
