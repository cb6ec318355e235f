"""Triage: whether a request is simple enough for a smaller model, and whether it leaves a saturated engine.

A request is *simple* if it is of a recognised kind whose answer is short (cheap on any engine) and easy (a smaller
model gets it right), and if its words ask for nothing more. All other requests are complex: a complex request answered
by a small model costs the user more than a simple one that waits. `python -m bench.classifier` measures the rules, and
the scores that were tried in their place.
"""

from __future__ import annotations

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
_READ_CHARS = 1200
_MANY_PARTS = 64


class Verdict(NamedTuple):
    """The result of triage: the class, its reason, and whether it is certain.

    A verdict that is not certain is complex.
    """

    task: Task
    reason: str
    certain: bool


class _Sign(NamedTuple):
    """One row of the table of signs.

    Attributes:
        reason: to give.
        most: how many hits a simple request may have.
        certain: whether more hits leave no doubt that the request is complex.
    """

    reason: str
    most: int = 0
    certain: bool = True


# The signs of a long or hard answer. The first one that a request shows is its reason.
_SIGNS = {
    "code": _Sign("asks for code"),
    "mathematics": _Sign("asks for mathematics"),
    "composition": _Sign("asks for a text to be written"),
    "reasoning": _Sign("asks for reasoning"),
    "explanation": _Sign("asks for an explanation"),
    "planning": _Sign("asks for a plan"),
    "thoroughness": _Sign("asks for a long answer"),
    "amount": _Sign("asks for a long answer"),
    "judgement": _Sign("asks for a judgement"),
    "more_questions": _Sign("has several parts"),
    "listed": _Sign("has several parts", most=1),
    "symbols": _Sign("symbols to reason with", most=3),
    "numbers": _Sign("numbers to reason with", most=3),
    "large_numbers": _Sign("numbers to reason with"),
    "supposition": _Sign("has conditions", certain=False),
    "abstraction": _Sign("an abstract subject", certain=False),
    "choices": _Sign("a choice between options", certain=False),
    "conjunction": _Sign("has several parts", certain=False),
    "negation": _Sign("has conditions", most=1, certain=False),
    "personal": _Sign("asks for a judgement", certain=False),
}

# The signs that belong to a kind's own wording, or to the text that it works on.
_OF_DATA = frozenset({"supposition", "abstraction", "conjunction", "negation", "personal"})
_OF_A_SUM = frozenset({"symbols", "numbers"})
# The recognised kinds of simple requests, each with the signs that do not speak against it.
KINDS = {
    "greeting": frozenset({"judgement", "personal"}),
    "small sum": _OF_A_SUM,
    "unit conversion": _OF_A_SUM,
    "short translation": _OF_DATA,
    "small edit": _OF_DATA,
    "short classification": _OF_DATA,
    "short extraction": _OF_DATA,
    "one-word answer": frozenset({"abstraction"}),
    "question on a short text": _OF_DATA,
    "short factual question": frozenset[str](),
}


def classify(request: Request, hint: Task | None) -> Verdict:
    """The class of a request, from the caller's hint, else from its form, else from its kind and its words.

    The caller's hint wins. If the request itself leads to the same class, the reason is the request's own.

    It never raises. Its time does not grow with the request beyond some thousand characters.

    Args:
        request: the decoded request.
        hint: the class in the subject or in `Llm-Task`. None and `UNTRIAGED` mean none.
    """
    own = _own(request)
    if hint is Task.SIMPLE or hint is Task.COMPLEX:
        reason = own.reason if own.task is hint else f"caller said {hint}"
        return Verdict(hint, reason, certain=True)
    return own


def _own(request: Request) -> Verdict:
    """The class by the request itself."""
    if isinstance(request, EmbeddingRequest):
        return Verdict(Task.SIMPLE, "embeddings", certain=True)
    if fact := _hard_fact(request):
        return Verdict(Task.COMPLEX, fact, certain=True)
    return _read(request)


def _hard_fact(request: ChatRequest) -> str:
    """The reason why a request is complex regardless of its words, or `""`."""
    if request.tools and request.tool_choice != "none":
        return "tools offered"
    if request.constraint is not None:
        return "structured output asked for"
    if request.exact:
        return "exact text asked for"
    if request.logit_bias or request.alternatives is not None or request.needs_ollama:
        return "needs what one engine has"
    if (request.stated_limit or 0) > LONG_ANSWER_TOKENS:
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
    signs["choices"] = lexical.offers_choices(asked)  # the data of a job too
    signs["more_questions"] = max(0.0, signs["questions"] - 1)
    own = KINDS.get(kind, frozenset())
    shown = [sign for name, sign in _SIGNS.items() if name not in own and signs.get(name, 0.0) > sign.most]
    if shown:
        return Verdict(Task.COMPLEX, shown[0].reason, certain=any(sign.certain for sign in shown))
    if kind:
        return Verdict(Task.SIMPLE, kind, certain=True)
    if len(asked) > lexical.SHORT_CHARS:
        return Verdict(Task.COMPLEX, "long prompt", certain=True)
    return Verdict(Task.COMPLEX, "no recognised kind", certain=False)


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
    """A request in the router. `mlx_may` and `ollama_may`: the engine has its model, and can do what it asks for.
    `moved`: it was moved before.
    """

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
        return Decision(Outcome.COMPLEX, "only mlx can answer it")
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
