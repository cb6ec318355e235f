"""The simulated engine: it runs no model, and takes as long as one would. Every answer begins with `[simulated]`.

A step lasts `slots / simulated_tokens_per_s` for any number of sequences, as if reading the weights took the time: the
rate is that of a full batch. Prefill adds its own time, in chunks, with the oldest prompt first. The text depends on
the request, its seed and the position alone, so that any engine can resume an answer.
"""

from __future__ import annotations

import time
from collections import deque

from consumers.engines.local.child.backend import Note, Prepared
from consumers.engines.local.child.checks import answer_limit, refuse_unsupported
from consumers.engines.local.child.seeds import key_bits
from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Facts
from pipeline.config import Config
from pipeline.engine import Work

CONTEXT_TOKENS = 32_768
CHARS_PER_TOKEN = 4
_STATEMENT = "[simulated] No model has read this request, which begins:".split()  # noqa: SIM905 - a sentence
_FILLER = "and so time passes while nothing at all is computed for the rest of an answer".split()  # noqa: SIM905
_ECHOED_WORDS = 8
_END = 0


class SimulatedBackend:
    """A batch whose sequences only take time."""

    def __init__(self, config: Config, note: Note) -> None:
        if config.simulated_load_s:
            note("simulating a model that loads")
            time.sleep(config.simulated_load_s)
        self._config = config
        self._prefilling: deque[tuple[int, int]] = deque()
        self._running: dict[int, Prepared] = {}
        self.facts = Facts(context_tokens=CONTEXT_TOKENS, vocabulary=1 << 16, calls_tools=False, kv_bytes_per_token=0)

    def prepare(self, key: int, work: Work) -> Prepared:
        """As `Backend.prepare`. Tokens number the words of this answer; 0 ends it."""
        refuse_unsupported(work.request, calls_tools=False)
        text = "\n".join(message.text() for message in work.request.chat)
        prompt_tokens = max(1, len(text) // CHARS_PER_TOKEN)
        limit = answer_limit(
            work.request.token_limit,
            prompt_tokens=prompt_tokens,
            room_tokens=CONTEXT_TOKENS,
            default=self._config.default_max_tokens,
        )
        words = ["", *_STATEMENT, *text.split()[:_ECHOED_WORDS], "...", *_FILLER]
        transcript = Transcript(
            work.id,
            prompt_tokens,
            limit,
            _Words(words),
            end_tokens={_END},
            stops=work.request.stops,
            # Text by another engine is not part of this answer, which follows after it.
            resume_chars=len(work.resume_text) if work.resume_tokens else 0,
        )
        prompt = [1] * prompt_tokens + work.resume_tokens
        return Prepared(key, prompt, len(work.resume_tokens), transcript, (work.seed, len(words)))

    def insert(self, sequence: Prepared) -> None:
        """As `Backend.insert`."""
        self._running[sequence.key] = sequence
        self._prefilling.append((sequence.key, len(sequence.prompt)))

    def remove(self, key: int) -> None:
        """As `Backend.remove`."""
        self._running.pop(key, None)
        self._prefilling = deque(entry for entry in self._prefilling if entry[0] != key)

    def step(self) -> list[tuple[int, int]]:
        """As `Backend.step`. It blocks for as long as a model would."""
        waiting = {key for key, _ in self._prefilling}
        decoding = [sequence for key, sequence in self._running.items() if key not in waiting]
        duration_s = self._prefill()
        if decoding:
            duration_s += self._config.slots / self._config.simulated_tokens_per_s
        time.sleep(duration_s)
        sampled = [(sequence.key, self._token(sequence)) for sequence in decoding]
        for sequence in decoding:
            sequence.position += 1
        return sampled

    def _prefill(self) -> float:
        """Prefill what fits in one step, the oldest prompt first. Returns its duration in seconds."""
        room = self._config.prefill_step_tokens
        while self._prefilling and room:
            key, left = self._prefilling.popleft()
            tokens = min(left, room)
            room -= tokens
            if left > tokens:
                self._prefilling.appendleft((key, left - tokens))
        return (self._config.prefill_step_tokens - room) / self._config.simulated_prefill_tokens_per_s

    def _token(self, sequence: Prepared) -> int:
        seed, words = sequence.detail
        if sequence.position >= self._config.simulated_answer_tokens - 1:
            return _END
        fixed = words - len(_FILLER) - 1
        if sequence.position < fixed:
            return sequence.position + 1
        return fixed + 1 + key_bits(seed, sequence.position) % len(_FILLER)

    def reset(self) -> None:
        """As `Backend.reset`."""
        self._running.clear()
        self._prefilling.clear()

    def kv_bytes(self) -> int:
        """As `Backend.kv_bytes`. There is no cache."""
        return 0

    def close(self) -> None:
        """As `Backend.close`. There is nothing to free."""


class _Words:
    """A detokenizer for the words of one answer."""

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._first = True

    def push(self, token: int) -> str:
        """The word, after a space unless it is the first. A token without a word has no text."""
        word = self._words[token] if 0 <= token < len(self._words) else ""
        separator, self._first = "" if self._first else " ", False
        return separator + word

    def flush(self) -> str:
        """Empty: words are never held back."""
        return ""
