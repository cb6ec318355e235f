"""From tokens to text, compared with an offline computation for any text, chunks and stops."""

import codecs
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.engines.local.child.calls.answer import AnswerCalls
from consumers.engines.local.child.calls.formats import CallFormat
from consumers.engines.local.child.calls.objects import read_objects
from consumers.engines.local.child.calls.stream import Section, SectionSplitter
from consumers.engines.local.child.separator import ThinkSeparator
from consumers.engines.local.child.transcript import StopMatcher, Transcript
from pipeline.engine import Piece
from pipeline.wire.answers import CompletionDetails, FunctionCall, TokenScore, ToolCall, Usage, add_call

END = 256
SILENT = 257


class Bytes:
    """A detokenizer whose tokens are bytes: characters of up to four tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def transcript(**options) -> Transcript:
    settings = {"prompt_tokens": 5, "max_tokens": 10_000, "detokenizer": Bytes()}
    return Transcript(**settings | {"end_tokens": {END}, "silent_tokens": {SILENT}} | options)


def fed(answer: Transcript, tokens: list[int]) -> list[Piece]:
    pieces = []
    for token in tokens:
        pieces.append(answer.feed(token))
        if pieces[-1].finish_reason:
            break
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def cut_offline(text: str, stops: list[str]) -> str:
    """At the stop that is complete first; of two complete at once, at the longer."""
    complete = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(complete)[1]] if complete else text


letters = st.text("abc", max_size=40)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@st.composite
def chunked(draw, texts=letters):
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@given(chunked(), stops)
def test_stops_cut_the_same_text_however_it_is_chunked(chunks, stops):
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(chunk) for chunk in chunks)
    text += matcher.flush()
    assert text == cut_offline("".join(chunks), stops)


def test_the_last_piece_names_the_stop_string_that_ended_it_also_after_a_replay():
    tokens = list(b"one two three")
    pieces = fed(transcript(stops=["three", "two", "wo"]), tokens)
    assert (pieces[-1].finish_reason, pieces[-1].stop) == ("stop", "two")
    assert {piece.stop for piece in pieces[:-1]} == {""}
    assert transcript(stops=["two"]).replay(tokens).stop == "two"
    assert fed(transcript(stops=["two"]), [*b"one", END])[-1].stop == ""


@given(chunked(), stops)
def test_what_came_out_never_has_to_be_taken_back(chunks, stops):
    matcher, shown = StopMatcher(stops), ""
    whole = cut_offline("".join(chunks), stops)
    for chunk in chunks:
        shown += matcher.push(chunk)
        assert whole.startswith(shown)


def test_text_that_cannot_become_a_stop_is_not_held_back():
    matcher = StopMatcher(["abcd"])
    assert matcher.push("xxab") == "xx"
    assert matcher.push("x") == "abx"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(1, 120))
def test_an_answer_is_the_offline_text_whatever_its_characters(text, stops, limit):
    tokens = [*text.encode(), END][:limit]
    pieces = fed(transcript(stops=stops, max_tokens=limit), tokens)
    offline = bytes(token for token in tokens if token != END).decode(errors="replace")
    assert text_of(pieces) == cut_offline(offline, stops)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@given(st.text(max_size=20))
def test_no_piece_ends_within_a_character(text):
    assert "\ufffd" not in text_of(fed(transcript(), [*text.replace("\ufffd", "").encode(), END]))


@given(
    st.text("ab{}<t>/", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=3), max_size=2),
    st.integers(0, 40),
    st.booleans(),
)
def test_an_answer_can_go_on_at_any_token(text, stops, cut, with_tools):
    tokens = [*text.encode(), END]
    whole = fed(transcript(stops=stops, calls=calls_of() if with_tools else None), tokens)
    before, after = whole[:cut], whole[cut:]
    calls = calls_of() if with_tools else None
    resumed = transcript(stops=stops, calls=calls, resume_chars=len(text_of(before)))
    replayed = resumed.replay(tokens[: len(before)])
    rest = [] if replayed.finish_reason else fed(resumed, tokens[len(before) :])
    assert replayed.text == ""
    assert replayed.token_ids == []
    assert rest == after
    assert (rest or [replayed])[-1].usage == whole[-1].usage


def test_text_that_the_reader_lacks_comes_with_the_replay():
    resumed = transcript(resume_chars=2)
    assert resumed.replay(list(b"abcd")).text == "cd"


def test_the_end_of_a_turn_counts_and_has_no_text():
    (last,) = fed(transcript(), [END])
    assert (last.text, last.finish_reason, last.token_ids) == ("", "stop", [END])
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (5, 1, 6)


def test_silent_tokens_count_and_have_no_text():
    pieces = fed(transcript(), [97, SILENT, 98, END])
    assert text_of(pieces) == "ab"
    assert pieces[-1].usage.completion_tokens == 4


def test_an_end_that_is_also_the_limit_is_a_stop():
    assert fed(transcript(max_tokens=1), [END])[-1].finish_reason == "stop"
    assert fed(transcript(max_tokens=1), [97])[-1].finish_reason == "length"


def test_a_character_cut_off_by_the_limit_is_replaced():
    assert text_of(fed(transcript(max_tokens=3), list("a€".encode()))) == "a\ufffd"


# ---- tool calls ------------------------------------------------------------------------------------------------------

SECTION = Section("<t>", "</t>", read_objects)
CALL = '<t>{"name": "f", "arguments": {"x": 1}}</t>'


def calls_of() -> AnswerCalls:
    return AnswerCalls(CallFormat("test", lambda _: [SECTION]), [], "r1")


def joined(parts: list[ToolCall]) -> list[ToolCall]:
    """The calls of which these are the parts."""
    calls: list[ToolCall] = []
    for part in parts:
        add_call(calls, part)
    return calls


def called(text: str, **options) -> tuple[str, list[FunctionCall], str]:
    pieces = fed(transcript(calls=calls_of(), **options), [*text.encode(), END])
    calls = joined([part for piece in pieces for part in piece.tool_calls])
    return text_of(pieces), [call.function for call in calls], pieces[-1].finish_reason


def test_a_call_is_taken_out_of_the_text():
    assert called(f"Let me see. {CALL}") == ("Let me see. ", [FunctionCall("f", '{"x": 1}')], "tool_calls")


def test_white_space_between_calls_is_no_text():
    text, calls, _ = called(f"{CALL}\n{CALL}\n")
    assert text == ""
    assert len(calls) == 2


def test_calls_have_ids_of_their_own_that_do_not_change():
    ids = [
        [
            call.id
            for piece in fed(transcript(calls=calls_of()), [*(CALL + CALL).encode(), END])
            for call in piece.tool_calls
            if call.begins
        ]
        for _ in range(2)
    ]
    assert len(set(ids[0])) == 2
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    "text",
    [
        "<t>not json</t>",
        '<t>{"name": "f"',
        '<t>{"name": 3, "arguments": {}}</t>',
        "<t>[]</t>",
        "a < t <t",
        "</t>",
    ],
)
def test_a_malformed_call_stays_text(text):
    assert called(text) == (text, [], "stop")


def test_a_call_whose_end_the_model_left_out_is_a_call():
    assert called(CALL.removesuffix("</t>"))[1] == [FunctionCall("f", '{"x": 1}')]


def test_a_call_without_arguments_has_none():
    assert called('<t>{"name": "f"}</t>')[1] == [FunctionCall("f", "{}")]


def test_several_calls_between_one_pair_of_markers():
    call = {"name": "f", "arguments": '{"x": "я"}'}
    assert called(f"<t>{json.dumps([call, call])}</t>")[1] == [FunctionCall("f", '{"x": "я"}')] * 2


def test_an_answer_cut_off_by_its_limit_is_no_call_though_it_has_some():
    tokens = [*CALL.encode(), 97]
    pieces = fed(transcript(calls=calls_of(), max_tokens=len(tokens)), tokens)
    assert pieces[-1].finish_reason == "length"


def test_a_stop_within_a_call_ends_the_answer():
    text, calls, reason = called(CALL, stops=["arguments"])
    assert (text, calls, reason) == ('<t>{"name": "f", "', [], "stop")


def test_markers_are_text_where_no_tools_were_offered():
    assert text_of(fed(transcript(), [*CALL.encode(), END])) == CALL


@given(chunked(st.text('<t>/"{}ab ', max_size=40)))
def test_text_with_markers_comes_out_the_same_however_it_is_chunked(chunks):
    def split(parts):
        splitter = SectionSplitter([SECTION], lambda _: "c")
        texts, calls = [], list[ToolCall]()
        for part in parts:
            text, found = splitter.push(part)
            texts.append(text)
            calls += found
        text, found = splitter.flush()
        return "".join(texts) + text, joined(calls + found)

    assert split(chunks) == split(["".join(chunks)])


# ---- reasoning


def thinking(**options) -> Transcript:
    return transcript(separator=ThinkSeparator("<r>", "</r>"), **options)


def thought_of(pieces: list[Piece]) -> str:
    return "".join(piece.reasoning for piece in pieces)


@given(
    st.lists(st.sampled_from(["<r>", "</r>", "a", "b", " ", "<", "/"]), max_size=20).map("".join),
    st.lists(st.text("ab", min_size=1, max_size=2), max_size=1),
    st.integers(0, 60),
)
def test_an_answer_with_reasoning_can_go_on_at_any_token(text, stops, cut):
    tokens = [*text.encode(), END]
    whole = fed(thinking(stops=stops), tokens)
    before, after = whole[:cut], whole[cut:]
    had = {"resume_chars": len(text_of(before)), "resume_reasoning_chars": len(thought_of(before))}
    resumed = thinking(stops=stops, **had)
    replayed = resumed.replay(tokens[: len(before)])
    rest = [] if replayed.finish_reason else fed(resumed, tokens[len(before) :])
    assert (replayed.text, replayed.reasoning) == ("", "")
    assert rest == after
    assert (rest or [replayed])[-1].usage == whole[-1].usage


def test_reasoning_that_the_reader_lacks_comes_with_the_replay():
    replayed = thinking(resume_reasoning_chars=1).replay(list(b"<r>abc</r>de"))
    assert (replayed.reasoning, replayed.text) == ("bc", "de")


def test_a_mark_of_a_call_in_reasoning_is_no_call():
    pieces = fed(thinking(calls=calls_of()), [*b'<r><t>{"name": "g"}</t></r>ok', END])
    assert not any(piece.tool_calls for piece in pieces)
    assert text_of(pieces) == "ok"


def test_the_tokens_of_reasoning_and_of_its_marks_are_counted_apart():
    pieces = fed(thinking(), [*b"a<r>bcd</r>ef", END])
    # Of the first mark, its last token is the one that begins the reasoning.
    assert pieces[-1].usage == Usage(5, 14, 19, completion_tokens_details=CompletionDetails(1 + 3 + 4))
    assert fed(transcript(), [*b"a", END])[-1].usage == Usage(5, 2, 7)


def test_tokens_of_reasoning_have_no_scores():
    answer = thinking()
    answer.score = lambda token: TokenScore(chr(token), -1.0)
    pieces = fed(answer, [*b"<r>b</r>ef", END])
    assert "".join(score.token for piece in pieces for score in piece.scores)[-2:] == "ef"
    assert "b" not in [score.token for piece in pieces for score in piece.scores]
