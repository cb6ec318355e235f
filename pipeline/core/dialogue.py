"""A conversation in the forms that strict chat templates take.

Many templates refuse a system message, two turns of one role in a row, or a conversation that the assistant begins.
`variants` yields the conversation as it is, then rewritten step by step, the mildest change first. The caller renders
each until one is taken. No text of the conversation is lost in any of them.

A turn is a dict with `role` and `content` (text), and what else the template reads, such as `tool_calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

Turn = dict[str, Any]

BEGINNING: Final = "Begin."
"""The user's turn that is put before an assistant's where a template wants the user first."""

_BETWEEN: Final = "\n\n"


class Variant(NamedTuple):
    """One form of a conversation.

    Attributes:
        turns: the conversation.
        notes: what was changed, a sentence each.
    """

    turns: list[Turn]
    notes: list[str]


def variants(turns: Sequence[Turn]) -> Iterator[Variant]:
    """The conversation as it is, then each form of it that differs from those before."""
    seen = [_without_empty_end(turns)]
    yield Variant(seen[0], [])
    for changes in _STEPS:
        changed, notes = seen[0], list[str]()
        for change, note in changes:
            after = change(changed)
            if after != changed and note:
                notes.append(note)
            changed = after
        if changed not in seen:
            seen.append(changed)
            yield Variant(changed, notes)


def unfinished(turns: Sequence[Turn]) -> str:
    """The text of an assistant's turn at the end, which the answer continues; empty if there is none."""
    last = turns[-1]
    return str(last["content"]) if last["role"] == "assistant" and not last.get("tool_calls") else ""


def is_kept(turns: Sequence[Turn], rendered: str) -> bool:
    """Whether a rendered conversation has the text of each system turn. Some templates drop it without an error."""
    text = _squeezed(rendered)
    return all(_squeezed(turn["content"]) in text for turn in turns if turn["role"] == "system")


def as_plain_text(turns: Sequence[Turn]) -> str:
    """The prompt of a model without a chat template: a single turn as it is, and else a script to be continued."""
    if len(turns) == 1 and turns[0]["role"] == "user":
        return str(turns[0]["content"])
    lines = [turn["content"] if turn["role"] == "system" else _line(turn) for turn in turns]
    return _BETWEEN.join(lines) if unfinished(turns) else _BETWEEN.join([*lines, _NEXT])


USER_LINE: Final = f"{_BETWEEN}User:"
"""What a model without a chat template writes when its answer is over and it goes on with the script."""

_NEXT: Final = "Assistant:"


def _line(turn: Turn) -> str:
    return f"{turn['role'].capitalize()}: {turn['content']}"


def _without_empty_end(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation without an assistant's turn at its end that says nothing: it stands for the answer."""
    last = turns[-1]
    empty = last["role"] == "assistant" and not last["content"] and not last.get("tool_calls")
    return list(turns[:-1] if empty and len(turns) > 1 else turns)


def _squeezed(text: str) -> str:
    return "".join(text.split())


# ---- changes ---------------------------------------------------------------------------------------------------------


def _join_neighbours(turns: list[Turn]) -> list[Turn]:
    """Turns of one role in a row as one. Each result of a tool stays a turn of its own."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"] != "tool":
            joined[-1] = _together(joined[-1], turn)
        else:
            joined.append(turn)
    return joined


def _together(first: Turn, second: Turn) -> Turn:
    texts = [turn["content"] for turn in (first, second) if turn["content"]]
    both = {**first, **second, "content": _BETWEEN.join(texts)}
    if calls := [*first.get("tool_calls", ()), *second.get("tool_calls", ())]:
        both["tool_calls"] = calls
    return both


def _fold_later_systems(turns: list[Turn]) -> list[Turn]:
    """System turns after the first turn become the user's."""
    return turns[:1] + _as_users(turns[1:])


def _fold_all_systems(turns: list[Turn]) -> list[Turn]:
    """All system turns become the user's."""
    return _as_users(turns)


def _as_users(turns: list[Turn]) -> list[Turn]:
    return [{**turn, "role": "user"} if turn["role"] == "system" else turn for turn in turns]


def _let_the_user_begin(turns: list[Turn]) -> list[Turn]:
    """A short turn of the user before an assistant's that comes first. A system turn stays in front."""
    at = next((at for at, turn in enumerate(turns) if turn["role"] != "system"), None)
    if at is None or turns[at]["role"] != "assistant":
        return turns
    return [*turns[:at], {"role": "user", "content": BEGINNING}, *turns[at:]]


_Change = tuple[Callable[[list[Turn]], list[Turn]], str]

_NEIGHBOURS: Final[_Change] = (
    _join_neighbours,
    "Neighbouring messages of one role were merged for the chat template.",
)
_LATER: Final[_Change] = (
    _fold_later_systems,
    "The chat template takes a system message only at the beginning. Later ones were put into the user's turn.",
)
_ALL: Final[_Change] = (
    _fold_all_systems,
    "The chat template takes no system message. It was put into the user's turn.",
)
_FIRST: Final[_Change] = (
    _let_the_user_begin,
    f'The chat template wants the user to begin. A user message "{BEGINNING}" was put before the assistant\'s.',
)
_AGAIN: Final[_Change] = (_join_neighbours, "")

_STEPS: Final = (
    (_NEIGHBOURS,),
    (_NEIGHBOURS, _LATER, _AGAIN),
    (_NEIGHBOURS, _LATER, _FIRST, _AGAIN),
    (_NEIGHBOURS, _ALL, _AGAIN),
    (_NEIGHBOURS, _ALL, _FIRST, _AGAIN),
)
"""Sequences of changes, tried in this order."""
