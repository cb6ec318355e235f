"""`headrace dead`: list, show, replay and purge the dead letters."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.broker.letters import Chosen, Row, as_row, letters
from pipeline.broker.letters import purge as purge_one
from pipeline.broker.letters import replay as replay_one
from pipeline.commands import run_client, say, say_json, tell
from pipeline.core.letters import DeadLetter
from pipeline.process.terminal import visible
from pipeline.wire.validation import UNREADABLE

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}
_AGE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd])", re.ASCII)


def age_s(text: str) -> float:
    """Return the seconds in an age such as `90s`, `30m`, `12h` or `7d`.

    Raises:
        ValueError: the text is not an age.
    """
    found = _AGE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _UNITS_S[found[2]]


def show_list(url: str, chosen: Chosen, *, as_json: bool) -> int:
    """Print the letters, oldest first, as a table or as a JSON array. Return the exit code."""
    return _run(partial(_list, chosen=chosen, as_json=as_json), url)


def show(url: str, chosen: Chosen) -> int:
    """Print whole letters. Return 1 if there is none, else 0."""
    return _run(partial(_show, chosen=chosen), url)


def replay(url: str, chosen: Chosen) -> int:
    """Put requests back on their lanes, oldest first. Return 1 if there is none or a lane is full, else 0."""
    return _run(partial(_replay, chosen=chosen), url)


def purge(url: str, chosen: Chosen) -> int:
    """Delete letters. Return 1 if an id was given that no letter has, else 0."""
    return _run(partial(_purge, chosen=chosen), url)


def _run(work: Callable[[Bus], Coroutine[Any, Any, int]], url: str) -> int:
    async def on_the_brokers_clock(bus: Bus) -> int:
        await bus.sample_clock()  # a letter's age is the broker's time minus its time of storing
        return await work(bus)

    return run_client(on_the_brokers_clock, url, name="headrace dead")


async def _list(bus: Bus, *, chosen: Chosen, as_json: bool) -> int:
    now = bus.clock.wall()
    rows = [as_row(letter, now) async for letter in letters(bus, chosen)]
    if as_json:
        say_json(msgspec.json.format(msgspec.json.encode(rows)))
    elif rows:
        _print_table(rows)
    else:
        tell("There are no dead letters.")
    return 0


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console  # noqa: PLC0415 - not needed for JSON
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "priority", "code", "attempts", "age", "trace id"):
        table.add_column(column, justify="right" if column in ("attempts", "age") else "left", overflow="fold")
    for row in rows:
        cells = (row.id, row.priority, row.code, str(row.attempts), _age(row.age_s), row.trace_id or "-")
        table.add_row(*(visible(cell, keep="") for cell in cells))
    Console(highlight=False, markup=False).print(table)


def _age(seconds: float) -> str:
    """An age in the largest unit of which it has at least two."""
    unit = next((unit for unit in "dhm" if seconds >= 2 * _UNITS_S[unit]), "s")
    return f"{seconds / _UNITS_S[unit]:.0f} {unit}"


async def _show(bus: Bus, *, chosen: Chosen) -> int:
    count = 0
    async for letter in letters(bus, chosen):
        if count:
            say()
        say(_text(letter))
        count += 1
    return 0 if count else _none(chosen)


def _text(letter: DeadLetter) -> str:
    """A letter as text: the error, the headers and the body of its request."""
    what = {
        "id": letter.id,
        "priority": letter.priority,
        "died at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.died_at)),
        "subject": letter.subject or "-",
        "attempts": str(letter.attempts),
        "trace id": letter.trace_id or "-",
        "error": f"{letter.error.code}: {letter.error.message}",
    }
    lines = [f"{name + ':':<10}{value}" for name, value in what.items()]
    lines += ["", "headers:", *(f"  {name}: {value}" for name, value in sorted(letter.headers.items()))]
    return visible("\n".join([*lines, "", "body:", _body(letter.body)]))


def _body(body: bytes) -> str:
    """A body as text; JSON is indented."""
    try:
        return msgspec.json.format(body, indent=2).decode()
    except UNREADABLE:
        return body.decode(errors="backslashreplace")


async def _replay(bus: Bus, *, chosen: Chosen) -> int:
    # Only the latest letter of each id: the broker would take a second request with that id for a duplicate.
    latest = {letter.id: letter.sequence async for letter in letters(bus, chosen)}
    if not latest:
        return _none(chosen)
    full = False
    for sequence in sorted(latest.values()):
        replayed = await replay_one(bus, sequence)
        if replayed is None:
            continue
        full |= replayed.full
        if replayed.full:
            tell(
                f"headrace: Request {visible(replayed.id, keep='')} was not replayed because the lane "
                f"{replayed.subject} is full. Replay it later."
            )
        else:
            say(visible(f"{replayed.id}: queued on {replayed.subject}", keep=""))
    return 1 if full else 0


async def _purge(bus: Bus, *, chosen: Chosen) -> int:
    found = [letter.sequence async for letter in letters(bus, chosen)]
    if chosen.id is not None and not found:
        return _none(chosen)
    count = sum([await purge_one(bus, sequence) for sequence in found])
    say(f"{count} dead letter{'s' if count != 1 else ''} deleted")
    return 0


def _none(chosen: Chosen) -> int:
    tell("headrace: " + (f"No dead letter has the id {chosen.id}." if chosen.id else "There are no dead letters."))
    return 1
