"""The simplest text of a form, for the simulated engine: no model chooses anything.

llguidance walks the form byte by byte. Where it leaves a choice, the walk takes what ends the text soonest: a closing
quote before a letter, a sign before a digit, no optional property.
"""

from __future__ import annotations

from typing import Any, Final

from consumers.engines.local.child.grammars import grammar_of, refusal
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

_MOST_BYTES: Final = 4096
_END: Final = 256
_IN_TEXT: Final = b'"'
_BETWEEN: Final = b'}]"'
_SOONEST: Final = tuple(b",!#$%&()*+/:;<=>?@[]^_|{0123456789-.abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")


class _Bytes:
    """A vocabulary whose tokens are the bytes, as llguidance reads one."""

    eos_token_id = _END
    bos_token_id = None
    tokens: Final = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    special_token_ids: Final = [_END]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return list(text)


def simplest(request: ChatRequest) -> str:
    """The simplest text of the form that a request asks for; empty if it asks for none.

    Raises:
        HeadraceError: `invalid_request`: the form cannot be compiled. `unsupported_parameter`: the text is too long, or
            it must be a tool call.
    """
    if request.forces_tools:
        message = "The simulated engine calls no tools. Leave `tool_choice` out."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="tool_choice")
    if request.constraint is None:
        return ""
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    param = request.constraint.param
    vocabulary = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=len(_Bytes.tokens))
    matcher = LLMatcher(vocabulary, grammar_of(request, None), log_level=0)
    text = bytearray()
    while not matcher.is_error() and not matcher.is_accepting() and len(text) < _MOST_BYTES:
        text.append(_next(matcher))
    if matcher.is_error():
        raise refusal(matcher.get_error(), param)
    if not matcher.is_accepting():
        message = "The simulated engine writes short texts only, and this form has none."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
    return text.decode(errors="replace")


def _next(matcher: Any) -> int:
    """The byte that is read next."""
    bits = matcher.compute_bitmask()
    allowed = [byte for byte in range(256) if bits[byte // 8] >> byte % 8 & 1]
    # Within a text, most characters are allowed, and a quote ends it. Elsewhere, it begins one.
    ends = _IN_TEXT if ord("~") in allowed else _BETWEEN
    chosen = next((byte for byte in (*ends, *_SOONEST) if byte in allowed), allowed[0] if allowed else 0)
    matcher.consume_token(chosen)
    return chosen
