"""Which requests are simple, and which of them are spilled under saturation."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.triage import KINDS, Outcome, Room, Verdict, Waiting, classify, spill
from pipeline.wire.constraints import ResponseFormat
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots
from pipeline.wire.requests import (
    ChatMessage,
    ChatRequest,
    ContentPart,
    EmbeddingRequest,
    FunctionSpec,
    Tool,
)
from pipeline.wire.subjects import Priority, Task

LABELLED = [
    json.loads(line) for line in (Path(__file__).parents[2] / "data" / "triage_prompts.jsonl").read_text().splitlines()
]
CAPITAL = "What is the capital of France?"
WORDS = st.sampled_from(
    ["hello", "what is the", "capital", "докажи", "переведи:", "2+2", "why", "?", "one word", "\n", "«код»", "```", "i"]
)
TEXTS = st.text(max_size=60) | st.lists(WORDS, max_size=12).map(" ".join)
CONTENTS = TEXTS | st.none() | st.lists(st.builds(ContentPart, type=st.sampled_from(["text", "image"]), text=TEXTS))
MESSAGES = st.builds(
    ChatMessage, role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]), content=CONTENTS
)
LIMITS = st.none() | st.integers(1, 5000)
REQUESTS = st.builds(ChatRequest, prompt=TEXTS, max_tokens=LIMITS) | st.builds(
    ChatRequest, messages=st.lists(MESSAGES, max_size=12), max_tokens=LIMITS
)


def task_of(prompt, **parameters):
    return classify(ChatRequest(prompt=prompt, **parameters), None).task


def request_of(row):
    return msgspec.convert({key: row[key] for key in ("prompt", "messages") if key in row}, ChatRequest)


# ---- the class of a request ------------------------------------------------------------------------------------------


def test_no_labelled_complex_prompt_passes_for_simple():
    wrong = [row for row in LABELLED if row["task"] == "complex" and classify(request_of(row), None).task == "simple"]
    assert wrong == []


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_most_labelled_simple_prompts_are_found(lang):
    simple = [row for row in LABELLED if row["task"] == "simple" and row["lang"] == lang]
    found = [row for row in simple if classify(request_of(row), None).task is Task.SIMPLE]
    assert len(simple) > 60
    assert len(found) / len(simple) >= 0.9


KIND_EXAMPLES = {
    "greeting": ("Good evening!", "Добрый вечер!"),
    "small sum": ("What is 7 + 5?", "Сколько будет 7 плюс 5?"),
    "unit conversion": ("Convert 3 miles to kilometres.", "Переведи 3 мили в километры."),
    "short translation": ('Translate "good night" to Finnish.', "Переведи на английский: «доброй ночи»"),
    "small edit": ("What is the plural of goose?", "Исправь ошибки: «карова»"),
    "short classification": ('Is this spam: "you have won"?', "Это спам: «вы выиграли»?"),
    "short extraction": ('Extract the name: "Ann came in."', "Извлеки имя: «Анна пришла»."),
    "one-word answer": ("Answer yes or no, is it Monday?", "Ответь да или нет: сегодня понедельник?"),
    "question on a short text": (
        "Context: shops open at nine. Question: when do shops open?",
        "Текст: магазин открыт с девяти. Когда открывается магазин?",
    ),
    "short factual question": (CAPITAL, "Какая столица Франции?"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_recognised_in_both_languages_and_named_as_the_reason(kind):
    for prompt in KIND_EXAMPLES[kind]:
        assert classify(ChatRequest(prompt=prompt), None) == (Task.SIMPLE, kind, True)


DEMANDS = {
    "asks for code": ("in Python", "на питоне"),
    "asks for mathematics": ("with a proof of the theorem", "с доказательством теоремы"),
    "asks for a text to be written": ("and write an essay", "и напиши эссе"),
    "asks for reasoning": ("and compare them", "и сравни их"),
    "asks for an explanation": ("and explain", "и объясни"),
    "asks for a plan": ("and design it", "и распиши план"),
    "asks for a long answer": ("in detail", "подробно"),
}


@pytest.mark.parametrize("reason", DEMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sign_of_a_hard_or_long_answer_outweighs_every_kind(kind, reason):
    for prompt, more in zip(KIND_EXAMPLES[kind], DEMANDS[reason], strict=True):
        assert task_of(f"{more}, {prompt}") is Task.COMPLEX


def test_a_choice_between_options_is_of_no_simple_kind():
    options = "\nA. one\nB. two\nC. three"
    assert task_of("Classify the subject:" + options) is Task.COMPLEX
    assert task_of(CAPITAL + options) is Task.COMPLEX


def test_labelled_prompts_are_many_and_of_many_kinds():
    assert len(LABELLED) > 400
    assert len({row["kind"] for row in LABELLED}) > 20


@given(REQUESTS, st.sampled_from([Task.SIMPLE, Task.COMPLEX]))
def test_the_callers_word_always_wins(request_, hint):
    verdict = classify(request_, hint)
    assert verdict.task is hint
    own = classify(request_, None)
    assert verdict.reason == (own.reason if own.task is hint else f"caller said {hint}")


@given(REQUESTS, st.sampled_from([None, Task.UNTRIAGED]))
def test_every_request_gets_a_class_and_a_reason(request_, hint):
    verdict = classify(request_, hint)
    assert verdict.task in (Task.SIMPLE, Task.COMPLEX)
    assert 0 < len(verdict.reason) < 40
    assert verdict.task is Task.COMPLEX or verdict.reason in KINDS
    assert verdict.certain or verdict.task is Task.COMPLEX


@given(TEXTS)
def test_code_in_the_prompt_is_never_simple(text):
    assert task_of(f"{text}\n```\nx = 1\n```") is Task.COMPLEX


@pytest.mark.parametrize(
    "more",
    ["Prove it.", "Explain why.", "Then write an essay about it.", "Think step by step.", "И докажи это.",
     "Объясни почему.", "Напиши об этом рассказ.", "Compare it with Rome.", "Сравни с Римом."],
)  # fmt: skip
@pytest.mark.parametrize("prompt", [CAPITAL, "Hi!", "2 + 2 = ?", "Переведи: да", "Какая столица Франции?", "One word:"])
def test_a_demand_added_to_a_simple_prompt_makes_it_complex(prompt, more):
    assert task_of(f"{more} {prompt}") is Task.COMPLEX
    if ":" not in prompt:
        assert task_of(f"{prompt} {more}") is Task.COMPLEX


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"tools": [Tool(function=FunctionSpec("f"))]}, "tools offered"),
        ({"response_format": ResponseFormat("json_object")}, "structured output asked for"),
        ({"exact": True}, "exact text asked for"),
        ({"logprobs": True}, "needs what one engine has"),
        ({"logit_bias": {"1": 1.0}}, "needs what one engine has"),
        ({"suffix": "x"}, "needs what one engine has"),
        ({"max_tokens": 4096}, "long answer allowed"),
        ({"max_completion_tokens": 4096}, "long answer allowed"),
    ],
)
def test_form_alone_can_make_a_request_complex(parameters, reason):
    verdict = classify(ChatRequest(prompt=CAPITAL, **parameters), None)
    assert (verdict.task, verdict.reason, verdict.certain) == (Task.COMPLEX, reason, True)


def test_tools_that_may_not_be_used_do_not_count():
    assert task_of(CAPITAL, tools=[Tool(function=FunctionSpec("f"))], tool_choice="none") is Task.SIMPLE


def turns(*pairs):
    return ChatRequest(messages=[ChatMessage(role=role, content=content) for role, content in pairs])


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (turns(*[("user", "hi"), ("assistant", "hello")] * 5, ("user", CAPITAL)), "long conversation"),
        (turns(("user", "a" * 1900), ("assistant", "b" * 5000), ("user", CAPITAL)), "long conversation"),
        (turns(("system", "s" * 1600), ("user", CAPITAL)), "long system prompt"),
        (turns(("user", CAPITAL), ("tool", "Paris"), ("user", CAPITAL)), "tools used before"),
        (turns(("user", CAPITAL), ("assistant", "Well,")), "no question at the end"),
        (ChatRequest(messages=[]), "no question at the end"),
        (ChatRequest(prompt=CAPITAL + " x" * 2000), "long prompt"),
        (ChatRequest(prompt="Write an essay about Paris."), "asks for a text to be written"),
        (ChatRequest(prompt="Докажи теорему Пифагора."), "asks for mathematics"),
        (ChatRequest(prompt="Hm."), "no recognised kind"),
        (ChatRequest(prompt="Hm, well. " * 90), "long prompt"),
    ],
)
def test_the_reason_names_the_strongest_sign(request_, reason):
    assert classify(request_, None)[:2] == (Task.COMPLEX, reason)


def test_a_doubtful_prompt_is_complex_and_not_certain():
    verdict = classify(ChatRequest(prompt="Are tomatoes fruits?"), None)
    assert (verdict.task, verdict.certain) == (Task.COMPLEX, False)


def test_a_clear_case_is_certain():
    assert classify(ChatRequest(prompt="Prove that the derivative of x^2 is 2x, step by step."), None).certain


@pytest.mark.parametrize("hostile", ["«" * 1_000_000, '"' * 1999, " " * 1999, ". " * 900, "a? " * 600, "ли " * 600])
def test_no_text_is_expensive_to_read(hostile):
    """Compares processor time with that of a plain question, in the best of five pairs."""

    def cost(prompt):
        start = time.process_time()
        for _ in range(20):
            classify(ChatRequest(prompt=prompt), None)
        return time.process_time() - start

    assert min(cost(hostile) / cost(CAPITAL) for _ in range(5)) < 60


def test_very_many_parts_are_not_read():
    parts = [ContentPart("text", "x")] * 100_000
    assert classify(ChatRequest(messages=[ChatMessage(role="user", content=parts)]), None).reason == "long prompt"


def test_embeddings_are_simple_for_any_text():
    verdict = classify(EmbeddingRequest(["Prove that there are infinitely many primes.", "x"]), None)
    assert (verdict.task, verdict.reason, verdict.certain) == (Task.SIMPLE, "embeddings", True)


# ---- spill -----------------------------------------------------------------------------------------------------------

SIMPLE = Verdict(Task.SIMPLE, "short factual question", certain=True)
COMPLEX = Verdict(Task.COMPLEX, "asks for code", certain=True)
ROOM = Room(healthy=True, free=2, answer_ms=800.0)


def load(level="saturated", **wait_ms):
    waits = PerPriority(**({"high": 900, "medium": 2000, "low": 9000} | wait_ms))
    available = level != "away"
    level = level if available else "normal"
    return Load("mlx", level, 1.2, waits, PerPriorityCount(), Slots(8, 8), 400.0, "slots", 0.0, available)


def waiting(verdict=SIMPLE, priority=Priority.MEDIUM, *, ollama_may=True, mlx_may=True, moved=False):
    return Waiting(verdict, priority, ollama_may, mlx_may, moved)


@pytest.mark.parametrize(
    ("request_", "load_", "room", "outcome", "reason"),
    [
        (waiting(), load(), ROOM, Outcome.SPILL, "mlx is saturated: short factual question"),
        (waiting(), load("away"), ROOM, Outcome.SPILL, "mlx is away: short factual question"),
        (waiting(), None, ROOM, Outcome.LEAVE, "mlx is not known to be saturated"),
        (waiting(), load("busy"), ROOM, Outcome.LEAVE, "mlx is not known to be saturated"),
        (waiting(COMPLEX), load("normal"), ROOM, Outcome.LEAVE, "mlx is not known to be saturated"),
        (waiting(COMPLEX), load(), ROOM, Outcome.COMPLEX, "asks for code"),
        (waiting(COMPLEX, moved=True), load(), ROOM, Outcome.LEAVE, "moved before"),
        (waiting(moved=True), load(), ROOM, Outcome.LEAVE, "moved before"),
        (waiting(ollama_may=False), load(), ROOM, Outcome.COMPLEX, "only mlx can answer it"),
        (waiting(ollama_may=False, mlx_may=False), load(), ROOM, Outcome.COMPLEX, None),
        (waiting(COMPLEX, mlx_may=False), load(), ROOM, Outcome.SPILL, "only ollama has its model"),
        (waiting(mlx_may=False), load(medium=1), Room(True, 0, 1.0), Outcome.SPILL, "only ollama has its model"),
        (waiting(COMPLEX, mlx_may=False), load(), Room(False, 2, 1.0), Outcome.LEAVE, "ollama is away"),
        (waiting(mlx_may=False, moved=True), load(), ROOM, Outcome.LEAVE, "moved before"),
        (waiting(), load(), Room(False, 2, 1.0), Outcome.LEAVE, "ollama is away"),
        (waiting(), load(), Room(True, 0, 1.0), Outcome.LEAVE, "ollama is full"),
        (waiting(), load(medium=800), ROOM, Outcome.LEAVE, "mlx would answer sooner"),
        (waiting(priority=Priority.LOW), load(medium=1), ROOM, Outcome.SPILL, None),
        (waiting(priority=Priority.HIGH), load(high=1), ROOM, Outcome.LEAVE, "mlx would answer sooner"),
    ],
)
def test_spill(request_, load_, room, outcome, reason):
    decision = spill(request_, load_, room)
    assert decision.outcome is outcome
    assert reason is None or decision.reason == reason


@given(
    st.builds(Waiting, st.sampled_from([SIMPLE, COMPLEX]), st.sampled_from(Priority), *[st.booleans()] * 3),
    st.sampled_from(["normal", "busy", "saturated"]),
    st.builds(Room, st.booleans(), st.integers(-1, 3), st.floats(0, 20_000)),
)
def test_nothing_is_spilled_but_what_is_simple_allowed_and_sooner_answered(request_, level, room):
    decision = spill(request_, load(level), room)
    if decision.outcome is Outcome.SPILL:
        assert request_.ollama_may
        assert not request_.moved
        assert level == "saturated"
        assert room.healthy
    if decision.outcome is Outcome.SPILL and request_.mlx_may:
        assert request_.verdict.task is Task.SIMPLE
        assert room.free > 0
        assert room.answer_ms < load().predicted_wait_ms.of(request_.priority)
    assert decision.reason
