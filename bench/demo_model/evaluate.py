"""Measures the demo model: the exact answers to questions, in trained and in held-out phrasings, words and places.

python -m bench.demo_model.evaluate [FOLDER]
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
from mlx_lm import batch_generate, load

from bench.demo_model import curriculum, lexicon, offtopic, phrases, probes, stories
from bench.demo_model.curriculum import Draw, Lesson
from consumers.demo_model import PATH

MAX_TOKENS: Final = 420
BATCH: Final = 16
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


class Trial(NamedTuple):
    """A lesson whose last message is the expected answer, and its row in the table."""

    row: str
    lesson: Lesson


def _ask(question: str, answer: str) -> Lesson:
    return Lesson(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def _drawn(rng: random.Random, count: int) -> Iterator[Trial]:
    """``count`` lessons of each kind as in training, and ``count`` with held-out phrasings, words and places."""
    for held_out, kind in itertools.product((False, True), curriculum.KINDS):
        for _ in range(count):
            row = f"{kind}, {'new' if held_out else 'trained'} phrasing"
            yield Trial(row, curriculum.lesson(Draw(rng, held_out=held_out), kind))


def _complete() -> Iterator[Trial]:
    """Every capital in both languages, every sum, and the long answers, in the simplest phrasing."""
    for country in lexicon.COUNTRIES:
        answer = f"The capital of {country.name} is {country.capital}."
        yield Trial("every capital, English", _ask(f"What is the capital of {country.name}?", answer))
        answer_ru = f"Столица {country.of_ru} — {country.capital_ru}."
        yield Trial("every capital, Russian", _ask(f"Какая столица {country.of_ru}?", answer_ru))
    addends = range(curriculum.MAX_ADDEND + 1)
    for left, right in itertools.product(addends, addends):
        yield Trial("every sum", _ask(f"What is {left} + {right}?", f"{left} + {right} = {left + right}"))
    numbers = ", ".join(map(str, range(1, 101)))
    for question in ("Count from 1 to 100.", "Count to 100.", "Посчитай от 1 до 100.", "Посчитай до 100."):
        yield Trial("long answer", _ask(question, numbers))
    first, first_ru = next(iter(stories.STORIES.values())), next(iter(stories.STORIES_RU.values()))
    yield Trial("long answer", _ask("Tell me a story.", first))
    yield Trial("long answer", _ask("Расскажи сказку.", first_ru))
    for subject, text in stories.STORIES.items():
        yield Trial("long answer", _ask(f"Tell me a story about a {subject}.", text))
    for subject, text in stories.STORIES_RU.items():
        yield Trial("long answer", _ask(f"Расскажи сказку про {subject}.", text))


def _honest(question: str) -> Lesson:
    return _ask(question, stories.HONEST["ru" if offtopic.is_russian(question) else "en"])


def _off_topic(rng: random.Random) -> Iterator[Trial]:
    """Off-topic prompts as people type them, and long texts."""
    for question in probes.OFF_TOPIC:
        yield Trial("off topic, as people ask", _honest(question))
    for language, sentences in itertools.product(("en", "ru"), (20, 60, 120)):
        yield Trial("off topic, long text", _honest(offtopic.paragraph(rng, language, sentences)))


def _in_context(rng: random.Random, count: int) -> Iterator[Trial]:
    """Known questions after a held-out system message, after other turns, and after a pasted text."""
    kinds = ("capital", "sum", "unknown capital", "weather call")
    for at in range(count):
        last = curriculum.lesson(Draw(rng), kinds[at % len(kinds)])
        system = {"role": "system", "content": rng.choice(phrases.SYSTEM.held_out)}
        yield Trial("after a new system message", Lesson((system, *last.messages), last.tools))
        first = curriculum.lesson(Draw(rng), rng.choice(curriculum.EARLIER))
        second = curriculum.lesson(Draw(rng), rng.choice(curriculum.EARLIER))
        yield Trial("second turn", Lesson((*first.messages, *last.messages), last.tools))
        yield Trial("third turn", Lesson((*first.messages, *second.messages, *last.messages), last.tools))


def trials(seed: int, count: int) -> list[Trial]:
    """All trials, with ``count`` drawn ones of each kind."""
    rng = random.Random(seed)
    return [*_complete(), *_drawn(rng, count), *_off_topic(rng), *_in_context(rng, count)]


def expected(lesson: Lesson) -> str | dict[str, Any]:
    """The right answer: its text, or the function and arguments of the call."""
    answer = lesson.messages[-1]
    if "tool_calls" in answer:
        call: dict[str, Any] = answer["tool_calls"][0]["function"]
        return call
    return str(answer["content"])


def understood(text: str) -> str | dict[str, Any]:
    """An answer's text, or the tool call in it. A call that is not JSON stays text."""
    text = text.strip()
    if text.startswith(CALL_START) and text.endswith(CALL_END):
        try:
            call: dict[str, Any] = json.loads(text.removeprefix(CALL_START).removesuffix(CALL_END))
        except ValueError:
            return text
        return call
    return text


class Subject:
    """The measured model, with greedy decoding."""

    def __init__(self, folder: Path) -> None:
        self._model, self._tokenizer, *_ = load(str(folder))

    def answers(self, asked: Sequence[Lesson], batch: int) -> tuple[list[str], float]:
        """The answer to each lesson's last question, and the rate in tokens/s at which all were generated."""
        prompts = [
            self._tokenizer.apply_chat_template(
                list(lesson.messages[:-1]), tools=list(lesson.tools) or None, add_generation_prompt=True
            )
            for lesson in asked
        ]
        made = batch_generate(self._model, self._tokenizer, prompts, max_tokens=MAX_TOKENS, completion_batch_size=batch)
        return list(made.texts), float(made.stats.generation_tps)

    def rate(self, batch: int) -> float:
        """Tokens/s with ``batch`` stories at once."""
        return self.answers([_ask("Tell me a story.", "")] * batch, batch)[1]


def table(
    asked: Sequence[Trial], texts: Sequence[str], report: Callable[[str], object] | None
) -> dict[str, tuple[int, int]]:
    """The number of right answers and of questions in each row. Every wrong answer is passed to ``report``."""
    rows: dict[str, tuple[int, int]] = {}
    for (row, lesson), text in zip(asked, texts, strict=True):
        right = understood(text) == expected(lesson)
        if report and not right:
            report(f"{row}: {lesson.messages[-2]['content'][-70:]!r} -> {text[:90]!r}")
        done, total = rows.get(row, (0, 0))
        rows[row] = (done + right, total + 1)
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=PATH)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--count", type=int, default=40, help="lessons drawn of each kind")
    parser.add_argument("--misses", action="store_true", help="print every wrong answer")
    options = parser.parse_args()
    asked = trials(options.seed, options.count)
    began = time.perf_counter()
    subject = Subject(options.folder)
    texts, _ = subject.answers([trial.lesson for trial in asked], BATCH)
    rows = table(asked, texts, print if options.misses else None)
    print("| question | exact |\n|---|---|")
    for row, (right, total) in rows.items():
        print(f"| {row} | {right}/{total} |")
    right, total = (sum(column) for column in zip(*rows.values(), strict=True))
    print(f"| **all** | **{right}/{total}** |\n")
    rates = ", ".join(f"{subject.rate(batch):.0f} in batches of {batch}" for batch in (1, 4, 16))
    print(f"Tokens/s: {rates}. All measured in {time.perf_counter() - began:.0f} s.")
    mx.clear_streams()


if __name__ == "__main__":
    main()
