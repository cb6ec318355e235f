"""From notes on requests to sums: each note once, in its hour, day and month."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.answer import AnswerWriter, error_answer
from pipeline.core.ending import Abandoned, Answered, Buried, Failed, Loss, Moved, Returned, Settled
from pipeline.core.envelope import Envelope
from pipeline.core.usage import MOST_ACCOUNTS, Accounts, Book, StoredNotes, note_of
from pipeline.wire.answers import CompletionDetails, PromptDetails, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Move, Priority, Task
from pipeline.wire.usage import Period, UsageNote, UsageSums

ENVELOPE = Envelope(
    "r1", Priority.LOW, Task.SIMPLE, stored_at=1000.5, delivered=1, key="alice", charged_to="acme", batch=True
)
USAGE = Usage(10, 5, 15, PromptDetails(4), CompletionDetails(2))
ANSWER = AnswerWriter(ENVELOPE, "mlx", "m", 1, 1001.5, "its turn").completion("stop", USAGE, now=1002.5)


def time(*when: int) -> float:
    return datetime(*when, tzinfo=UTC).timestamp()


NOW = time(2026, 11, 26, 12, 30)


def note(number: int = 1, *, at: float = NOW, **fields) -> StoredNotes:
    fields = {"outcome": "done", "tenant": "acme", "key": "alice", "prompt": 10, "completion": 5} | fields
    return StoredNotes(number, at, {f"r{number}@1000": UsageNote(f"r{number}", priority=Priority.LOW, **fields)})


def test_the_note_of_an_answer_has_its_tokens_its_tenant_and_its_key():
    expected = UsageNote(
        "r1", "done", Priority.LOW, "acme", "alice", prompt=10, completion=5, cached=4, reasoning=2, batch=True
    )
    for outcome in (Answered(ANSWER), Settled(ANSWER)):
        assert note_of(outcome, ENVELOPE, stream="LLM", written=99) == expected


def test_the_note_of_an_error_has_the_tokens_that_were_written():
    for code, outcome in (("cancelled", "cancelled"), ("deadline_exceeded", "expired"), ("queue_full", "failed")):
        error = HeadraceError(ErrorCode(code), "over")
        for ended in (Failed(error), Buried(error), Settled(error_answer(ENVELOPE, error))):
            said = note_of(ended, ENVELOPE, stream="LLM_OLLAMA", written=3)
            assert (said.outcome, said.prompt, said.completion, said.spilled) == (outcome, 0, 3, True)


def test_an_outcome_that_ends_no_request_has_no_note():
    moved = Moved("llm.ollama.low", Move.SPILLED, Task.SIMPLE, "saturated")
    for outcome in (moved, Returned(), Abandoned(Loss.LEASE), Settled(None)):
        assert note_of(outcome, ENVELOPE, stream="LLM", written=0) is None


def test_periods_begin_with_the_hour_the_day_and_the_month_in_utc():
    at = time(2024, 2, 29, 23, 59)
    assert [Period.HOUR.start_of(at), Period.HOUR.end_of(at)] == [time(2024, 2, 29, 23), time(2024, 3, 1)]
    assert [Period.DAY.start_of(at), Period.DAY.end_of(at)] == [time(2024, 2, 29), time(2024, 3, 1)]
    assert [Period.MONTH.start_of(at), Period.MONTH.end_of(at)] == [time(2024, 2, 1), time(2024, 3, 1)]
    at = time(2026, 12, 31, 23)
    assert Period.MONTH.end_of(at) == Period.DAY.end_of(at) == Period.HOUR.end_of(at) == time(2027, 1, 1)


def test_a_report_sums_by_tenant_and_by_key_and_by_outcome():
    accounts = Accounts()
    accounts.add(note(1, cached=4, reasoning=2, spilled=True))
    accounts.add(note(2, outcome="failed", prompt=0, completion=1, key="", batch=True))
    accounts.add(note(3, tenant="bolt", key="bob"))
    day = accounts.report(NOW).day
    assert (day.start, day.end) == (time(2026, 11, 26), time(2026, 11, 27))
    acme, bolt = day.tenants
    assert (acme.tenant, bolt.tenant) == ("acme", "bolt")
    assert (acme.requests.done, acme.requests.failed, acme.requests.spilled, acme.requests.batch) == (1, 1, 1, 1)
    assert (acme.tokens.prompt, acme.tokens.completion, acme.tokens.cached, acme.tokens.reasoning) == (10, 6, 4, 2)
    assert acme.tokens.spilled == 15
    assert [(each.key, each.requests.total, each.tokens.total) for each in day.keys] == [
        ("alice", 1, 15),
        ("bob", 1, 15),
    ]
    assert (day.total.requests.total, day.total.tokens.total) == (3, 31)


def test_a_report_has_only_what_its_reader_may_see():
    accounts = Accounts()
    accounts.add(note(1))
    accounts.add(note(2, tenant="bolt", key="bob"))
    month = accounts.report(NOW, lambda each: each.tenant == "bolt").month
    assert [each.tenant for each in month.tenants] == ["bolt"]
    assert month.total.tokens.total == 15


def test_a_period_without_requests_is_empty():
    accounts = Accounts()
    accounts.add(note(1))
    report = accounts.report(time(2026, 11, 26, 13))
    assert report.hour.total.requests.total == 0
    assert report.day.total.requests.total == 1
    assert Accounts().report(NOW).month.tenants == []


def test_the_names_beyond_the_most_are_counted_together():
    accounts = Accounts()
    for number in range(1, MOST_ACCOUNTS + 11):
        accounts.add(note(number, tenant=f"t{number}", key=""))
    accounts.add(note(MOST_ACCOUNTS + 11, tenant="t1", key=""))
    sums = {each.tenant: each.requests.done for each in accounts.report(NOW).hour.tenants}
    assert len(sums) == MOST_ACCOUNTS + 1
    assert (sums["other"], sums["t1"]) == (10, 2)


def test_a_complete_book_is_stored_before_the_next_one_and_until_it_is():
    accounts = Accounts()
    accounts.add(note(1))
    accounts.add(note(2, at=NOW + 3600))
    hours = [book for book in accounts.unstored() if book.period is Period.HOUR]
    assert [book.start for book in hours] == [time(2026, 11, 26, 12), time(2026, 11, 26, 13)]
    for book in accounts.unstored():
        accounts.stored(book, book.through)
    assert accounts.unstored() == []


def test_a_book_that_grows_while_it_is_stored_is_stored_again():
    accounts = Accounts()
    accounts.add(note(1))
    books = [(book, book.through) for book in accounts.unstored()]
    accounts.add(note(2))
    for book, through in books:
        accounts.stored(book, through)
    assert len(accounts.unstored()) == 3


def test_a_new_stream_of_notes_is_counted_from_its_start():
    accounts = Accounts()
    accounts.add(note(7))
    accounts.restart()
    accounts.add(note(1))
    assert accounts.report(NOW).hour.total.requests.done == 2


NOTES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9000)), min_size=1, max_size=30)


@given(notes=NOTES, data=st.data())
def test_each_note_counts_once_whichever_books_were_stored_when_a_process_died(notes, data):
    at, stored = NOW, []
    for number, (tenant, gap_s) in enumerate(notes, start=1):
        at += gap_s
        stored.append(note(number, at=at, tenant=tenant, key=""))
    kept: dict[tuple[Period, int], Book] = {}

    def newest() -> Accounts:
        books = [max((b for b in kept.values() if b.period is p), key=lambda b: b.start, default=None) for p in Period]
        return Accounts([Book.of(b.period, _copied(b)) for b in books if b is not None])

    def keep(accounts: Accounts, most: int) -> None:
        for book in accounts.unstored()[:most]:
            kept[book.period, book.start] = Book.of(book.period, _copied(book))
            accounts.stored(book, book.through)

    accounts = newest()
    for each in stored:
        accounts.add(each)
        keep(accounts, data.draw(st.integers(0, 4)))
        if data.draw(st.booleans()):
            accounts = newest()
            for again in stored[: each.sequence]:
                accounts.add(again)
    keep(accounts, 100)
    for period in Period:
        mine = [book for book in kept.values() if book.period is period]
        assert sum(each.requests.done for book in mine for each in book.sums) == len(stored)
        for book in mine:
            theirs = [each for each in stored if period.start_of(each.at) == book.start]
            assert sum(each.requests.done for each in book.sums) == len(theirs)


@given(messages=st.lists(st.tuples(st.sets(st.sampled_from("abcdefgh"), min_size=1), st.integers(0, 9)), max_size=12))
def test_a_request_counts_once_however_many_messages_name_it_whenever_a_process_died(messages):
    at, stored = NOW, []
    for number, (names, gap_s) in enumerate(messages, start=1):
        at += gap_s
        notes = {name: UsageNote(name, "done", Priority.LOW, completion=1) for name in sorted(names)}
        stored.append(StoredNotes(number, at, notes))
    kept: list[Book] = []
    for number in range(len(stored) + 1):
        # Another process reads what is stored, from the first message on.
        accounts = Accounts([Book.of(book.period, _copied(book)) for book in kept], window_s=600.0)
        for each in stored[:number]:
            accounts.add(each)
        kept = accounts.unstored() or kept
    total = Accounts(kept).report(at).month.total
    assert total.requests.done == total.tokens.completion == len({name for each in stored for name in each.notes})


def test_a_request_whose_name_was_used_long_before_counts():
    accounts = Accounts(window_s=600.0)
    for number, at in enumerate((NOW, NOW + 599, NOW + 1300), start=1):
        accounts.add(StoredNotes(number, at, {"a@1": UsageNote("a", "done", Priority.LOW)}))
    assert accounts.report(NOW).day.total.requests.done == 2


def _copied(book: Book):
    bucket = book.bucket
    copies = []
    for each in bucket.sums:
        copy = UsageSums(each.tenant, each.key)
        copy.merge(each)
        copies.append(copy)
    return type(bucket)(bucket.start, bucket.through, copies)
