"""Who can do what on the broker: `docs/security.md`'s table, and attempts to get around it by a reply subject.

The server checks no permission on reply subjects. So every reply that a user can cause is sent to every subject that
must not hear of it, while a listener with all permissions hears what arrives there. `make security` prints the result.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from pipeline.broker.jetstream import Bus
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from tests.security.fleet import role
from tests.support import ROOT, NatsServer
from tests.waiting import eventually, flushed

USERS = ("pipeline", "engine", "client")
STREAMS = (
    "LLM",
    "LLM_OLLAMA",
    "LLM_REPLIES",
    "LLM_STATE",
    "LLM_DEAD",
    "LLM_BATCH",
    "LLM_USED",
    "LLM_USAGE",
    "OBJ_LLM_FILES",
)
VICTIM = "victim"
# Stored for Ollama, and for a model that no worker has: MLX's worker looks at it, and it stays where it is.
QUEUED = "queued-victim"

# What no user may reach by a reply. The last token of most is free, so that no other message comes there.
TARGETS = (
    "llm.out.victim",
    "llm.reply.victim",
    "llm.cancel.queued-victim",
    "llm.dead.high",
    "llm.load.evil",
    "llm.worker.evil",
    "llm.event.high.evil",
    "llm.returned.ollama_high-99",
    "llm.leader.moves",
    "llm.leader.monitor2",
    "llm.batch.evil.order",
    "llm.usage.hour.1",
    "llm.reserved",
    "$O.LLM_FILES.M.evil",
    "llm.ollama.high",
    "llm.queued.evil",
    "llm.queue.evil",
    "llm.queue.pause",
    "llm.queue.resume",
    "llm.queue.move",
    "llm.paused",
    "llm.lanes",
    "llm.store",
    "llm.tokens.evil",
    "llm.fetch.evil",
    "$JS.API.STREAM.DELETE.LLM",
    "$JS.API.STREAM.DELETE.LLM_REPLIES",
    "$JS.API.STREAM.PURGE.LLM_OLLAMA",
    "$JS.API.STREAM.UPDATE.LLM",
    "$JS.API.STREAM.MSG.DELETE.LLM_OLLAMA",
    "$JS.API.STREAM.INFO.LLM_STATE",
    "$JS.API.CONSUMER.DELETE.LLM.high",
    "$JS.API.CONSUMER.CREATE.LLM_REPLIES",
    "$JS.ACK.LLM_OLLAMA.ollama_high.1.1.1.1.0",
    "$SRV.evil",
    "_INBOX.pipeline.evil",
    "_R_.evil.evil",
)


class Carrier(NamedTuple):
    """A message that its user may send, and to which something replies."""

    what: str
    subject: str
    body: bytes = b""
    headers: dict[str, str] | None = None


_LAST = json.dumps({"last_by_subj": "llm.reply.victim"}).encode()
_BATCH = json.dumps({"seq": 1, "next_by_subj": "llm.reply.victim", "batch": 10}).encode()
_PULL = json.dumps({"batch": 1, "no_wait": True}).encode()
SHARED = (
    Carrier("PubAck of a request", "llm.request.low", b"x"),
    Carrier("PubAck of a repeated request", "llm.request.low", b"x", {"Nats-Msg-Id": "repeated"}),
    Carrier("refusal by the stream", "llm.request.low", b"x", {"Nats-Expected-Last-Sequence": "999999"}),
    Carrier("answer that is read", "$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.victim"),
    Carrier("answer that is not there", "$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.nothing"),
    Carrier("answer that is read by a query", "$JS.API.DIRECT.GET.LLM_REPLIES", _LAST),
    Carrier("answer that is read in a batch", "$JS.API.DIRECT.GET.LLM_REPLIES", _BATCH),
    Carrier("message that a trace follows", "llm.request.low", b"x", {"Nats-Trace-Dest": "{target}"}),
)
CARRIERS = {
    "client": (
        *SHARED,
        Carrier("answer at Reply-To", "llm.request.low", b"x", {"Reply-To": "{target}"}),
        Carrier("answer to llm.ask", "llm.ask.low", b"x"),
        Carrier("refusal of llm.ask", "llm.ask.evil", b"x"),
        Carrier("refusal of a body", "llm.ask.low", b'{"prompt":'),
        Carrier("statistics", "llm.queue.stats"),
        Carrier("position", "llm.queue.position", b"victim"),
        Carrier("late answer", "llm.queue.answer", b"victim"),
        Carrier("late answer of nothing", "llm.queue.answer", b"nothing"),
        Carrier("models", "llm.models"),
        Carrier("result of a cancel", "llm.cancel.unknown"),
        Carrier("services", "$SRV.PING"),
        Carrier("services' description", "$SRV.INFO"),
        Carrier("accounts of use", "llm.queue.usage.t.default"),
    ),
    "engine": (
        *SHARED,
        Carrier("PubAck of an answer", "llm.out.mine", b"{}"),
        Carrier("refusal by the fence", "llm.out.mine", b"{}", {"Nats-Expected-Last-Subject-Sequence": "999999"}),
        Carrier("PubAck of a note", "llm.returned.mine-1", b"0"),
        Carrier("PubAck of an account", "llm.used", b"{}"),
        Carrier("PubAck of a dead letter", "llm.dead.low", b"x", {"Nats-Expected-Last-Sequence": "999999"}),
        Carrier("PubAck of a spilled request", "llm.ollama.low", b"x", {"Nats-Expected-Last-Sequence": "999999"}),
        Carrier("key of the moves", "$JS.API.DIRECT.GET.LLM_STATE.llm.leader.moves"),
        Carrier("pauses", "$JS.API.DIRECT.GET.LLM_STATE.llm.paused"),
        Carrier("note that is not there", "$JS.API.DIRECT.GET.LLM_STATE.llm.returned.nothing"),
        Carrier("state of a stream", "$JS.API.STREAM.INFO.LLM"),
        Carrier("list of consumers", "$JS.API.CONSUMER.LIST.LLM", b"{}"),
        Carrier("state of a consumer", "$JS.API.CONSUMER.INFO.LLM.high"),
        Carrier("state of the account", "$JS.API.INFO"),
        Carrier("result of a purge", "$JS.API.STREAM.PURGE.LLM_REPLIES", b'{"filter":"llm.reply.nothing"}'),
        Carrier("pull that finds nothing", "$JS.API.CONSUMER.MSG.NEXT.LLM.high_simple", _PULL),
    ),
}
# What a user may publish to itself, it may reach in any way.
OWN = {
    "engine": (
        "llm.out.",
        "llm.dead.",
        "llm.worker.",
        "llm.event.",
        "llm.returned.",
        "llm.ollama.",
        "$JS.ACK.",
        "$JS.API.STREAM.INFO.",
    ),
    "client": ("llm.cancel.", "$SRV."),
}


@dataclass
class Broker:
    """The server with accounts, the roles on it, and a listener that hears everything."""

    server: NatsServer
    listener: Client
    heard: list[Msg] = field(default_factory=list)

    def url(self, user: str) -> str:
        return f"nats://{user}:{user}@127.0.0.1:{self.server.port}"

    @asynccontextmanager
    async def connected(self, user: str) -> AsyncIterator[tuple[Client, list[str]]]:
        """A connection, and the permissions that the server says were violated."""
        refused: list[str] = []

        async def on_error(error: Exception) -> None:
            refused.append(str(error))

        nc = await nats.connect(self.url(user), inbox_prefix=f"_INBOX.{user}".encode(), error_cb=on_error)
        try:
            yield nc, refused
        finally:
            await nc.close()

    async def state(self) -> dict[str, object]:
        """What must not change: streams, consumers, the victim's answer, and the request that stays queued."""
        found: dict[str, object] = {}
        for stream in STREAMS:
            info = json.loads((await self.listener.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=10)).data)
            listed = await self.listener.request(f"$JS.API.CONSUMER.LIST.{stream}", b"{}", timeout=10)
            found[stream] = info["config"]
            found[f"{stream} consumers"] = sorted(c["name"] for c in json.loads(listed.data)["consumers"])
        for stream, subject in (("LLM_REPLIES", "llm.reply.victim"), ("LLM_STATE", "llm.leader.moves")):
            get = json.dumps({"last_by_subj": subject}).encode()
            message = await self.listener.request(f"$JS.API.DIRECT.GET.{stream}", get, timeout=10)
            found[subject] = (message.data, (message.headers or {}).get("Nats-Sequence"))
        position = await self.listener.request("llm.queue.position", QUEUED.encode(), timeout=10)
        found[QUEUED] = json.loads(position.data)["state"] in ("queued", "running")
        for stream in ("LLM_OLLAMA", "LLM_DEAD"):
            info = json.loads((await self.listener.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=10)).data)
            found[f"{stream} messages"] = info["state"]["messages"]
        return found


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    folder = tmp_path_factory.mktemp("accounts")
    with pytest.MonkeyPatch.context() as patch:
        for user in USERS:
            patch.setenv(f"NATS_{user.upper()}_PASSWORD", user)
        patch.setenv("NATS_STORE_DIR", str(folder))
        server = NatsServer(folder, conf="accounts.conf")
        server.start()
        try:
            with (
                role(server, "pipeline", "monitor", folder),
                role(server, "pipeline", "gateway", folder),
                role(server, "engine", "mlx", folder),
            ):
                yield server
        finally:
            server.stop()


@pytest.fixture
async def broker(roles: NatsServer) -> AsyncIterator[Broker]:
    url = f"nats://pipeline:pipeline@127.0.0.1:{roles.port}"
    listener = await nats.connect(url, inbox_prefix=b"_INBOX.pipeline")
    found = Broker(roles, listener)

    async def on_message(message: Msg) -> None:
        # Deliveries, and calls of the pipeline's own processes. Nothing that replies asks for a reply.
        is_own = message.reply.startswith(("$JS.ACK.", "_INBOX.pipeline."))
        if message.subject in TARGETS and not is_own:
            found.heard.append(message)

    async with Bus.connect(url, name="owner") as bus:
        answer = ErrorAnswer(VICTIM, 1, ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "It was cancelled.")))
        if await bus.last_message("LLM_REPLIES", "llm.reply.victim") is None:
            await bus.store("llm.out.victim", encode(answer), expected_last=0)
            body = b'{"prompt": "wait", "model": "at-ollama"}'
            await bus.store("llm.ollama.high", body, headers={"Nats-Msg-Id": QUEUED})
        async for message in bus.scan("LLM_REPLIES", "llm.reply.victim"):
            assert message.data
    await listener.subscribe(">", cb=on_message)
    await flushed(listener)
    try:
        yield found
    finally:
        await listener.close()


async def _settled(broker: Broker, nc: Client) -> None:
    """Everything that was sent has been replied to: each responder replies in order."""
    await flushed(nc)
    own = [("llm.request.low", b"x"), ("$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.nothing", b"")]
    for subject, body in own:
        await nc.request(subject, body, timeout=30)
    others = [("llm.out.settled", b"{}"), ("llm.returned.settled-1", b"0"), ("llm.ask.evil", b"x")]
    others += [("llm.queue.stats", b""), ("llm.cancel.settled", b""), ("$JS.API.STREAM.INFO.LLM", b"")]
    for subject, body in others:
        await broker.listener.request(subject, body, timeout=30)

    async def is_empty() -> bool:
        info = await broker.listener.request("$JS.API.STREAM.INFO.LLM", b"", timeout=30)
        return bool(json.loads(info.data)["state"]["messages"] == 0)

    await eventually(is_empty)
    await flushed(broker.listener)


def _headers(carrier: Carrier, target: str) -> dict[str, str] | None:
    return {name: value.format(target=target) for name, value in (carrier.headers or {}).items()} or None


def _may(user: str, target: str) -> bool:
    return target.startswith(OWN[user])


@pytest.mark.parametrize("user", ["client", "engine"])
async def test_no_reply_reaches_a_subject_that_its_user_may_not_publish_to(broker: Broker, user: str):
    before = await broker.state()
    await flushed(broker.listener)
    broker.heard.clear()
    result: Counter[str] = Counter()
    async with broker.connected(user) as (nc, refused):
        for carrier in CARRIERS[user]:
            targets = [target for target in TARGETS if not _may(user, target)]
            refused.clear()
            for target in targets:
                await nc.publish(carrier.subject, carrier.body, reply=target, headers=_headers(carrier, target))
            await _settled(broker, nc)
            assert [message.subject for message in broker.heard] == [], carrier
            assert not [text for text in refused if f'to "{carrier.subject.lower()}"' in text], carrier
            harmless = len(targets) - len(refused)
            result += Counter(attempts=len(targets), refused=len(refused), harmless=harmless)
            print(
                f"{user:<9} {carrier.what:<32} {len(targets):>3} targets: {len(refused)} refused, {harmless} harmless"
            )
    assert await broker.state() == before
    print(f"{user:<9} {'in all':<32} {result['attempts']} attempts: {dict(result)}")
    assert result["attempts"] >= 80


# ---- docs/security.md


def _rows() -> list[tuple[str, dict[str, str]]]:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- permissions -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert table is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    users = lines[0][1:]
    return [(row[0].strip("`"), dict(zip(users, row[1:], strict=True))) for row in lines[2:]]


def _literal(subject: str) -> str:
    return subject.replace("*", "high").replace(">", "high.x")


async def test_the_table_of_permissions_is_what_the_server_does(broker: Broker):
    wrong, rows = [], _rows()
    for user in USERS:
        async with broker.connected(user) as (nc, refused):
            for subject, _ in rows:
                # Refused by every stream, so that nothing comes of it.
                await nc.publish(_literal(subject), b"", headers={"Nats-Expected-Stream": "none"})
                await (await nc.subscribe(subject)).unsubscribe()
            # The server reports violations in order; every user is denied this one.
            await nc.publish("llm.reply.end", b"")
            await eventually(lambda said=refused: any('"llm.reply.end"' in text for text in said))
            for subject, cells in rows:
                publishes = not any(f'publish to "{_literal(subject)}"'.lower() in text.lower() for text in refused)
                listens = not any(f'subscription to "{subject}"'.lower() in text.lower() for text in refused)
                can = " ".join(["P"] * publishes + ["S"] * listens) or "-"
                if can != cells[user]:
                    wrong.append(f"{user} {subject}: {can}, the table says {cells[user]}")
    print(f"{len(USERS) * len(rows) * 2} permissions checked")
    assert not wrong, "\n".join(wrong)


# ---- what clients can still do to each other


async def test_a_move_shaped_id_is_refused_and_the_next_publisher_gets_its_own_answer(broker: Broker):
    async with broker.connected("client") as (nc, _):
        answers = await nc.subscribe("llm.reply.>")
        await flushed(nc)
        state = json.loads((await broker.listener.request("$JS.API.STREAM.INFO.LLM", b"", timeout=10)).data)["state"]
        due = state["last_seq"] + 2
        ack = await nc.request(
            "llm.request.low", b"evil", timeout=10, headers={"Nats-Msg-Id": f"LLM-{due}:complex:1-2"}
        )
        mine = json.loads((await nc.request("llm.request.low", b"honest", timeout=10)).data)["seq"]
        assert mine == due
        found = {}
        while not {f"LLM-{due - 1}", f"LLM-{due}"} <= set(found):
            message = json.loads((await answers.next_msg(30)).data)
            if message["object"] in ("chat.completion", "error"):
                found[message["id"]] = message
        assert found[f"LLM-{json.loads(ack.data)['seq']}"]["error"]["code"] == "invalid_request"
        assert "honest" in found[f"LLM-{mine}"]["choices"][0]["message"]["content"]


async def test_commands_work_over_accounts(broker: Broker):
    """A request that names an inbox, one that asks and one that reads late are answered across accounts."""
    async with broker.connected("client") as (nc, _):
        assert json.loads((await nc.request("llm.ask.high", b"x", timeout=30)).data)["object"] == "chat.completion"
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        ack = json.loads((await nc.request("llm.request.high", b"x", timeout=10, headers={"Reply-To": inbox})).data)
        assert json.loads((await answers.next_msg(30)).data)["id"] == f"LLM-{ack['seq']}"
        late = await nc.request(f"$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.LLM-{ack['seq']}", b"", timeout=10)
        assert json.loads(late.data)["object"] == "chat.completion"


async def test_what_is_no_answer_is_skipped_in_a_record(broker: Broker):
    """An engine writes what it should not: a position, a cancel and a later reader do not stumble over it."""
    async with broker.connected("engine") as (engine, _), broker.connected("client") as (nc, _):
        for body in (b'{"stream":"LLM","seq":1}', b"\xff", b"[]", b'{"object":"chat.completion.chunk","choices":[]}'):
            assert (await engine.request("llm.out.odd", body, timeout=10)).data
        position = json.loads((await nc.request("llm.queue.position", b"odd", timeout=10)).data)
        assert position["state"] == "unknown"
        assert json.loads((await nc.request("llm.cancel.odd", b"", timeout=10)).data)["state"] == "unknown"
        await nc.request("llm.request.high", b"x", timeout=10, headers={"Nats-Msg-Id": "odd"})

        async def ended() -> bool:
            message = await nc.request("$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.odd", b"", timeout=10)
            return message.data.startswith(b'{"object":"chat.completion"')

        await eventually(ended)
        assert json.loads((await nc.request("llm.queue.position", b"odd", timeout=10)).data)["state"] == "finished"


@pytest.mark.parametrize("service", ["llm.tokens", "llm.fetch"])
async def test_the_pipeline_asks_an_engine_and_a_client_cannot(broker: Broker, service: str):
    async with broker.connected("engine") as (engine, refused), broker.connected("client") as (client, _):

        async def on_question(message: Msg) -> None:
            await engine.publish(message.reply, b"an answer")

        await engine.subscribe(f"{service}.mine", cb=on_question)
        await flushed(engine)
        for _ in range(2):
            assert (await broker.listener.request(f"{service}.mine", b"", timeout=10)).data == b"an answer"
        assert refused == []
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await client.request(f"{service}.mine", b"", timeout=1)


async def test_workers_hear_once_what_each_has_used(broker: Broker):
    async with broker.connected("engine") as (one, _), broker.connected("engine") as (other, refused):
        heard: list[bytes] = []

        async def on_event(message: Msg) -> None:
            heard.append(message.data)

        await other.subscribe("llm.event.*.done", cb=on_event)
        await flushed(other)
        for number in range(3):
            await one.publish("llm.event.low.done", b"%d" % number)
        await flushed(one)
        await eventually(lambda: b"2" in heard)
        await flushed(other)
        assert (heard, refused) == ([b"0", b"1", b"2"], [])
