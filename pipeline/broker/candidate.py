"""Decides with a lease which of several processes of a role acts. The holder renews it; the others wait for its end."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.aio import wait_set
from pipeline.broker import topology
from pipeline.broker.connection import BusError, Message, NoResponders, ServiceFailed, Unreachable
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.config import Config
from pipeline.core.leadership import LOOK_EVERY_S, RENEW_EVERY_S, Leadership, Voice
from pipeline.wire.subjects import STREAM_STATE
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

_RETRY_AFTER_S = 0.2
_VOICE_TIMEOUT_S = 0.5


class LeaseNote(msgspec.Struct):
    """The stored lease: the process that holds it. Each process has its own `token`, and replies at its own `inbox`."""

    holder: str
    token: str
    inbox: str = ""


_note_decoder = msgspec.json.Decoder(LeaseNote)


@dataclass(slots=True)
class Candidate:
    """Holds the lease of a role or stands by for it.

    Args:
        bus: the connection.
        config: the settings, to restore the lease's stream.
        name: the name of this process.
        subject: of the lease.
        voice: the subject of a service at which only the process that acts replies; empty if the role has none. If no
            process replies there, the holder is asked at the inbox in its lease.
        on_change: called when this process takes the lease (True) or learns that another one holds it (False).
    """

    bus: Bus
    config: Config
    name: str
    on_change: Callable[[bool], Awaitable[None]]
    subject: str
    voice: str = ""
    _leadership: Leadership = field(init=False, default_factory=Leadership)
    _token: str = field(init=False, default_factory=lambda: secrets.token_hex(8))
    _inbox: str = field(init=False, default="")
    _holder_inbox: str = field(init=False, default="")
    _told: bool | None = field(init=False, default=None)
    _sooner: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def leads(self) -> bool:
        """Whether this process may act now."""
        return self._leadership.leads(self.bus.clock.now())

    async def run(self) -> None:
        """Renew the lease or stand by until cancelled."""
        self._inbox = self.bus.new_inbox()
        await self.bus.subscribe(self._inbox, self._on_question)
        self.bus.on_reconnect(self._on_reconnect)
        while True:
            self._sooner.clear()
            try:
                pause_s = await (self._renew() if self._leadership.holds else self._look())
            except BusError as error:
                log.debug("The lease %s: %s", self.subject, error)
                pause_s = _RETRY_AFTER_S
            await wait_set(self._sooner, pause_s)

    def _on_reconnect(self) -> None:
        self._leadership.doubt()
        self._sooner.set()

    async def _renew(self) -> float:
        """Renew the lease. Returns the pause until the next renewal."""
        try:
            await self._write()
        except Fenced:
            # If the reply to a write was lost, that write is the last one.
            if not await self._is_ours():
                log.warning("Another process took the lease %s. This one stands by.", self.subject)
                await self._tell(holds=False)
                return 0.0
        return RENEW_EVERY_S

    async def _look(self) -> float:
        """Take the lease if it has run out. Returns the pause until the next look."""
        await self._is_ours()
        voice = await self._voice()
        if self._leadership.may_take(self.bus.clock.now(), voice):
            try:
                await self._write()
            except Fenced:
                return 0.0
            log.info("This process leads: it has the lease %s.", self.subject)
            await self._tell(holds=True)
            return RENEW_EVERY_S
        await self._tell(holds=False)
        return LOOK_EVERY_S

    async def _is_ours(self) -> bool:
        """Read the lease. Returns whether this process wrote it."""
        found = await self.bus.last_message(STREAM_STATE, self.subject)
        sequence, data = found or (0, b"")
        note = _read(data)
        if found is not None and note.token == self._token:
            self._leadership.sequence = sequence
            return True
        self._holder_inbox = note.inbox
        self._leadership.heard(sequence, self.bus.clock.now())
        return False

    async def _voice(self) -> Voice:
        """Whether a process replies. A version without the lease replies too, and is left alone."""
        if self.voice:
            try:
                await self.bus.request(self.voice, timeout_s=_VOICE_TIMEOUT_S)
            except NoResponders:
                # One that has just taken the lease replies there a moment later. An older version writes no inbox.
                if not self._holder_inbox:
                    return "absent"
            except ServiceFailed:
                return "answers"
            except Unreachable:
                return "silent"
            else:
                return "answers"
        return "absent" if await self._is_gone(self._holder_inbox) else "silent"

    async def _is_gone(self, inbox: str) -> bool:
        """Whether the connection of the process with this inbox has ended. An older version writes no inbox."""
        if not inbox:
            return False
        try:
            await self.bus.request(inbox, timeout_s=_VOICE_TIMEOUT_S)
        except NoResponders:
            return True
        except Unreachable:
            return False
        return False

    async def _on_question(self, question: Message) -> None:
        await self.bus.publish(question.reply, b"")

    async def _write(self) -> None:
        sent_at = self.bus.clock.now()
        note = msgspec.json.encode(LeaseNote(self.name, self._token, self._inbox))
        try:
            ack = await self.bus.put(self.subject, note, expected_last=self._leadership.sequence, patience_s=0.0)
        except NoResponders:
            # A process of a version without the lease has reset the stream's subjects.
            await self._restore()
            raise
        self._leadership.renewed(ack.sequence, sent_at)

    async def _restore(self) -> None:
        try:
            await topology.apply(self.bus.js, self.config)
        except topology.TopologyError as error:
            log.warning("The lease %s cannot be stored: %s", self.subject, error)

    async def _tell(self, *, holds: bool) -> None:
        if holds is not self._told:
            self._told = holds
            await self.on_change(holds)


def _read(data: bytes) -> LeaseNote:
    try:
        return _note_decoder.decode(data)
    except UNREADABLE:
        return LeaseNote("", "")
