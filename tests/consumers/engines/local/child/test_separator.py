"""Reasoning, answer and calls in the text of a model."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.engines.local.child.separator import HARMONY_MARKS, HarmonySeparator, Separator, ThinkSeparator

HARMONY_SAID = (
    "<|channel|>analysis<|message|>Hmm. <b>\n<|end|><|start|>assistant<|channel|>analysis<|message|>More.<|end|>"
    "<|start|>assistant<|channel|>commentary<|message|>I look it up.<|end|>"
    '<|start|>assistant to=functions.get<|channel|>commentary <|constrain|>json<|message|>{"a": "<"}<|call|>'
    "<|start|>assistant<|channel|>final<|message|> It is 4 <|"
)
CALL = '<|channel|>commentary to=functions.get<|message|>{"a": "<"}<|call|>'


def think(**options) -> ThinkSeparator:
    return ThinkSeparator("<think>", "</think>", **options)


def separated(separator: Separator, chunks: list[str]) -> tuple[str, str]:
    """The reasoning, and the rest with calls in their place."""
    parts = [part for chunk in chunks for part in separator.push(chunk)] + separator.flush()
    reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
    return reasoning, "".join(part.text for part in parts if part.kind != "reasoning")


@pytest.mark.parametrize(
    ("said", "opened", "reasoning", "answer"),
    [
        ("<think>\nHmm.\n</think>\n\nFour.\n", False, "Hmm.", "Four.\n"),
        ("Hmm.</think>Four.", True, "Hmm.", "Four."),
        ("\n<think>\n\n</think>\n\nFour.", False, "", "Four."),
        ("  Four.\n", False, "", "  Four.\n"),
        (" \n", False, "", " \n"),
        ("<think>Hmm, </", False, "Hmm, </", ""),
        ("Hmm.\n", True, "Hmm.", ""),
        ("<think>A</think>First.\n<think>B</think>\nThen.", False, "A\n\nB", "First.\n\n\nThen."),
        ("<thin> is no mark", False, "", "<thin> is no mark"),
        ("<think>a <think> b</think>c", False, "a <think> b", "c"),
    ],
)
def test_reasoning_stands_between_marks(said, opened, reasoning, answer):
    assert separated(think(opened=opened), [said]) == (reasoning, answer)


def test_marks_around_the_answer_are_in_no_part():
    said = ["<think>Hmm</think><answer>Four.</answer>", "<end>"]
    assert separated(think(silent=("<answer>", "</answer>", "<end>")), said) == ("Hmm", "Four.")


def test_a_message_of_each_channel_goes_where_it_belongs():
    reasoning, answer = separated(HarmonySeparator(calls=True), [HARMONY_SAID])
    assert reasoning == "Hmm. <b>\n\nMore."
    assert answer == f"I look it up.{CALL}\n\nIt is 4 <|"


def test_a_recipient_may_stand_before_or_after_the_channel():
    said = '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"a": "<"}<|call|>'
    assert separated(HarmonySeparator(calls=True), [said]) == ("", CALL)
    said = ' to=functions.get<|channel|>analysis code<|message|>{"a": "<"}'
    assert separated(HarmonySeparator(calls=True), [said]) == ("", CALL.removesuffix("<|call|>"))


def test_without_functions_a_message_to_one_is_text():
    said = " to=functions.get<|channel|>commentary<|message|>{}<|call|>"
    assert separated(HarmonySeparator(), [said]) == ("", "{}")


@pytest.mark.parametrize("said", ["Four.", "to be", "<b>", " "])
def test_text_without_a_header_is_the_answer(said):
    assert separated(HarmonySeparator(), [said]) == ("", said)


def test_an_incomplete_header_is_nothing():
    assert separated(HarmonySeparator(), ["<|channel|>analysis"]) == ("", "")


@st.composite
def chunked(draw, texts):
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    return [text[start:end] for start, end in pairwise(cuts)]


pieces = st.sampled_from(["<think>", "</think>", " ", "\n", "a", "<", "</t", "think>", "é"])
HARMONY_PIECES = [*HARMONY_MARKS, "assistant", "analysis", "final", " to=functions.f", " ", "a", "<|", "\n"]
harmony_pieces = st.sampled_from(HARMONY_PIECES)


@given(chunked(st.lists(pieces, max_size=20).map("".join)), st.booleans())
def test_the_parts_are_the_same_however_the_text_is_cut(chunks, opened):
    assert separated(think(opened=opened), chunks) == separated(think(opened=opened), ["".join(chunks)])


@given(chunked(st.lists(harmony_pieces, max_size=20).map("".join)), st.booleans())
def test_the_parts_of_messages_are_the_same_however_the_text_is_cut(chunks, calls):
    whole = separated(HarmonySeparator(calls=calls), ["".join(chunks)])
    assert separated(HarmonySeparator(calls=calls), chunks) == whole


def test_text_that_cannot_become_a_mark_comes_out_at_once():
    separator = think()
    assert [part.text for part in separator.push("a < b")] == ["a < b"]
    assert separator.push("<th") == []
    assert [part.text for part in separator.push("e")] == ["<the"]


def test_the_place_is_known_at_each_moment():
    separator = think()
    places = []
    for text in ("Hi <think>", "a", "</think>", "b"):
        separator.push(text)
        places.append(separator.place)
    assert places == ["reasoning", "reasoning", "answer", "answer"]
