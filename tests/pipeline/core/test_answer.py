"""One delivery: the envelope, the record, the decision, and an answer that continues whichever attempt dies."""

from __future__ import annotations

import base64
import struct

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.core.answer import (
    AnswerWriter,
    Envelope,
    Record,
    cut_short,
    decide,
    error_answer,
    expired,
)
from pipeline.engine import Embedded, Piece
from pipeline.wire.answers import (
    Chunk,
    Completion,
    FunctionCall,
    Status,
    TokenScore,
    ToolCall,
    Usage,
    decode_answer,
    is_last,
)
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.requests import NO_LIMIT
from pipeline.wire.subjects import Move, Priority, Task

STORED_AT = 1_700_000_000.25
USAGE = Usage(3, 4, 7)


def envelope(**fields):
    return Envelope(
        **{
            "id": "req",
            "priority": Priority.HIGH,
            "task": Task.SIMPLE,
            "stored_at": STORED_AT,
            "delivered": 1,
            **fields,
        }
    )


def answer(record=None, *, attempt=1, now=STORED_AT + 1, **fields):
    settings_ = {"envelope": envelope(), "engine": "mlx", "model": "m", "reason": "its turn", **fields}
    return AnswerWriter(attempt=attempt, started_at=now, record=record or Record(), **settings_)


def call(name, arguments="{}"):
    return ToolCall(FunctionCall(name, arguments), id=f"call_{name}")


def stored(*messages):
    """As they come out of the stream: numbered, and encoded once."""
    return [(10 + number, decode_answer(encode(message))) for number, message in enumerate(messages)]


# ---- the decision


def test_a_request_in_order_may_run():
    assert decide(envelope(), tries=1, max_attempts=3, wall_now=STORED_AT) is None
    assert decide(envelope(deadline=STORED_AT + 1), tries=3, max_attempts=3, wall_now=STORED_AT) is None


def test_a_fault_is_told_before_anything_else():
    fault = HeadraceError(ErrorCode.INVALID_REQUEST, "bad")
    late = envelope(fault=fault, deadline=STORED_AT - 1)
    assert decide(late, tries=9, max_attempts=3, wall_now=STORED_AT) is fault


def test_a_request_past_its_deadline_expires_rather_than_fails():
    late = envelope(deadline=STORED_AT + 1)
    assert decide(late, tries=9, max_attempts=3, wall_now=STORED_AT + 1).code is ErrorCode.DEADLINE_EXCEEDED
    assert expired().code is ErrorCode.DEADLINE_EXCEEDED


def test_a_worker_and_the_monitor_end_an_expired_request_in_different_words():
    """Equal bytes would pass for the other's own message, and the request would be counted twice."""
    worker, monitor = error_answer(envelope(), expired()), error_answer(envelope(), expired(queued=True))
    assert worker.error.code is monitor.error.code
    assert encode(worker) != encode(monitor)


def test_attempts_are_used_up_after_the_last_one():
    assert decide(envelope(), tries=3, max_attempts=3, wall_now=STORED_AT) is None
    error = decide(envelope(), tries=4, max_attempts=3, wall_now=STORED_AT)
    assert error.code is ErrorCode.ENGINE_FAILED
    assert "req" in error.message


# ---- the record


def test_an_empty_record_is_that_of_a_fresh_request():
    assert Record.read([], 1) == Record()


def test_a_record_is_what_the_answer_that_wrote_it_had():
    writing = answer()
    written = [
        *writing.openings(),
        writing.chunk(Piece("Par", [1, 2]), STORED_AT + 2),
        writing.chunk(Piece("is", [3], [call("f")]), STORED_AT + 3),
    ]
    found = Record.read(stored(*written), writing.envelope.created)
    assert (found.text, found.token_ids, found.tool_calls) == ("Paris", [1, 2, 3], [call("f")])
    assert (found.next_seq, found.attempt, found.last, found.has_gap, found.model) == (2, 1, None, False, "m")
    assert found.last_sequence == 12


def test_messages_of_an_older_request_under_the_same_id_are_not_part_of_it():
    old = answer(envelope=envelope(stored_at=STORED_AT - 50), attempt=2)
    written = [
        *old.openings(),
        old.chunk(Piece("old", [9]), STORED_AT),
        old.completion("stop", USAGE, now=STORED_AT),
    ]
    found = Record.read(stored(*written), envelope().created)
    assert found == Record()


def test_a_record_of_statuses_alone_has_no_text_and_knows_the_attempt():
    first, second = answer(), answer(attempt=2)
    found = Record.read(stored(*first.openings(), *second.openings()), envelope().created)
    assert (found.attempt, found.next_seq, found.text, found.last) == (2, 0, "", None)
    assert (found.resumable_tokens, found.has_gap, found.last_sequence) == ([], False, 11)


@pytest.mark.parametrize("make", [lambda a: a.completion("stop", USAGE, now=STORED_AT), None])
def test_a_record_that_was_closed_has_its_last_message(make):
    last = make(answer()) if make else error_answer(envelope(), expired())
    found = Record.read(stored(last), envelope().created)
    assert found.last == last


def test_text_without_tokens_cannot_be_gone_on_with():
    writing = answer()
    written = [writing.chunk(Piece("a", [1]), STORED_AT), writing.chunk(Piece("b"), STORED_AT)]
    written.append(writing.chunk(Piece("c", [2]), STORED_AT))
    found = Record.read(stored(*written), envelope().created)
    assert (found.resumable_tokens, found.text, found.has_gap) == ([], "abc", True)


def test_calls_without_tokens_cannot_be_gone_on_with():
    writing = answer()
    assert Record.read(stored(writing.chunk(Piece(tool_calls=[call("f")]), 1.0)), envelope().created).has_gap


def test_tokens_of_two_models_cannot_be_gone_on_with():
    first = answer(model="one")
    chunks = [first.chunk(Piece("a", [1]), STORED_AT)]
    second = answer(Record.read(stored(*chunks), envelope().created), attempt=2, model="other")
    chunks.append(second.chunk(Piece("b", [2]), STORED_AT))
    assert Record.read(stored(*chunks), envelope().created).resumable_tokens == []


def test_reasoning_without_tokens_cannot_be_gone_on_with():
    first = answer()
    record = Record.read(stored(first.chunk(Piece(reasoning="Hm"), STORED_AT)), created=envelope().created)
    then = answer(record)
    then.chunk(Piece(text="a", token_ids=[7]), STORED_AT)
    assert record.reasoning == "Hm"
    assert record.resumable_tokens == []


def test_reasoning_with_tokens_is_gone_on_with_from_them():
    first = answer()
    chunks = [
        first.chunk(Piece(reasoning="Hm", token_ids=[3, 4]), STORED_AT),
        first.chunk(Piece(text="a", token_ids=[7]), STORED_AT),
    ]
    assert [chunk.choices[0].delta.reasoning for chunk in chunks] == ["Hm", None]
    record = Record.read(stored(*chunks), created=envelope().created)
    assert (record.reasoning, record.text, record.resumable_tokens) == ("Hm", "a", [3, 4, 7])


def test_a_reader_that_knows_no_second_name_of_reasoning_reads_the_record():
    chunk = answer().chunk(Piece(reasoning="Hm", token_ids=[3]), STORED_AT)
    older = msgspec.json.decode(encode(chunk))
    del older["choices"][0]["delta"]["reasoning"]
    read = decode_answer(msgspec.json.encode(older))
    assert isinstance(read, Chunk)
    assert read.choices[0].delta.reasoning_content == "Hm"


def test_an_ending_chunk_without_text_is_no_gap():
    writing = answer()
    written = [writing.chunk(Piece("a", [1]), STORED_AT), writing.chunk(Piece(finish_reason="stop"), STORED_AT)]
    assert Record.read(stored(*written), envelope().created).resumable_tokens == [1]


# ---- the answer


def test_an_answer_opens_with_started_and_a_later_attempt_with_restarted():
    assert [s.state for s in answer().openings()] == ["started"]
    assert [s.state for s in answer(attempt=2).openings()] == ["restarted"]


def test_a_spilled_request_says_so_once_whichever_attempt_begins():
    spilled = envelope(move=Move.SPILLED)
    first = answer(envelope=spilled, engine="ollama")
    assert [s.state for s in first.openings()] == ["spilled", "started"]
    later = answer(Record.read(stored(*first.openings()), spilled.created), attempt=2, envelope=spilled)
    assert [s.state for s in later.openings()] == ["restarted"]
    begun_on_mlx = Record.read(stored(*answer().openings()), spilled.created)
    moved = answer(begun_on_mlx, attempt=2, envelope=spilled, engine="ollama")
    assert [s.state for s in moved.openings()] == ["spilled", "restarted"]


@pytest.mark.parametrize("move", [None, Move.COMPLEX, Move.RETURNED])
def test_other_moves_are_not_told(move):
    assert [s.state for s in answer(envelope=envelope(move=move)).openings()] == ["started"]


def test_a_status_says_who_serves_the_request_and_how_long_it_waited():
    status = answer(now=STORED_AT + 1.5, attempt=3).status("restarted")
    assert status == Status("req", "restarted", int(STORED_AT), "mlx", "m", 3, 1500.0, "its turn")


def test_clocks_that_differ_make_no_negative_times():
    late = answer(now=STORED_AT - 5)
    late.chunk(Piece("x", [1]), STORED_AT - 4)
    account = late.completion("stop", USAGE, now=STORED_AT - 3).headrace
    assert (account.queue_ms, account.ttft_ms, account.total_ms) == (0.0, 0.0, 0.0)


def test_chunks_are_numbered_from_zero_and_the_first_names_the_role():
    writing = answer()
    first, second = writing.chunk(Piece("a", [1]), STORED_AT), writing.chunk(Piece("b", [2]), STORED_AT)
    assert (first.seq, second.seq) == (0, 1)
    assert (first.choices[0].delta.role, second.choices[0].delta.role) == ("assistant", None)


def test_tokens_without_text_wait_for_the_chunk_that_shows_it():
    writing = answer()
    assert writing.chunk(Piece("", [1]), STORED_AT + 1) is None
    assert writing.chunk(Piece("", [2]), STORED_AT + 2) is None
    shown = writing.chunk(Piece("я", [3]), STORED_AT + 3)
    assert (shown.seq, shown.choices[0].token_ids, shown.choices[0].delta.content) == (0, [1, 2, 3], "я")
    assert writing.ttft_ms == 3000.0
    assert writing.chunk(Piece("b", [4]), STORED_AT + 4).choices[0].token_ids == [4]


def test_tokens_that_are_held_at_the_end_come_with_the_ending_chunk():
    writing = answer()
    writing.chunk(Piece("", [1]), STORED_AT)
    ending = writing.chunk(Piece("", [2], finish_reason="stop"), STORED_AT)
    assert (ending.choices[0].finish_reason, ending.choices[0].token_ids) == ("stop", [1, 2])
    assert writing.ttft_ms == 0.0


def test_a_chunk_that_was_written_does_not_change_afterwards():
    writing = answer()
    first = writing.chunk(Piece("a", [1]), STORED_AT)
    data = encode(first)
    writing.chunk(Piece("b", [2]), STORED_AT)
    assert encode(first) == data


def test_calls_are_indexed_across_chunks_and_come_whole_in_the_last_message():
    writing = answer()
    one = writing.chunk(Piece("", [1], [call("f")]), STORED_AT)
    two = writing.chunk(Piece("", [2], [call("g"), call("h")], finish_reason="tool_calls"), STORED_AT)
    assert [c.index for chunk in (one, two) for c in chunk.choices[0].delta.tool_calls] == [0, 1, 2]
    message = writing.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message
    assert (message.content, message.tool_calls) == (None, [call("f"), call("g"), call("h")])


def test_of_calls_that_may_not_be_parallel_the_first_one_is_the_answer():
    writing = answer()
    writing.one_call = True
    writing.chunk(Piece(tool_calls=[call("f"), call("g")]), STORED_AT)
    writing.chunk(Piece("", [2], [call("h")], finish_reason="tool_calls"), STORED_AT)
    assert writing.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message.tool_calls == [call("f")]


def test_an_engine_that_begins_anew_does_not_repeat_the_calls_that_the_reader_has():
    first = answer()
    chunk = first.chunk(Piece(tool_calls=[call("f")]), STORED_AT)
    again = answer(Record.read(stored(chunk), envelope().created), attempt=2)
    assert again.chunk(Piece(tool_calls=[call("f")]), STORED_AT) is None
    new = again.chunk(Piece(tool_calls=[call("g")], finish_reason="tool_calls"), STORED_AT)
    assert [(c.index, c.function.name) for c in new.choices[0].delta.tool_calls] == [(1, "g")]


def part(arguments: str) -> ToolCall:
    return ToolCall(FunctionCall("", arguments))


def test_the_parts_of_a_call_are_one_call():
    writing = answer()
    chunks = [
        writing.chunk(Piece("", [1], [call("f", '{"a"')]), STORED_AT),
        writing.chunk(Piece("", [2], [part(": "), part("1}"), call("g", "{")]), STORED_AT),
        writing.chunk(Piece("", [3], [part("}")], finish_reason="tool_calls"), STORED_AT),
    ]
    assert [[c.index for c in chunk.choices[0].delta.tool_calls] for chunk in chunks] == [[0], [0, 0, 1], [1]]
    whole = [call("f", '{"a": 1}'), call("g", "{}")]
    assert writing.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message.tool_calls == whole
    assert Record.read(stored(*chunks), envelope().created).tool_calls == whole


def test_the_parts_of_a_second_call_that_is_not_wanted_are_left_out():
    writing = answer()
    writing.one_call = True
    writing.chunk(Piece("", [1], [call("f", "{"), part("}"), call("g", "{"), part("}")]), STORED_AT)
    ending = writing.chunk(Piece("", [2], [part("}")], finish_reason="tool_calls"), STORED_AT)
    assert ending.choices[0].delta.tool_calls is None
    assert writing.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message.tool_calls == [call("f", "{}")]


def test_an_engine_that_begins_anew_completes_the_call_that_the_reader_has_a_part_of():
    first = answer()
    begun = first.chunk(Piece(tool_calls=[call("f", '{"a"')]), STORED_AT)
    again = answer(Record.read(stored(begun), envelope().created), attempt=2)
    assert again.chunk(Piece(tool_calls=[call("f", "{")]), STORED_AT) is None
    rest = again.chunk(Piece(tool_calls=[part('"a": 1}')], finish_reason="tool_calls"), STORED_AT)
    assert [(c.index, c.function.arguments) for c in rest.choices[0].delta.tool_calls] == [(0, ": 1}")]
    message = again.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message
    assert message.tool_calls == [call("f", '{"a": 1}')]


@pytest.mark.parametrize("other", [call("f", '{"b": 1}'), call("g", '{"a": 1}'), call("f", '{ "a": 1}')])
def test_half_a_call_that_is_not_completed_ends_the_request(other):
    first = answer()
    begun = first.chunk(Piece(tool_calls=[call("f", '{"a"')]), STORED_AT)
    again = answer(Record.read(stored(begun), envelope().created), attempt=2)
    with pytest.raises(HeadraceError, match='broke off in a call of "f"') as caught:
        again.chunk(Piece(tool_calls=[other]), STORED_AT)
    assert caught.value.code is ErrorCode.ENGINE_FAILED


def test_a_whole_call_that_the_reader_has_stays_whatever_is_written_again():
    first = answer()
    begun = first.chunk(Piece(tool_calls=[call("f", '{"a": 1}')]), STORED_AT)
    again = answer(Record.read(stored(begun), envelope().created), attempt=2)
    assert again.chunk(Piece(tool_calls=[call("g", "{"), part("}")]), STORED_AT) is None
    message = again.completion("tool_calls", USAGE, now=STORED_AT).choices[0].message
    assert message.tool_calls == [call("f", '{"a": 1}')]


def test_an_engine_that_goes_on_from_the_tokens_continues_the_call():
    first = answer()
    begun = first.chunk(Piece("", [1], [call("f", "{")]), STORED_AT)
    again = answer(Record.read(stored(begun), envelope().created), attempt=2)
    rest = again.chunk(Piece("", [2], [part("}")]), STORED_AT)
    assert [(c.index, c.id, c.function.arguments) for c in rest.choices[0].delta.tool_calls] == [(0, "", "}")]


def test_an_engine_that_goes_on_from_the_tokens_makes_new_calls_only():
    first = answer()
    chunk = first.chunk(Piece("", [1], [call("f")]), STORED_AT)
    again = answer(Record.read(stored(chunk), envelope().created), attempt=2)
    new = again.chunk(Piece("", [2], [call("g")]), STORED_AT)
    assert [(c.index, c.function.name) for c in new.choices[0].delta.tool_calls] == [(1, "g")]


def states_of(writing, *pieces: Piece) -> list[str]:
    """What the reader is told of each piece; its chunk is called `chunk`."""
    told = []
    for piece in pieces:
        told += [status.state for status in writing.before(piece)]
        told += ["chunk"] if writing.chunk(piece, STORED_AT) else []
        told += [status.state for status in writing.after(piece)]
    return told


def test_a_pause_is_told_after_the_text_before_it_and_before_the_text_after_it():
    writing = answer()
    suspended, resumed = Piece("a", [1], preempted=1, suspended=True), Piece("b", [2], suspended=False)
    assert states_of(writing, suspended, resumed) == ["chunk", "suspended", "resumed", "chunk"]
    assert writing.completion("stop", USAGE, now=STORED_AT).headrace.preempted == 1


def test_a_pause_that_was_over_before_it_could_be_told_is_only_counted():
    writing = answer()
    assert states_of(writing, Piece("ab", [1, 2], preempted=2, suspended=False)) == ["chunk"]
    assert writing.preempted == 2
    assert states_of(writing, *[Piece(suspended=True, preempted=1)] * 2) == ["suspended"]


def test_a_request_that_is_restarted_while_it_is_suspended_is_suspended_no_longer():
    writing = answer()
    pieces = Piece(suspended=True, preempted=1), Piece(restarted=1), Piece("a", [1]), Piece(suspended=True, preempted=1)
    assert states_of(writing, *pieces) == ["suspended", "restarted", "chunk", "suspended"]
    assert writing.attempt == 2


def test_an_empty_answer_has_an_empty_text():
    assert answer().completion("stop", USAGE, now=STORED_AT).choices[0].message.content == ""


def test_the_last_message_accounts_for_how_the_request_was_served():
    writing = answer(now=STORED_AT + 1, envelope=envelope(move=Move.SPILLED), engine="ollama", attempt=2)
    writing.chunk(Piece("x", [1]), STORED_AT + 1.25)
    found = writing.completion("length", USAGE, now=STORED_AT + 2)
    assert msgspec.to_builtins(found)["headrace"] == {
        "engine": "ollama",
        "priority": "high",
        "task": "simple",
        "attempts": 2,
        "queue_ms": 1000.0,
        "ttft_ms": 1250.0,
        "total_ms": 2000.0,
        "spilled": True,
        "reason": "its turn",
        "preempted": 0,
    }
    assert (found.usage, found.choices[0].finish_reason) == (USAGE, "length")


def test_vectors_come_as_numbers_or_as_the_floats_that_openais_clients_read():
    embedded = Embedded([[0.5, -1.25], [0.0, 3.0]], prompt_tokens=7)
    numbers = answer(record=None).embeddings(embedded, None, now=STORED_AT + 2)
    assert [(item.index, item.embedding) for item in numbers.embeddings()] == [(0, [0.5, -1.25]), (1, [0.0, 3.0])]
    assert (numbers.usage.prompt_tokens, numbers.usage.total_tokens) == (7, 7)
    coded = answer(record=None).embeddings(embedded, "base64", now=STORED_AT + 2)
    packed = [base64.b64decode(item.embedding) for item in coded.embeddings()]
    assert [list(struct.unpack("<2f", floats)) for floats in packed] == embedded.vectors
    assert decode_answer(encode(coded)) == coded
    assert is_last(decode_answer(encode(numbers)))


def test_embeddings_are_accounted_for_like_any_answer():
    account = answer(reason="only ollama has the model m").embeddings(Embedded([[1.0]], 1), None, now=STORED_AT + 2)
    account = account.headrace
    assert (account.queue_ms, account.ttft_ms, account.total_ms) == (1000.0, 2000.0, 2000.0)
    assert account.reason == "only ollama has the model m"


def test_a_simulated_answer_says_so():
    assert answer(simulated=True).completion("stop", USAGE, now=STORED_AT).headrace.simulated is True


def test_an_error_answer_carries_the_error_and_the_request():
    error = HeadraceError(ErrorCode.MODEL_NOT_FOUND, "no such model", param="model")
    assert msgspec.to_builtins(error_answer(envelope(), error)) == {
        "object": "error",
        "id": "req",
        "created": int(STORED_AT),
        "error": {
            "code": "model_not_found",
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "retryable": False,
        },
    }


# ---- attempts that die


steps = st.lists(
    st.tuples(st.sampled_from(["", "", "a", "bc", "я", "🙂", "\n", '"']), st.sampled_from([0, 0, 0, 0, 1, 2])),
    min_size=1,
    max_size=12,
)


class Attempts(RuleBasedStateMachine):
    """One request, its fenced stream, and workers that die or freeze anywhere.

    Both engines say the same text. MLX gives tokens and goes on from them; the other engine gives none and
    begins anew, with as much text left out as the reader has.
    """

    @initialize(steps=steps, has_tokens=st.booleans())
    def store_request(self, steps, has_tokens):
        self.has_tokens = has_tokens
        self.steps = []
        for number, (text, calls) in enumerate(steps):
            self.steps.append((text, [call(f"f{number}_{index}") for index in range(calls)]))
        self.stream = [(1, answer(envelope=envelope(stored_at=STORED_AT - 9)).status("started"))]
        self.attempts = 0
        self.workers = []

    @property
    def accepted(self):
        return [m for _, m in self.stream if m.created == envelope().created]

    @property
    def closed(self):
        return any(is_last(message) for message in self.accepted)

    @rule()
    def hand_over(self):
        """To a worker that reads the record; the one before may be dead, or only slow."""
        record = Record.read([(s, decode_answer(encode(m))) for s, m in self.stream], envelope().created)
        if record.last is not None:
            assert record.last == self.accepted[-1]
            return
        self.attempts = max(self.attempts, record.attempt) + 1
        work = answer(record, attempt=self.attempts)
        resumed = record.resumable_tokens
        self.workers.append(
            {
                "answer": work,
                "position": len(resumed),
                "skip": 0 if resumed else len(record.text),
                "expects": self.stream[-1][0],
                "to_write": list(work.openings()),
            }
        )

    @rule(which=st.integers(0, 3), tokens=st.integers(1, 4))
    @precondition(lambda self: self.workers)
    def generate(self, which, tokens):
        worker = self.workers[which % len(self.workers)]
        if worker["to_write"]:
            self.write(worker)
            return
        if worker["position"] == len(self.steps):
            worker["to_write"].append(worker["answer"].completion("stop", USAGE, now=STORED_AT + 5))
            self.write(worker)
            return
        piece = Piece()
        for _ in range(tokens):
            if worker["position"] < len(self.steps):
                self.step(worker, piece)
        chunk = worker["answer"].chunk(piece, STORED_AT + 2)
        if chunk is not None:
            worker["to_write"].append(chunk)
            self.write(worker)

    def step(self, worker, piece):
        text, calls = self.steps[worker["position"]]
        skipped = min(worker["skip"], len(text))
        worker["skip"] -= skipped
        piece.text += text[skipped:]
        piece.tool_calls += calls
        if self.has_tokens:
            piece.token_ids.append(worker["position"])
        worker["position"] += 1
        if worker["position"] == len(self.steps):
            piece.finish_reason = "stop"

    def write(self, worker):
        """The stream takes a message only after the one that the writer knows as the last."""
        if worker["expects"] != self.stream[-1][0]:
            self.workers.remove(worker)
            return
        worker["expects"] += 1
        self.stream.append((worker["expects"], worker["to_write"].pop(0)))
        if self.closed:
            self.workers.remove(worker)

    @rule(which=st.integers(0, 3))
    @precondition(lambda self: self.workers)
    def die(self, which):
        self.workers.pop(which % len(self.workers))

    @invariant()
    def chunks_are_numbered_without_gap_or_repetition(self):
        chunks = [m for m in self.accepted if isinstance(m, Chunk)]
        assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))

    @invariant()
    def what_the_reader_has_is_the_beginning_of_the_answer(self):
        chunks = [m.choices[0] for m in self.accepted if isinstance(m, Chunk)]
        whole = "".join(text for text, _ in self.steps)
        assert whole.startswith("".join(choice.delta.content or "" for choice in chunks))
        calls = [c.id for choice in chunks for c in choice.delta.tool_calls or ()]
        assert calls == [c.id for _, calls in self.steps for c in calls][: len(calls)]
        assert [c.index for choice in chunks for c in choice.delta.tool_calls or ()] == list(range(len(calls)))
        if self.has_tokens:
            tokens = [token for choice in chunks for token in choice.token_ids]
            assert tokens == list(range(len(tokens)))

    @invariant()
    def nothing_comes_after_the_last_message(self):
        assert [is_last(m) for m in self.accepted].count(True) <= 1
        assert not self.closed or is_last(self.accepted[-1])

    def teardown(self):
        """An attempt follows that does not die: the joined chunks are the text of the last message."""
        if not hasattr(self, "stream"):
            return
        if not self.closed:
            self.workers.clear()
            self.hand_over()
            while self.workers:
                self.generate(0, 2)
        last = self.accepted[-1]
        assert isinstance(last, Completion)
        chunks = [m.choices[0].delta for m in self.accepted if isinstance(m, Chunk)]
        message = last.choices[0].message
        assert "".join(delta.content or "" for delta in chunks) == (message.content or "")
        assert (message.content or "") == "".join(text for text, _ in self.steps)
        assert [c.id for c in message.tool_calls or ()] == [c.id for _, calls in self.steps for c in calls]
        self.nothing_comes_after_the_last_message()
        self.chunks_are_numbered_without_gap_or_repetition()


TestAttempts = Attempts.TestCase
TestAttempts.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_an_answer_that_the_context_cut_short_of_its_limit_says_so():
    usage = Usage(90, 10, 100)
    (note,) = cut_short(32_000, "length", usage)
    assert note == "The context was full after 10 tokens of the answer: `max_tokens` is 32000."
    (note,) = cut_short(NO_LIMIT, "length", usage)
    assert note == "The context was full after 10 tokens of the answer: `max_tokens` is no limit."
    assert cut_short(10, "length", usage) == cut_short(None, "length", usage) == cut_short(99, "stop", usage) == []


def test_thoughts_and_scores_are_joined_and_go_on_in_the_next_attempt():
    first = answer()
    chunks = [
        first.chunk(Piece(reasoning="Hm"), STORED_AT),
        first.chunk(Piece(token_ids=[1], scores=[TokenScore("a", -1.0)]), STORED_AT),
        first.chunk(Piece(text="ab", token_ids=[2], scores=[TokenScore("b", -2.0)]), STORED_AT),
    ]
    assert chunks[1] is None  # no text yet: its score waits for the chunk with its text
    sent = [chunk for chunk in chunks if chunk is not None]
    record = Record.read(
        [(at, decode_answer(encode(chunk))) for at, chunk in enumerate(sent, 1)], first.envelope.created
    )
    assert (record.text, record.reasoning, record.first_said) == ("ab", "Hm", 1)
    again = answer(record, attempt=2)
    again.chunk(Piece(text="c", token_ids=[3], scores=[TokenScore("c", -3.0)], finish_reason="stop"), STORED_AT)
    (choice,) = again.completion("stop", USAGE, now=STORED_AT).choices
    assert (choice.message.content, choice.message.reasoning_content) == ("abc", "Hm")
    assert [score.token for score in choice.logprobs.content] == ["a", "b", "c"]
    plain = answer().completion("stop", USAGE, now=STORED_AT).choices[0]
    assert b"logprobs" not in encode(plain)
    assert b"reasoning" not in encode(plain)
