"""What a tenant with credentials of its own can do on the broker, and what it can do to another tenant: nothing.

`docs/security.md` has the table. `make security` prints how many attempts were made.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from pipeline.broker.jetstream import Bus
from pipeline.broker.secret import learn_moves
from pipeline.commands.auth import auth
from pipeline.wire.subjects import Move
from tests.security.fleet import role
from tests.support import ROOT, NatsServer
from tests.waiting import eventually, flushed

# What for, subject, body, headers.
Attempt = tuple[str, str, bytes, dict[str, str] | None]
TENANTS = ("acme", "bolt")
OTHER = {"acme": "bolt", "bolt": "acme"}
# Only an Ollama has the model, and none is there: the request stays where it is.
WAITS = b'{"prompt": "wait", "model": "at-ollama"}'


@dataclass
class Tenants:
    """The server, a connection of each tenant, and what the pipeline's user hears."""

    server: NatsServer
    nc: dict[str, Client]
    pipeline: Client
    heard: list[Msg] = field(default_factory=list)

    async def attempt(self, tenant: str, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> str:
        """The reply to a request of a tenant; empty if it gets none."""
        try:
            return (await self.nc[tenant].request(subject, body, timeout=2, headers=headers)).data.decode()
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
            return ""

    async def told(self, tenant: str, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        """The reply to a request that gets one, decoded. It is sent again until then: its id makes that safe."""

        async def reply() -> str:
            return await self.attempt(tenant, subject, body, headers)

        return json.loads(await eventually(reply, what=f"a reply to {subject}"))

    async def answer(self, tenant: str, request_id: str) -> dict[str, object]:
        """The last message of a tenant's request, once it has one."""
        subject = f"$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.t.{tenant}.{request_id}"

        async def last() -> dict[str, object] | None:
            found = json.loads(await self.attempt(tenant, subject) or "{}")
            return found if found.get("object") in ("chat.completion", "error") else None

        found: dict[str, object] = await eventually(last)
        return found

    async def position(self, tenant: str, request_id: str) -> str:
        """The state of a tenant's request, as the tenant sees it."""
        said = await self.told(tenant, f"llm.queue.position.t.{tenant}", request_id.encode())
        return str(said["state"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NatsServer, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("tenants")
    shutil.copy(ROOT / "nats" / "accounts.conf", folder)
    shutil.copy(ROOT / "nats" / "tenants.conf", folder)
    for tenant in TENANTS:
        assert auth(tenant, folder / "tenants.conf") == 0
    written = (folder / "tenants.conf").read_text(encoding="utf-8")
    passwords = dict(re.findall(r'user: "(\w+)", password: "([^"]+)"', written))
    with pytest.MonkeyPatch.context() as patch:
        for user in ("pipeline", "engine", "client"):
            patch.setenv(f"NATS_{user.upper()}_PASSWORD", user)
        patch.setenv("NATS_STORE_DIR", str(folder))
        server = NatsServer(folder, conf=str(folder / "accounts.conf"))
        server.start()
        try:
            with (
                role(server, "pipeline", "monitor", folder),
                role(server, "pipeline", "gateway", folder),
                role(server, "engine", "mlx", folder),
            ):
                yield server, passwords
        finally:
            server.stop()


@pytest.fixture
async def tenants(served: tuple[NatsServer, dict[str, str]]) -> AsyncIterator[Tenants]:
    server, passwords = served
    url = f"127.0.0.1:{server.port}"
    async with AsyncExitStack() as stack:
        # What they send themselves they do not hear.
        pipeline = await nats.connect(f"nats://pipeline:pipeline@{url}", inbox_prefix=b"_INBOX.pipeline", no_echo=True)
        stack.push_async_callback(pipeline.close)
        nc = {}
        for tenant in TENANTS:
            nc[tenant] = await nats.connect(f"nats://{tenant}:{passwords[tenant]}@{url}", no_echo=True)
            stack.push_async_callback(nc[tenant].close)
        found = Tenants(server, nc, pipeline)

        async def on_message(message: Msg) -> None:
            found.heard.append(message)

        await pipeline.subscribe(">", cb=on_message)
        await flushed(pipeline)
        yield found


async def _with_requests(tenants: Tenants, done: str, queued: str) -> None:
    """Each tenant has a request that was answered, and one that waits. Both tenants use the same ids."""
    async with Bus.connect(f"nats://pipeline:pipeline@127.0.0.1:{tenants.server.port}", name="owner") as bus:
        await learn_moves(bus)
        for tenant in TENANTS:
            await tenants.told(tenant, f"llm.request.high.t.{tenant}", b"hello", {"Nats-Msg-Id": f"t.{tenant}.{done}"})
            assert (await tenants.answer(tenant, done))["object"] == "chat.completion"
            moved = bus.moves.make(f"t.{tenant}.{queued}", Move.SPILLED, 1, 1.0)
            await bus.store("llm.ollama.low", WAITS, headers={"Nats-Msg-Id": moved})

            async def waits(tenant: str = tenant) -> bool:
                return await tenants.position(tenant, queued) in ("queued", "running")

            await eventually(waits)


async def test_the_same_id_of_two_tenants_is_two_requests(tenants: Tenants):
    for tenant in TENANTS:
        prompt = f"I am {tenant}".encode()
        headers = {"Nats-Msg-Id": f"t.{tenant}.same"}
        await tenants.told(tenant, f"llm.request.high.t.{tenant}.complex", prompt, headers)
    for tenant in TENANTS:
        last = await tenants.answer(tenant, "same")
        assert last["id"] == "same"
        assert f"I am {tenant}" in json.dumps(last)


async def test_a_tenant_asks_cancels_and_reads_late_by_its_own_subjects(tenants: Tenants):
    await _with_requests(tenants, "read", "mine")
    asked = await tenants.told("acme", "llm.ask.high.t.acme", b"ask me", {"Nats-Msg-Id": "t.acme.asked"})
    assert "ask me" in json.dumps(asked)
    assert (await tenants.answer("acme", "read"))["id"] == "read"
    late = await tenants.told("acme", "llm.queue.answer.t.acme", b"read")
    assert [one["message"]["id"] for one in late["messages"]] == ["read"]
    said = await tenants.told("acme", "llm.cancel.t.acme.mine")
    assert said == {"id": "mine", "state": "cancelled"}
    last = await tenants.answer("acme", "mine")
    assert last["error"]["code"] == "cancelled"  # type: ignore[index]
    assert await tenants.position("acme", "mine") == "finished"
    assert await tenants.position("bolt", "mine") in ("queued", "running")


async def test_a_tenants_reply_to_is_an_inbox_of_its_own(tenants: Tenants):
    inbox = await tenants.nc["acme"].subscribe("_INBOX.t.acme.mine")
    await flushed(tenants.nc["acme"])

    async def copied() -> bytes:
        await tenants.attempt("acme", "llm.request.high.t.acme", b"x", {"Reply-To": "_INBOX.t.acme.mine"})
        with suppress(nats.errors.TimeoutError):
            return (await inbox.next_msg(5)).data
        return b""

    assert json.loads(await eventually(copied, every_s=AGAIN_S))["object"] == "chat.completion"


def _attempts(me: str, targets: tuple[str, ...], sequence: int) -> Iterator[Attempt]:
    """What a tenant sends to get at another's requests and answers."""
    other = OTHER[me]
    stream = "$JS.API.STREAM"
    for request_id in targets:
        theirs = f"llm.reply.t.{other}.{request_id}"
        yield "cancel", f"llm.cancel.t.{other}.{request_id}", b"", None
        yield "cancel of the default tenant's", f"llm.cancel.{request_id}", b"", None
        yield "position", f"llm.queue.position.t.{other}", request_id.encode(), None
        yield "position of the default tenant's", "llm.queue.position", f"t.{other}.{request_id}".encode(), None
        for said in (f"t.{other}.{request_id}", f"{other}.{request_id}", f"../{other}/{request_id}"):
            yield "position by its own subject", f"llm.queue.position.t.{me}", said.encode(), None
            yield "cancel by its own subject", f"llm.cancel.t.{me}.{said}", b"", None
        yield "late answer", f"llm.queue.answer.t.{other}", request_id.encode(), None
        yield "late answer by the default tenant's", "llm.queue.answer", f"t.{other}.{request_id}".encode(), None
        for said in (f"t.{other}.{request_id}", f"{other}.{request_id}", f"../{other}/{request_id}"):
            yield "late answer by its own subject", f"llm.queue.answer.t.{me}", said.encode(), None
        yield "direct get", f"$JS.API.DIRECT.GET.LLM_REPLIES.{theirs}", b"", None
        for wanted in ("last_by_subj", "next_by_subj"):
            body = json.dumps({wanted: theirs, "seq": 1}).encode()
            yield "direct get by body", "$JS.API.DIRECT.GET.LLM_REPLIES", body, None
            own = f"$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.t.{me}.{request_id}x"
            yield "direct get by body under its own subject", own, body, None
            yield "stream get", f"{stream}.MSG.GET.LLM_REPLIES", body, None
        consumer = {"stream_name": "LLM_REPLIES", "config": {"filter_subject": theirs, "ack_policy": "none"}}
        consumer["config"]["deliver_subject"] = f"_INBOX.t.{me}.stolen"  # type: ignore[index]
        for name in ("LLM_REPLIES", f"LLM_REPLIES.x.{theirs}", f"LLM_REPLIES.x.llm.reply.t.{me}.x"):
            yield "consumer", f"$JS.API.CONSUMER.CREATE.{name}", json.dumps(consumer).encode(), None
        yield "purge", f"{stream}.PURGE.LLM_REPLIES", json.dumps({"filter": theirs}).encode(), None
        yield "answer", f"llm.out.t.{other}.{request_id}", b'{"object":"error"}', None
        yield "answer on the reply subject", theirs, b'{"object":"error"}', None
        yield "id of the other", f"llm.request.low.t.{me}", b"x", {"Nats-Msg-Id": f"t.{other}.{request_id}-{me}"}
        yield "Reply-To of the other", f"llm.request.low.t.{me}", b"x", {"Reply-To": theirs}
        yield "inbox of the other", f"llm.request.low.t.{me}", b"x", {"Reply-To": f"_INBOX.t.{other}.{request_id}"}
        yield "ask for the other", f"llm.ask.low.t.{other}", b"x", {"Nats-Msg-Id": request_id}
    for number in range(1, sequence + 1):
        body = json.dumps({"seq": number}).encode()
        yield "direct get by sequence", "$JS.API.DIRECT.GET.LLM_REPLIES", body, None
        yield "stream get by sequence", f"{stream}.MSG.GET.LLM", body, None
    for lane in ("", ".simple", ".complex"):
        yield "request of the other", f"llm.request.low.t.{other}{lane}", b"x", None
        yield "request of the default tenant", f"llm.request.low{lane}", b"x", None
    for name in ("LLM", "LLM_REPLIES", "LLM_STATE", "LLM_DEAD", "LLM_OLLAMA"):
        for what in ("INFO", "DELETE", "PURGE", "UPDATE"):
            yield "stream", f"{stream}.{what}.{name}", b"{}", None
    for consumer_name in ("low_t", "high_t", "ollama_low"):
        name = "LLM_OLLAMA" if consumer_name.startswith("ollama") else "LLM"
        yield "pull", f"$JS.API.CONSUMER.MSG.NEXT.{name}.{consumer_name}", b"1", None
        yield "acknowledgement", f"$JS.ACK.{name}.{consumer_name}.1.1.1.1.0", b"+TERM", None
    yield "services", "$SRV.INFO", b"", None


# What the server says where nothing is: no reply, or that the tenant's account has no JetStream.
REFUSED = re.compile(r'^$|"err_code":10039')
# What a tenant gets at most otherwise: nothing of another's, and no change to it.
HARMLESS = re.compile(
    r'"state":"unknown"|"messages":\[\]|"stream": ?"LLM", ?"seq":|"code":"(invalid_request|reply_subject_denied)"'
)


@pytest.mark.parametrize("me", TENANTS)
async def test_a_hundred_attempts_at_another_tenants_requests_and_answers_come_to_nothing(tenants: Tenants, me: str):
    done, queued = targets = (f"done-{me}", f"queued-{me}")
    await _with_requests(tenants, done, queued)
    other, heard = OTHER[me], []
    before = await tenants.answer(other, done)

    async def on_message(message: Msg) -> None:
        heard.append(message)

    for subject in (">", f"llm.reply.t.{other}.>", "llm.reply.>", "llm.out.>", "llm.queued.>", "llm.event.>"):
        await tenants.nc[me].subscribe(subject, cb=on_message)
    await flushed(tenants.nc[me])
    theirs = []

    async def on_theirs(message: Msg) -> None:
        theirs.append(message)

    await tenants.nc[other].subscribe("llm.reply.>", cb=on_theirs)
    await tenants.nc[other].subscribe("_INBOX.t.>", cb=on_theirs)
    await flushed(tenants.nc[other])
    result: Counter[str] = Counter()
    attempts = list(_attempts(me, targets, 12))
    replies = await asyncio.gather(*(tenants.attempt(me, *attempt) for _, *attempt in attempts))
    for (what, subject, _, _), said in zip(attempts, replies, strict=True):
        refused = REFUSED.search(said) is not None
        assert refused or HARMLESS.search(said), (what, subject, said)
        result["refused" if refused else "harmless"] += 1
    # A request of the other's while this tenant listens.
    seen = f"seen-by-{me}"
    await tenants.told(other, f"llm.request.high.t.{other}", b"secret", {"Nats-Msg-Id": f"t.{other}.{seen}"})
    assert "secret" in json.dumps(await tenants.answer(other, seen))
    await flushed(tenants.nc[me])
    await flushed(tenants.nc[other])
    assert not [message.subject for message in heard if f".t.{other}." in message.subject or b"secret" in message.data]
    await eventually(lambda: f"llm.reply.t.{other}.{seen}" in {message.subject for message in theirs})
    reached = {message.subject.rpartition(".")[2] for message in theirs}
    assert not reached & {*targets, *(f"{target}-{me}" for target in targets)}
    assert await tenants.answer(other, done) == before
    assert await tenants.position(other, queued) in ("queued", "running")
    print(f"{me:<9} {result.total()} attempts at {other}'s: {dict(result)}")
    assert result.total() >= 100


# ---- docs/security.md


def _rows() -> list[tuple[str, dict[str, str]]]:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- tenants -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert table is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    return [(row[0].strip("`"), dict(zip(lines[0][1:], row[1:], strict=True))) for row in lines[2:]]


def _literal(subject: str) -> str:
    return subject.replace("*", "high").replace(">", "x")


# Refused by every stream, so that nothing comes of it.
NOWHERE = {"Nats-Expected-Stream": "none"}
# Beside much else, the server now and then loses a message between accounts.
AGAIN_S = 0.5


async def _published(tenants: Tenants, tenant: str, rows: list[tuple[str, dict[str, str]]]) -> set[str]:
    """The subjects of rows whose messages, sent by a tenant, are heard in the pipeline's account."""
    end, mark = f"llm.cancel.t.{tenant}.end", f"from {tenant}".encode()
    expected = {end} | {_literal(subject) for subject, cells in rows if "P" in cells[tenant]}

    def heard() -> set[str]:
        # The roles send messages of their own.
        return {message.subject for message in tenants.heard if message.data == mark}

    async def all_expected() -> bool:
        # The server passes the messages of a connection on in order.
        for subject in (*map(_literal, dict(rows)), end):
            await tenants.nc[tenant].publish(subject, mark, headers=NOWHERE)
        await flushed(tenants.nc[tenant])
        await flushed(tenants.pipeline)
        return expected <= heard()

    await eventually(all_expected, every_s=AGAIN_S)
    return heard()


async def _heard(tenants: Tenants, tenant: str, rows: list[tuple[str, dict[str, str]]]) -> set[str]:
    """The rows whose messages, sent by the pipeline, a tenant hears."""
    heard: set[str] = set()

    async def on_message(message: Msg) -> None:
        if mark in message.data:
            heard.add(message.subject)

    mark = json.dumps({"object": "headrace.test", "to": tenant}).encode()
    end = f"_INBOX.t.{tenant}.end"
    subscriptions = [await tenants.nc[tenant].subscribe(subject, cb=on_message) for subject in (*dict(rows), end)]
    await flushed(tenants.nc[tenant])
    expected = {end} | {_literal(subject) for subject, cells in rows if "S" in cells[tenant]}

    async def all_expected() -> bool:
        for sent in map(_literal, (*dict(rows), end)):
            if sent.startswith("llm.reply."):
                await tenants.pipeline.publish(sent.replace("llm.reply.", "llm.out."), mark)
            else:
                await tenants.pipeline.publish(sent, mark, headers=NOWHERE)
        await flushed(tenants.pipeline)
        await flushed(tenants.nc[tenant])
        return expected <= heard

    await eventually(all_expected, every_s=AGAIN_S)
    for subscription in subscriptions:
        await subscription.unsubscribe()
    return heard


async def test_the_table_of_tenants_is_what_the_server_does(tenants: Tenants):
    """Publishing is heard in the pipeline's account, and subscribing hears what the pipeline publishes."""
    wrong, rows = [], _rows()
    for tenant in TENANTS:
        published = await _published(tenants, tenant, rows)
        heard = await _heard(tenants, tenant, rows)
        for subject, cells in rows:
            literal = _literal(subject)
            can = " ".join(["P"] * (literal in published) + ["S"] * (literal in heard)) or "-"
            if can != cells[tenant]:
                wrong.append(f"{tenant} {subject}: {can}, the table says {cells[tenant]}")
    print(f"{len(TENANTS) * len(rows) * 2} permissions of tenants checked")
    assert not wrong, "\n".join(wrong)
