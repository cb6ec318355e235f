"""The lines of a batch: cut, checked, counted."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import batch_lines
from pipeline.core.batch_lines import MOST_FAULTS, Checking, Cutter, LinesEnded, read_line
from pipeline.wire.batches import RequestCounts, window_s

CHAT = "/v1/chat/completions"


def line(custom_id="a", method="POST", url=CHAT, body=None, **more) -> bytes:
    fields = {"custom_id": custom_id, "method": method, "url": url, "body": body or {"messages": []}}
    return json.dumps(fields | more).encode()


def cut(pieces, limit=1000):
    cutter = Cutter(limit)
    return [found for piece in pieces for found in cutter.feed(piece)] + list(cutter.end())


def checked(*lines):
    checking = Checking(CHAT, 1000)
    for number, data in enumerate(lines, start=1):
        if not checking.add(number, data):
            break
    checking.end()
    return checking


@given(st.lists(st.text(alphabet="ab \r\n", max_size=8), max_size=8))
def test_however_a_file_is_cut_into_pieces_its_lines_are_the_same(pieces):
    whole = "".join(pieces)
    expected = [(n, text.strip().encode()) for n, text in enumerate(whole.split("\n"), start=1) if text.strip()]
    assert cut([piece.encode() for piece in pieces]) == expected


def test_an_endless_line_is_cut_and_not_kept():
    cutter = Cutter(10)
    for _ in range(50):
        assert list(cutter.feed(b"x" * 10_000)) == []
    ((number, data),) = cutter.end()
    assert (number, len(data)) == (1, batch_lines.longest_line(10) + 1)


def test_a_line_that_was_cut_is_too_large_and_not_called_malformed():
    longest, empty = batch_lines.longest_line(1000), len(line("a", body={"x": ""}))
    lines = [line(name, body={"x": "y" * (longest + more - empty)}) for name, more in (("a", 0), ("b", 1), ("c", 1000))]
    ((_, second), (_, third)) = cut([lines[1] + b"\n" + lines[2]])
    checking = checked(lines[0], second, third)
    assert [(fault.line, fault.code) for fault in checking.faults] == [
        (2, "request_too_large"),
        (3, "request_too_large"),
    ]


def test_half_a_character_in_a_line_is_replaced_as_in_a_call():
    halves = line("a\ud83d", body={"prompt": "\udc00"})
    assert b"\\ud83d" in halves
    assert checked(halves).faults == []
    read = read_line(halves)
    assert (read.custom_id, json.loads(bytes(read.body))) == ("a\ufffd", {"prompt": "\ufffd"})
    assert read_line(halves.replace(b'"POST"', b"5")).param == "method"


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        (b"nonsense", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (b"[1]", "invalid_request", None),
        (b'{"custom_id": "b"}', "missing_required_parameter", "method"),
        (line("b", body=[1]), "invalid_request", "body"),
        (
            b'{"custom_id": 1, "method": "POST", "url": "/v1/chat/completions", "body": {}}',
            "invalid_request",
            "custom_id",
        ),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("b", method="GET"), "invalid_method", "method"),
        (line("b", url="/v1/embeddings"), "invalid_url", "url"),
        (line("a"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_a_bad_line_is_named(data, code, param):
    (fault,) = checked(line("a"), data, line("c")).faults
    assert (fault.line, fault.code, fault.param) == (2, code, param)


def test_a_field_of_another_type_is_named_in_a_sentence():
    (fault,) = checked(b'{"custom_id": 1, "method": "POST", "url": "/v1/chat/completions", "body": {}}').faults
    assert fault.message == "`custom_id` must be a string, not 1."


def test_a_file_without_lines_is_named():
    assert [fault.code for fault in checked().faults] == ["empty_file"]


def test_a_file_with_too_many_lines_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(batch_lines, "MAX_LINES", 2)
    checking = checked(*(line(str(number)) for number in range(9)))
    assert [(fault.code, fault.line) for fault in checking.faults] == [("too_many_requests", 3)]
    assert checking.lines == 3


def test_only_the_first_faults_are_shown():
    assert len(checked(*[b"nonsense"] * (MOST_FAULTS + 50)).faults) == MOST_FAULTS


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans())))
def test_each_line_counts_once(ended):
    ledger, first = LinesEnded(60), {}
    for number, failed in ended:
        assert ledger.add(number, failed=failed) is (number not in first)
        first.setdefault(number, failed)
    assert [ledger.has(number) for number in range(70)] == [number in first for number in range(70)]
    failed = sum(first.values())
    assert ledger.counts == RequestCounts(60, len(first) - failed, failed)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("24h", 86400), ("30m", 1800), ("7d", 604800), ("5s", 5), ("8d", None), ("0h", None), ("h", None), ("1w", None)],
)
def test_a_completion_window_is_a_number_and_a_unit(text, seconds):
    assert window_s(text) == seconds
