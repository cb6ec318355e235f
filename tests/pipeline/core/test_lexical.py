"""The kind and the signs that are found in a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import lexical, vocabulary

PIECES = st.sampled_from(
    ["what", "is", "capital", "докажи", "«", "»", '"', "?", ". ", "\n- ", "7", "48273", "+", ":", "context", "```",
     "translate", "переведи", "спам", "one word", "İ", "\x00", "или", "—", "это", "how many "]
)  # fmt: skip
TEXTS = st.text(max_size=200) | st.lists(PIECES, max_size=80).map(" ".join)


def kind(text):
    return lexical.kind(lexical.normalize(text))


def signs(text):
    return lexical.signs(lexical.normalize(text))


def test_stems_meet_russian_endings_and_words_meet_none():
    assert signs("Сравните, проанализировав")["reasoning"] == 2
    assert "judgement" not in signs("стоитель")


def test_numbers_words_and_marks_are_counted():
    found = signs("Is 12 > 3? Or 48273. n = 4?\n- b")
    assert (found["numbers"], found["large_numbers"], found["questions"], found["listed"]) == (4, 1, 2, 1)
    assert found["symbols"] == 2
    assert found["variables"] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello!", "greeting"),
        ("Hello, prove it", ""),
        ("Добрый день", "greeting"),
        ("What is 7 + 5?", "small sum"),
        ("What is 4837 * 2934?", ""),
        ("сколько будет 2 плюс 2", "small sum"),
        ("Please, could you tell me what the capital of Peru is?", "short factual question"),
        ("Кто написал «Идиота»?", "short factual question"),
        ("Who is to blame?", ""),
        ("Translate into Finnish: good night", "short translation"),
        ("Translate the Iliad", ""),
        ("Переведи 3 мили в километры", "unit conversion"),
        ("Is this spam? 'hi'", ""),
        ('Is this spam: "hi"', "short classification"),
        ("Извлеки имя: Анна пришла", "short extraction"),
        ("The plural of goose?", "small edit"),
        ("Answer yes or no, is it Monday", "one-word answer"),
        ("Context: shops open at nine. Question: when do shops open?", "question on a short text"),
        ("Context: shops open at nine.", ""),
        ("", ""),
    ],
)
def test_kinds(text, expected):
    assert kind(text) == expected


def test_a_long_text_is_of_no_short_kind():
    assert kind("Translate: " + "word " * 500) == ""


def test_data_of_a_job_is_no_part_of_its_instruction():
    text = lexical.normalize('Translate "prove it" to French: why compare?')
    assert lexical.instruction(text, "short translation").split() == ["translate", "to", "french"]
    assert lexical.instruction(text, "") == text


@given(TEXTS)
def test_reading_never_raises_and_counts_are_no_less_than_zero(text):
    text = lexical.normalize(text)
    assert all(count >= 0 for count in lexical.signs(text).values())
    assert len(lexical.instruction(text, lexical.kind(text))) <= len(text) + 1 + text.count('"')


@given(TEXTS, TEXTS)
def test_what_is_said_twice_is_met_no_less(first, second):
    alone, together = signs(first), signs(f"{first}\n{second}")
    assert all(together.get(sign, 0) >= alone[sign] for sign in vocabulary.SIGN_WORDS if sign in alone)
