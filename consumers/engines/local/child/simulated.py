"""The simulated engine: it runs no model, and takes as long as one would. Answers begin with `[simulated]`.

A step lasts `slots / simulated_tokens_per_s` for any number of sequences, as if reading the weights took the time: the
rate is that of a full batch. If `slots` is 0, a full batch has as many sequences as a model begins with. Reading
prompts takes its own time. The text depends on the request, its seed and the position alone, so that any engine can
resume an answer. An answer that must have a form is the simplest text that has it. Tools may be offered; none is
called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from consumers.engines.local.child.backend import Note, Prepared, Suspended
from consumers.engines.local.child.checks import answer_limit, notes_of, refuse_unsupported
from consumers.engines.local.child.instance import simplest
from consumers.engines.local.child.prompt_files import PromptFiles
from consumers.engines.local.child.seeds import key_bits
from consumers.engines.local.child.transcript import Transcript
from consumers.engines.local.protocol import Facts
from pipeline.config import Config
from pipeline.core.batch_plan import FetchKept, Keep, Restore, StoreKept
from pipeline.engine import FIRST_SLOTS, Work
from pipeline.wire.answers import Alternative, TokenScore
from pipeline.wire.requests import ChatRequest

CONTEXT_TOKENS = 32_768
CHARS_PER_TOKEN = 4
_STATEMENT = "[simulated] No model has read this request, which begins:".split()  # noqa: SIM905 - a sentence
_FILLER = "and so time passes while nothing at all is computed for the rest of an answer".split()  # noqa: SIM905
_ECHOED_WORDS = 8
_END = 0


class SimulatedBackend:
    """Sequences that only take time."""

    on_cpu = False
    files: PromptFiles | None = None

    def __init__(self, config: Config, note: Note) -> None:
        if config.simulated_load_s:
            note("simulating a model that loads")
            time.sleep(config.simulated_load_s)
        self._config = config
        self.batch = SimulatedBatch(config)
        self.facts = Facts(
            context_tokens=CONTEXT_TOKENS,
            vocabulary=1 << 16,
            calls_tools=True,
            kv_bytes_per_token=0,
            slots=_slots(config),
        )

    def prepare(self, key: int, work: Work) -> Prepared:
        """As `Backend.prepare`. Tokens number the words of this answer; 0 ends it."""
        text, prompt_tokens = _text(work.request), self.count_tokens(work.request)
        limit = answer_limit(
            work.request.token_limit,
            prompt_tokens=prompt_tokens,
            room_tokens=CONTEXT_TOKENS,
            default=self._config.default_max_tokens,
        )
        form = simplest(work.request)
        words = ["", *_STATEMENT, *text.split()[:_ECHOED_WORDS], "...", *_FILLER]
        if form:
            words = ["", *(form[at : at + CHARS_PER_TOKEN] for at in range(0, len(form), CHARS_PER_TOKEN))]
        transcript = Transcript(
            prompt_tokens,
            limit,
            _Words(words, separator="" if form else " "),
            end_tokens={_END},
            stops=work.request.stops,
            # Text by another engine is not part of this answer, which follows after it.
            resume_chars=len(work.resume_text) if work.resume_tokens else 0,
            notes=notes_of(work.request, simulated=True),
            score=_certain(words) if work.request.alternatives is not None else None,
        )
        prompt = [1] * prompt_tokens + work.resume_tokens
        return Prepared(key, prompt, len(work.resume_tokens), transcript, (work.seed, len(words), bool(form)))

    def count_tokens(self, request: ChatRequest) -> int:
        """As `Backend.count_tokens`. A token is as long as some characters."""
        refuse_unsupported(request, calls_tools=True)
        return max(1, len(_text(request)) // CHARS_PER_TOKEN)

    def drafted(self) -> tuple[int, int]:
        """As `Backend.drafted`. There is no draft model."""
        return 0, 0

    def insert(self, sequence: Prepared) -> None:
        """As `Backend.insert`."""
        self.batch.add(sequence)

    def reset(self, *, alone: str = "") -> None:  # noqa: ARG002 - nothing is computed
        """As `Backend.reset`."""
        self.batch = SimulatedBatch(self._config)

    def close(self) -> None:
        """As `Backend.close`. There is nothing to free."""


def _slots(config: Config) -> int:
    return config.slots or FIRST_SLOTS


def _text(request: ChatRequest) -> str:
    return "\n".join(message.text() for message in request.chat)


@dataclass(slots=True)
class _Place:
    """A sequence, how many of its tokens are still to be read, and how many were sampled here."""

    sequence: Prepared
    left: int
    sampled: int = 0
    suspended: bool = False


class SimulatedBatch:
    """A `Batch` without a model. Its caches have no size."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._places: dict[int, _Place] = {}
        self.ahead = 0

    def add(self, sequence: Prepared) -> None:
        """Take a sequence. Nothing of it has been read."""
        self._places[sequence.key] = _Place(sequence, len(sequence.prompt))

    def read(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `Batch.read`. It blocks for as long as a model would."""
        time.sleep(sum(tokens for _, tokens in pieces) / self._config.simulated_prefill_tokens_per_s)
        done = []
        for key, tokens in pieces:
            place = self._places[key]
            place.left -= tokens
            if not place.left:
                done.append((key, self._token(place)))
        return done

    def join(self, keys: list[int]) -> None:
        """As `Batch.join`."""
        for key in keys:
            self._places[key].left = 0

    def step(self) -> list[tuple[int, int]]:
        """As `Batch.step`. It blocks for as long as a model would."""
        time.sleep(_slots(self._config) / self._config.simulated_tokens_per_s)
        decoding = [(key, place) for key, place in self._places.items() if not (place.left or place.suspended)]
        return [(key, self._token(place)) for key, place in decoding]

    def suspend(self, keys: list[int]) -> Suspended:
        """As `Batch.suspend`."""
        for key in keys:
            self._places[key].suspended = True
        return Suspended(dict.fromkeys(keys, 0), [])

    def drop(self, key: int) -> None:
        """As `Batch.drop`."""
        place = self._places[key]
        place.left = len(place.sequence.prompt) + place.sampled

    def resume(self, keys: list[int]) -> None:
        """As `Batch.resume`."""
        for key in keys:
            self._places[key].suspended = False

    def remove(self, key: int) -> None:
        """As `Batch.remove`."""
        self._places.pop(key, None)

    def cached(self, key: int) -> list[int]:  # noqa: ARG002 - as in the interface
        """As `Batch.cached`. There is no cache."""
        return []

    def keep(self, keep: Keep) -> int:
        """As `Batch.keep`. Nothing is kept of a simulated sequence."""
        raise NotImplementedError

    def load(self, load: Restore) -> None:
        """As `Batch.load`."""
        raise NotImplementedError

    def fetch(self, fetch: FetchKept) -> int:
        """As `Batch.fetch`."""
        raise NotImplementedError

    def store(self, store: StoreKept) -> int:
        """As `Batch.store`."""
        raise NotImplementedError

    def free(self, handles: list[int]) -> None:
        """As `Batch.free`."""

    def kv_bytes(self) -> int:
        """As `Batch.kv_bytes`. There is no cache."""
        return 0

    def _token(self, place: _Place) -> int:
        sequence = place.sequence
        (seed, words, has_form), position = sequence.detail, sequence.position
        sequence.position += 1
        place.sampled += 1
        if has_form:
            return position + 1 if position + 1 < words else _END
        if position >= self._config.simulated_answer_tokens - 1:
            return _END
        fixed = words - len(_FILLER) - 1
        if position < fixed:
            return position + 1
        return fixed + 1 + key_bits(seed, position) % len(_FILLER)


def _certain(words: list[str]) -> Callable[[int], TokenScore]:
    """The scores of an answer in which nothing is left to chance."""

    def score(token: int) -> TokenScore:
        word = words[token] if token == 1 else f" {words[token]}"
        return TokenScore(word, 0.0, list(word.encode()), [Alternative(word, 0.0, list(word.encode()))])

    return score


class _Words:
    """A detokenizer for the words of one answer."""

    def __init__(self, words: list[str], separator: str) -> None:
        self._words = words
        self._separator = separator
        self._first = True

    def push(self, token: int) -> str:
        """The word, after a separator unless it is the first. A token without a word has no text."""
        word = self._words[token] if 0 <= token < len(self._words) else ""
        separator, self._first = "" if self._first else self._separator, False
        return separator + word

    def flush(self) -> str:
        """Empty: words are never held back."""
        return ""
