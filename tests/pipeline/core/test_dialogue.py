"""Conversations in the forms that strict chat templates take."""

import pytest

from pipeline.core.dialogue import BEGINNING, as_plain_text, is_kept, unfinished, variants

S, U, A, T = "system", "user", "assistant", "tool"


def turns(*given):
    return [{"role": role, "content": text} for role, text in given]


def forms(*given):
    return [[(turn["role"], turn["content"]) for turn in variant.turns] for variant in variants(turns(*given))]


def alternates(roles):
    return all(role == (U, A)[at % 2] for at, role in enumerate(roles))


def test_a_conversation_that_every_template_takes_has_one_form():
    assert forms((U, "a"), (A, "b"), (U, "c")) == [[(U, "a"), (A, "b"), (U, "c")]]


def test_the_mildest_change_comes_first():
    first, merged, folded = forms((S, "be brief"), (U, "a"), (U, "b"))
    assert first == [(S, "be brief"), (U, "a"), (U, "b")]
    assert merged == [(S, "be brief"), (U, "a\n\nb")]
    assert folded == [(U, "be brief\n\na\n\nb")]


def test_a_later_system_message_becomes_the_users_where_it_stands():
    assert forms((S, "x"), (U, "a"), (A, "b"), (S, "now in French"), (U, "c"))[1] == [
        (S, "x"),
        (U, "a"),
        (A, "b"),
        (U, "now in French\n\nc"),
    ]


def test_two_system_messages_at_the_beginning_are_one():
    assert forms((S, "x"), (S, "y"), (U, "a"))[1] == [(S, "x\n\ny"), (U, "a")]


def test_an_assistant_that_begins_gets_a_user_before_it():
    assert [(U, BEGINNING), (A, "hello"), (U, "a")] in forms((A, "hello"), (U, "a"))
    assert forms((S, "x"), (A, "hello"), (U, "a"))[1:] == [
        [(S, "x"), (U, BEGINNING), (A, "hello"), (U, "a")],
        [(U, "x"), (A, "hello"), (U, "a")],
    ]


@pytest.mark.parametrize(
    "given",
    [
        [(S, "1"), (U, "2")],
        [(S, "1"), (A, "2"), (U, "3")],
        [(A, "1"), (A, "2"), (S, "3"), (U, "4"), (U, "5"), (A, "6")],
        [(S, "1"), (S, "2"), (A, "3"), (S, "4")],
        [(S, "1")],
    ],
)
def test_the_last_form_alternates_and_loses_nothing(given):
    last = forms(*given)[-1]
    assert alternates([role for role, _ in last])
    whole = "".join(text for _, text in last)
    assert all(text in whole for _, text in given)


def test_every_change_is_noted_once():
    *_, last = variants(turns((A, "x"), (S, "y"), (U, "a"), (U, "b")))
    assert len(set(last.notes)) == len(last.notes) == 3
    assert [list(variant.notes) for variant in variants(turns((U, "a")))] == [[]]


def test_results_of_tools_stay_apart_and_calls_are_kept():
    call = {"id": "1", "function": {"name": "f"}}
    given = [
        {"role": U, "content": "a"},
        {"role": A, "content": "let me see"},
        {"role": A, "content": "", "tool_calls": [call]},
        {"role": T, "content": "1", "tool_call_id": "1"},
        {"role": T, "content": "2", "tool_call_id": "2"},
    ]
    merged = list(variants(given))[1].turns
    assert merged == [given[0], {"role": A, "content": "let me see", "tool_calls": [call]}, *given[3:]]


def test_an_unfinished_answer_is_the_assistants_text_at_the_end():
    assert unfinished(turns((U, "a"), (A, "It is"))) == "It is"
    assert unfinished(turns((U, "a"))) == unfinished(turns((U, "a"), (A, ""))) == ""
    assert unfinished([{"role": A, "content": "x", "tool_calls": [1]}]) == ""


def test_a_dropped_system_message_is_found():
    given = turns((S, "Be  brief.\n"), (U, "a"))
    assert is_kept(given, "<s>Be brief. a")
    assert not is_kept(given, "<s>a")


def test_plain_text_for_a_model_without_a_template():
    assert as_plain_text(turns((U, "Once upon"))) == "Once upon"
    assert as_plain_text(turns((S, "Be brief."), (U, "a"))) == "Be brief.\n\nUser: a\n\nAssistant:"
    assert as_plain_text(turns((U, "a"), (A, "It is"))) == "User: a\n\nAssistant: It is"
