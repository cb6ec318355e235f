"""Triage: whether a request is simple enough for a smaller model, and whether it leaves a saturated engine.

A request is *simple* if its answer is short (cheap on any engine) and easy (a smaller model gets it right). Doubtful
requests are complex: a complex request answered by a small model costs the user more than a simple one that waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from pipeline.core import lexical
from pipeline.wire.messages import Load
from pipeline.wire.requests import ChatMessage, ChatRequest, EmbeddingRequest, Request
from pipeline.wire.subjects import Priority, Task

LONG_PROMPT_CHARS = 2000
LONG_SYSTEM_CHARS = 1500
LONG_CONVERSATION_CHARS = 6000
LONG_CONVERSATION_MESSAGES = 8
LONG_ANSWER_TOKENS = 1024
SHORT_ANSWER_TOKENS = 16
_READ_CHARS = 1200
_MANY_PARTS = 64
_HARD_FACT_SCORE = 10.0

# A score of this or more is certain. A score between 0 and this is a doubtful case.
_DOUBT_ENDS = 1.0
_MOST_HITS = 2.0


class Verdict(NamedTuple):
    """The result of triage: the class, its reason, whether it is certain, and the score (0 or less is simple).

    A verdict that is not certain is complex.
    """

    task: Task
    reason: str
    certain: bool
    score: float


class _Sign(NamedTuple):
    """One row of the table: what one hit of a sign adds to difficulty and to length, and the reason to give."""

    difficulty: float
    length: float
    reason: str


# Scores start above 0: a request without any sign is not simple.
_DIFFICULTY_BIAS = 0.6
_LENGTH_BIAS = -1.0
_LENGTH_PER_WORD = 1 / 110  # a request of 110 words or more is not short

# A sign of 1.0 or more outweighs every known kind and vetoes alone; weaker signs must add up. The magnitudes are a
# judgement about what small models fail at. Those of texture (numbers, symbols) and of logic (supposition, negation)
# are in proportion to their weights in a logistic fit on multiple-choice questions.
_SIGNS = {
    "code": _Sign(1.0, 0.5, "asks for code"),
    "reasoning": _Sign(1.0, 0.6, "asks for reasoning"),
    "explanation": _Sign(1.0, 0.8, "asks for an explanation"),
    "mathematics": _Sign(1.1, 0.4, "asks for mathematics"),
    "composition": _Sign(1.0, 1.0, "asks for a text to be written"),
    "planning": _Sign(1.0, 0.8, "asks for a plan"),
    "thoroughness": _Sign(0.6, 1.1, "asks for a long answer"),
    "amount": _Sign(0.6, 1.1, "asks for a long answer"),
    "judgement": _Sign(0.9, 0.3, "asks for a judgement"),
    "personal": _Sign(0.6, 0.1, "asks for a judgement"),
    "supposition": _Sign(0.6, 0.1, "has conditions"),
    "conjunction": _Sign(0.25, 0.1, "has several parts"),
    "more_questions": _Sign(0.8, 0.6, "has several parts"),
    "choices": _Sign(0.4, 0.0, "a choice between options"),
    "listed": _Sign(0.3, 0.2, "has several parts"),
    "abstraction": _Sign(0.5, 0.2, "an abstract subject"),
    "negation": _Sign(0.2, 0.0, "has conditions"),
    "large_numbers": _Sign(0.6, 0.0, "numbers to reason with"),
    "log_numbers": _Sign(0.45, 0.0, "numbers to reason with"),
    "log_symbols": _Sign(0.35, 0.0, "symbols to reason with"),
    "log_variables": _Sign(0.3, 0.0, "symbols to reason with"),
    "log_sentences": _Sign(0.15, 0.1, "has several parts"),
}

# What a recognized kind subtracts from difficulty. A small sum is almost certainly easy; a question that opens like one
# for a fact may be something else.
_KINDS = {
    "greeting": 1.5,
    "small sum": 2.0,
    "unit conversion": 1.4,
    "short translation": 1.4,
    "small edit": 1.4,
    "short classification": 1.4,
    "short extraction": 1.3,
    "one-word answer": 1.25,
    "question on a short text": 1.2,
    "short factual question": 1.05,
}


def classify(request: Request, hint: Task | None) -> Verdict:
    """The class of a request, from the caller's hint, else from its form, else from its words.

    The caller's hint wins. If the request itself leads to the same class, the reason is the request's own.

    It never raises. Its time does not grow with the request beyond some thousand characters.

    Args:
        request: the decoded request.
        hint: the class in the subject or in `Llm-Task`. None and `UNTRIAGED` mean none.
    """
    own = _own(request)
    if hint is Task.SIMPLE or hint is Task.COMPLEX:
        reason = own.reason if own.task is hint else f"caller said {hint}"
        return Verdict(hint, reason, certain=True, score=-1.0 if hint is Task.SIMPLE else 1.0)
    return own


def _own(request: Request) -> Verdict:
    """The class by the request itself."""
    if isinstance(request, EmbeddingRequest):
        return Verdict(Task.SIMPLE, "embeddings", certain=True, score=-1.0)
    if fact := _hard_fact(request):
        return Verdict(Task.COMPLEX, fact, certain=True, score=_HARD_FACT_SCORE)
    return _read(request)


def _hard_fact(request: ChatRequest) -> str:
    """The reason why a request is complex regardless of its words, or `""`."""
    if request.tools and request.tool_choice != "none":
        return "tools offered"
    if request.response_format is not None and request.response_format.type != "text":
        return "structured output asked for"
    if request.logit_bias or request.alternatives is not None or request.needs_ollama:
        return "needs what one engine has"
    if (request.token_limit or 0) > LONG_ANSWER_TOKENS:
        return "long answer allowed"
    chat = request.chat
    if not chat or chat[-1].role != "user":
        return "no question at the end"
    if len(chat) > LONG_CONVERSATION_MESSAGES:
        return "long conversation"
    if any(message.role == "tool" or message.tool_calls for message in chat):
        return "tools used before"
    system = sum(_chars(message) for message in chat if message.role in ("system", "developer"))
    if _chars(chat[-1]) > LONG_PROMPT_CHARS:
        return "long prompt"
    if system > LONG_SYSTEM_CHARS:
        return "long system prompt"
    if sum(map(_chars, chat)) > LONG_CONVERSATION_CHARS:
        return "long conversation"
    if any("```" in piece for message in chat for piece in _pieces(message)):
        return "code in the prompt"
    return ""


def _pieces(message: ChatMessage) -> Iterator[str]:
    """The text parts of a message. Other parts have no text here, and are refused elsewhere."""
    if isinstance(message.content, str):
        yield message.content
    else:
        yield from (part.text for part in message.content or ())


def _chars(message: ChatMessage) -> int:
    """The length of a message. A message with very many parts counts as long, so that they are not all read."""
    if isinstance(message.content, list) and len(message.content) > _MANY_PARTS:
        return LONG_CONVERSATION_CHARS
    return sum(map(len, _pieces(message)))


def _read(request: ChatRequest) -> Verdict:
    """The verdict by words. `_hard_fact` has limited the length of the text."""
    *before, last = request.chat
    asked = lexical.normalize("".join(_pieces(last)))
    pieces = (piece for message in before if message.role != "assistant" for piece in _pieces(message))
    context = lexical.normalize("\n".join(pieces))
    kind = lexical.kind(asked) or _kind_set_before(request, asked)
    signs = lexical.signs(_ends(f"{context}\n{lexical.instruction(asked, kind)}"))
    for name in ("numbers", "symbols", "variables", "sentences"):
        signs[f"log_{name}"] = math.log1p(signs[name])
    signs["more_questions"] = max(0.0, signs["questions"] - 1)
    if kind in ("small sum", "unit conversion"):
        signs["log_numbers"] = signs["log_symbols"] = 0.0
    hits = {name: min(_MOST_HITS, signs.get(name, 0.0)) for name in _SIGNS}
    difficulty = _DIFFICULTY_BIAS + sum(_SIGNS[name].difficulty * count for name, count in hits.items())
    difficulty -= _KINDS.get(kind, 0.0)
    length = _LENGTH_BIAS + sum(_SIGNS[name].length * count for name, count in hits.items())
    by_words = asked.count(" ") * _LENGTH_PER_WORD
    length += by_words
    if (request.token_limit or LONG_ANSWER_TOKENS) <= SHORT_ANSWER_TOKENS:
        length -= 1.0
    score = round(max(difficulty, length), 3)
    if score <= 0:
        return Verdict(Task.SIMPLE, kind, certain=True, score=score)
    reason = _why(hits, hard=difficulty >= length)
    if length > difficulty and by_words >= 1:
        reason = "long prompt"
    return Verdict(Task.COMPLEX, reason, certain=score >= _DOUBT_ENDS, score=score)


def _ends(text: str) -> str:
    """The start and the end of a long text, where people say what they want."""
    if len(text) <= _READ_CHARS:
        return text
    return f"{text[: _READ_CHARS // 2]}\n{text[-_READ_CHARS // 2 :]}"


def _kind_set_before(request: ChatRequest, asked: str) -> str:
    """The kind that a system prompt sets for a short message, for example "Classify what the user says"."""
    instructions = (m for m in request.chat[:-1] if m.role in ("system", "developer"))
    kinds = (lexical.kind(lexical.normalize("".join(_pieces(message))), data_follows=True) for message in instructions)
    return next((kind for kind in kinds if kind in lexical.JOBS), "") if asked.strip() else ""


def _why(hits: dict[str, float], *, hard: bool) -> str:
    """The reason of the sign that added most, or "unsure"."""
    adds = {name: (sign.difficulty if hard else sign.length) * hits[name] for name, sign in _SIGNS.items()}
    most = max(adds, key=lambda name: adds[name])
    return _SIGNS[most].reason if adds[most] > 0.3 else "unsure"


class Outcome(StrEnum):
    """Where a request goes that waits for a saturated engine."""

    SPILL = "spill"
    COMPLEX = "complex"
    LEAVE = "leave"


class Decision(NamedTuple):
    """Where a waiting request goes, and why."""

    outcome: Outcome
    reason: str


class Waiting(NamedTuple):
    """A request in the router. `mlx_may` and `ollama_may`: the engine has its model. `moved`: it was moved before."""

    verdict: Verdict
    priority: Priority
    ollama_may: bool
    mlx_may: bool = True
    moved: bool = False


class Room(NamedTuple):
    """Ollama as the router knows it: whether it answers, its free slots, and its predicted time for an answer."""

    healthy: bool
    free: int
    answer_ms: float


def saturated(load: Load) -> bool:
    """Whether a load event reports an engine whose simple requests may go to another: it is saturated, or away."""
    return load.level == "saturated" or not load.available


def spill(waiting: Waiting, load: Load | None, ollama: Room) -> Decision:
    """Decide where an untriaged or simple request goes that waits for MLX.

    It is spilled only if Ollama would answer before MLX would begin, by the wait that load predicts for its priority,
    or if MLX cannot answer it at all. A complex request goes to the lane that only MLX serves, so that triage sees it
    once.

    Args:
        waiting: the request.
        load: MLX's last load event, or None if none was heard recently.
        ollama: the engine that could take the request.
    """
    if waiting.moved:
        return Decision(Outcome.LEAVE, "moved before")
    if load is None or not saturated(load):
        return Decision(Outcome.LEAVE, "mlx is not known to be saturated")
    if not waiting.ollama_may:
        return Decision(Outcome.COMPLEX, "only mlx has its model")
    if waiting.mlx_may and waiting.verdict.task is not Task.SIMPLE:
        return Decision(Outcome.COMPLEX, waiting.verdict.reason)
    if not ollama.healthy:
        return Decision(Outcome.LEAVE, "ollama is away")
    if not waiting.mlx_may:
        return Decision(Outcome.SPILL, "only ollama has its model")
    if ollama.free <= 0:
        return Decision(Outcome.LEAVE, "ollama is full")
    if ollama.answer_ms >= load.predicted_wait_ms.of(waiting.priority):
        return Decision(Outcome.LEAVE, "mlx would answer sooner")
    state = "saturated" if load.available else "away"
    return Decision(Outcome.SPILL, f"mlx is {state}: {waiting.verdict.reason}")
