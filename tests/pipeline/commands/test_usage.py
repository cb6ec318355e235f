"""What `headrace usage` prints."""

from __future__ import annotations

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.cli import main
from pipeline.commands.usage import _show
from pipeline.core.usage import Accounts, StoredNotes
from pipeline.wire.messages import encode
from pipeline.wire.subjects import QUEUE_USAGE, QUEUE_USAGE_OF_TENANT, Priority, usage_tenant
from pipeline.wire.usage import UsageNote, UsageReport

NOW = 1795732275.0
NOTES = [
    UsageNote("a", "done", Priority.LOW, "acme", "alice", prompt=1200, completion=34),
    UsageNote("b", "cancelled", Priority.LOW, "acme", completion=2),
    UsageNote("c", "done", Priority.LOW, "bolt\x1b[2J", prompt=7),
]


async def serve(bus: Bus) -> None:
    accounts = Accounts()
    for sequence, note in enumerate(NOTES, start=1):
        accounts.add(StoredNotes(sequence, NOW, {note.id: note}))

    async def answer(subject: str, _: bytes) -> bytes:
        tenant = usage_tenant(subject)
        return encode(accounts.report(NOW, lambda each: tenant in (None, each.tenant)))

    await bus.serve("usage", "a monitor", {QUEUE_USAGE: answer, QUEUE_USAGE_OF_TENANT: answer})


async def test_the_tables_show_tenants_their_keys_and_all_together(bus: Bus, capsys):
    await serve(bus)
    assert await _show(bus, tenant="", as_json=False) == 0
    said = capsys.readouterr().out
    hour, *_ = said.split("This day")
    rows = [line.split() for line in hour.splitlines() if line.strip()]
    assert rows[0][:5] == ["This", "hour,", "since", "2026-11-26", "22:00"]
    assert rows[1][:5] == ["tenant", "key", "requests", "failed", "cancelled"]
    assert rows[1][5:] == ["expired", "prompt", "cached", "completion", "reasoning", "spilled"]
    assert rows[2] == ["acme", "2", "0", "1", "0", "1,200", "0", "36", "0", "0"]
    assert rows[3] == ["alice", "1", "0", "0", "0", "1,200", "0", "34", "0", "0"]
    assert rows[5] == ["all", "3", "0", "1", "0", "1,207", "0", "36", "0", "0"]
    assert "\x1b[2J" not in said


async def test_one_tenant_and_json(bus: Bus, capsys):
    await serve(bus)
    assert await _show(bus, tenant="acme", as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=UsageReport)
    assert [each.tenant for each in report.month.tenants] == ["acme"]
    assert await _show(bus, tenant="nothing", as_json=False) == 0
    assert "no requests" in capsys.readouterr().out


def test_a_tenant_that_cannot_be_is_refused_without_asking(capsys):
    assert main(["usage", "--tenant", "a b", "--nats-url", "nats://127.0.0.1:9"]) == 2
    said = 'headrace: --tenant: "a b" is not a valid tenant. Use 1 to 64 letters, digits, "-" or "_".\n'
    assert capsys.readouterr().err == said
