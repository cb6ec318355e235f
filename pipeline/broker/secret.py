"""The pipeline's secret on the broker: the key of `MoveIds`, which all its processes read when they connect.

It is a message of `LLM_STATE`, which clients cannot read, and made by the first process that finds none.
"""

from __future__ import annotations

import secrets
from contextlib import suppress

import msgspec

from pipeline.broker.jetstream import Bus, Fenced
from pipeline.core.moves import MoveIds
from pipeline.wire.subjects import LEADER, STREAM_REQUESTS, STREAM_STATE

_SUBJECT = f"{LEADER}.moves"
_KEY_BYTES = 32


class MoveSecret(msgspec.Struct):
    """The stored secret: the fields of `MoveIds`; `key` in base64."""

    key: bytes
    before: int = 0


async def learn_moves(bus: Bus) -> None:
    """Read the secret into the connection, or make it.

    Raises:
        Unreachable: the broker does not answer, or the streams do not exist.
        BusError: there is no secret, and this user may not make one.
    """
    found = await _read(bus)
    if found is None:
        # The requests that are stored by now were moved without this key.
        before = (await bus.stream_state(STREAM_REQUESTS)).last_seq
        made = MoveSecret(secrets.token_bytes(_KEY_BYTES), before)
        try:
            await bus.store(_SUBJECT, msgspec.json.encode(made), expected_last=0)
            found = made
        except Fenced:
            found = await _read(bus) or made
    bus.moves = MoveIds(found.key, found.before)


async def keep_moves(bus: Bus) -> None:
    """Store the secret of this process, if none is stored any more: processes that connect later must learn the same.

    Raises:
        BusError: the broker does not answer, or refuses.
    """
    with suppress(Fenced):
        await bus.store(_SUBJECT, msgspec.json.encode(MoveSecret(bus.moves.key, bus.moves.before)), expected_last=0)


async def _read(bus: Bus) -> MoveSecret | None:
    found = await bus.last_message(STREAM_STATE, _SUBJECT)
    return None if found is None else msgspec.json.decode(found[1], type=MoveSecret)
