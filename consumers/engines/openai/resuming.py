"""Continues an answer that another attempt began: from its text if the server can, else from its start. No I/O.

A server can do it if it can leave the assistant's last turn open. Otherwise the request is sent again, and the new
answer must begin with the text that the client has seen. It does if the text is deterministic: at temperature 0, or
with a seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engine import Piece
from pipeline.wire.errors import ErrorCode, HeadraceError

# A text that is one token in any vocabulary.
PROBE = "a"
_OF_THE_PROMPT = ("model", "messages", "prompt", "tools", "chat_template_kwargs")


@dataclass(slots=True)
class Beginning:
    """What another attempt wrote of an answer.

    Attributes:
        left: the text that the server is still expected to repeat; empty if it goes on after the text.
        prompted_tokens: how many tokens of the text the server read as a part of the prompt.
    """

    left: str = ""
    prompted_tokens: int = 0

    def cut(self, piece: Piece) -> None:
        """Leave out of a piece what the client has seen.

        Raises:
            HeadraceError: `engine_failed`: the server writes another text.
        """
        if not self.left:
            return
        # The client has the thoughts that led to the text.
        piece.reasoning, piece.scores = "", []
        common = min(len(self.left), len(piece.text))
        if piece.text[:common] != self.left[:common]:
            raise _another_text()
        piece.text, self.left = piece.text[common:], self.left[common:]

    def check_reached(self) -> None:
        """Check at the end that the whole text was repeated; raises as `cut`."""
        if self.left:
            raise _another_text()


def _another_text() -> HeadraceError:
    return HeadraceError(
        ErrorCode.ENGINE_FAILED,
        "The answer broke off. The server cannot continue it, and wrote another text when it was asked again.",
    )


def may_be_open(body: Mapping[str, Any]) -> bool:
    """Whether an answer can go on in an open turn: what shapes an answer as a whole does not know its beginning."""
    return not any(body.get(name) for name in ("tools", "response_format", "structured_outputs"))


def with_open_turn(body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The body of a call whose answer goes on after text.

    vLLM and SGLang need the two flags. llama.cpp's server and LM Studio leave a last turn of the assistant open.
    """
    if "prompt" in body:
        return {**body, "prompt": body["prompt"] + text}
    turn = {"role": "assistant", "content": text}
    return {
        **body,
        "messages": [*body["messages"], turn],
        "add_generation_prompt": False,
        "continue_final_message": True,
    }


def counting(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a call that shows how many tokens a prompt has, as cheaply as possible."""
    kept = {name: body[name] for name in _OF_THE_PROMPT if name in body}
    flags = {name: body[name] for name in ("add_generation_prompt", "continue_final_message") if name in body}
    return kept | flags | {"max_tokens": 1, "temperature": 0.0, "stream": False}


def with_next_turn(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a call after whose answer, `PROBE`, the user says `PROBE` as well."""
    turns = [{"role": role, "content": PROBE} for role in ("assistant", "user")]
    return {**body, "messages": [*body["messages"], *turns]}


def may_leave_open(prompt: int, probed: int) -> bool:
    """Whether a server may have left the assistant's turn open, from the tokens of a prompt without and with `PROBE`.

    A server that closes the turn adds the tokens that end it and that begin the next.
    """
    return probed - prompt == 1


def counts_turns(probed: int, followed: int) -> bool:
    """Whether a server counts the tokens around a turn, from those of a prompt before and after `with_next_turn`.

    One that counts the words of a conversation alone does not show whether it closes a turn.
    """
    return followed - probed > 1
