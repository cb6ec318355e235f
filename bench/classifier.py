"""What triage gets right, what it costs, and which scores were tried in place of its rules.

    python -m bench.classifier [--data FILE] [--model FOLDER]

Without options: the precision and recall of "simple" on the labelled prompts of the test suite, for each kind, and the
time per call. The vocabulary was chosen with these prompts in view, so their figures detect regressions; they do not
estimate the accuracy on unseen prompts.

FILE holds questions with the outcome of a weaker and a stronger model: JSON lines, optionally gzipped, each with
`prompt`, `weak_correct`, `strong_correct` and `subject`. For these, the benchmark prints

- what the recognised kinds lose at the weaker model, over what random spilling loses,
- the same for the 30 % that a score finds easiest. Each score is fitted without the subject, and then without the whole
  field, that it is measured on, and never on the labelled prompts. The interval is a bootstrap over whole subjects.

FOLDER is a stored model, by default that of `headrace pull`: its token vectors are one score.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.scores import (
    Matrix,
    auc,
    fitted,
    interval,
    lost,
    question,
    relative_loss,
    surface,
    vectors,
    within,
    without,
    words,
)
from consumers.models.known import SMOLLM2
from consumers.models.store import Store
from pipeline.core.triage import classify
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Task

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "triage_prompts.jsonl"
FIELDS = {
    "mathematics and science": "algebra math physics chemistry statistics computer logic biology engineering astronomy",
    "medicine": "anatomy sexuality genetics nutrition medicine virology clinical aging",
    "humanities": "history fallacies moral philosophy law religions jurisprudence prehistory",
}
Features = Callable[[Sequence[str]], Matrix]


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def request_of(row: dict[str, Any]) -> ChatRequest:
    return msgspec.convert({key: row[key] for key in ("prompt", "messages") if key in row}, ChatRequest)


def field_of(subject: str) -> str:
    """The field of a subject, by a part of its name; social science for the others."""
    return next((field for field, parts in FIELDS.items() if any(part in subject for part in parts.split())), "social")


# ---- the rules -------------------------------------------------------------------------------------------------------


def report_prompts(labelled: Iterable[dict[str, Any]]) -> None:
    """Print precision and recall per language."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    for row in labelled:
        is_simple = classify(request_of(row), None).task is Task.SIMPLE
        found.setdefault(row["lang"], []).append((is_simple, row["task"] == "simple"))
    print("prompts        rows  said simple  precision  recall")
    for group, pairs in sorted(found.items()):
        right = sum(said and true for said, true in pairs)
        said = sum(said for said, _ in pairs)
        true = sum(true for _, true in pairs)
        print(f"{group:12}  {len(pairs):5}  {said:11}  {right / said:9.3f}  {right / true:6.3f}")


def report_kinds(questions: Sequence[dict[str, Any]]) -> None:
    """Print what the recognised kinds lose, of the questions as they are and without their options."""
    loss = lost(questions)
    print("\nrecognised as simple            rows  weaker model right  loss, random = 1  95 % interval")
    for name, asked in (("with options", [row["prompt"] for row in questions]), ("without", map(question, questions))):
        verdicts = [classify(ChatRequest(prompt=text), None) for text in asked]
        simple = np.array([verdict.task is Task.SIMPLE for verdict in verdicts])
        kinds = sorted({verdict.reason for verdict, is_simple in zip(verdicts, simple, strict=True) if is_simple})
        for kind in ("all", *kinds):
            chosen = simple & np.array([kind in ("all", verdict.reason) for verdict in verdicts])
            title = f"{name}: {kind}"
            if not chosen.any():
                print(f"{title:30}  {0:4}")
                continue
            right = np.mean([row["weak_correct"] for row, is_in in zip(questions, chosen, strict=True) if is_in])

            def relative(drawn: Matrix, chosen: Matrix = chosen) -> float:
                there = drawn[chosen[drawn]]
                return float(loss[there].mean() / loss[drawn].mean()) if len(there) else float("nan")

            low, high = interval([row["subject"] for row in questions], relative)
            whole = relative(np.arange(len(questions)))
            print(f"{title:30}  {chosen.sum():4}  {right:18.2f}  {whole:16.2f}  {low:5.2f} to {high:.2f}")


# ---- scores ----------------------------------------------------------------------------------------------------------


def report_scores(questions: Sequence[dict[str, Any]], labelled: Sequence[dict[str, Any]], folder: Path) -> None:
    """Print what each score loses when the 30 % that it finds easiest are spilled, and how it orders other prompts."""
    loss, subjects = lost(questions), [row["subject"] for row in questions]
    fields = [field_of(subject) for subject in subjects]
    texts = [question(row) for row in questions]
    print("\nloss of the easiest 30 %, random = 1; AUC of complex on the labelled prompts, chance = 0.5")
    print(f"{'score':22}  subject kept aside    field kept aside      within a subject      AUC en    ru")
    length = np.array([float(len(text)) for text in texts])
    show("length", [length, length], subjects, loss, [float(len(text_of(row))) for row in labelled], labelled)
    for name, features, penalty in candidates(texts, folder):
        table = features(texts)
        scores = [without(groups, table, loss, penalty) for groups in (subjects, fields)]
        elsewhere = fitted(table, loss, penalty)(features([text_of(row) for row in labelled]))
        show(name, scores, subjects, loss, list(elsewhere), labelled)


def candidates(texts: Sequence[str], folder: Path) -> Iterable[tuple[str, Features, float]]:
    """Names, features and penalties. The penalties were chosen once, and not by these figures."""
    yield "form", surface, 10.0
    yield "words and pairs", words(texts), 3.0
    if (folder / "model.gguf").is_file():
        yield "token vectors", vectors(folder), 3.0
    else:
        print(f"{'token vectors':22}  left out: no model in {folder}")


def show(
    name: str,
    scores: Sequence[Matrix],
    subjects: Sequence[str],
    loss: Matrix,
    elsewhere: Sequence[float],
    labelled: Sequence[dict[str, Any]],
) -> None:
    cells = []
    for score in scores:
        low, high = interval(subjects, lambda drawn, score=score: relative_loss(score[drawn], loss[drawn]))
        cells.append(f"{relative_loss(score, loss):.2f} ({low:.2f} to {high:.2f})")
    names = np.array(subjects)
    low, high = interval(subjects, lambda drawn: within(names[drawn], scores[0][drawn], loss[drawn]), draws=100)
    cells.append(f"{within(subjects, scores[0], loss):.2f} ({low:.2f} to {high:.2f})")
    figures = []
    for language in ("en", "ru"):
        there = [place for place, row in enumerate(labelled) if row["lang"] == language]
        marks = [labelled[place]["task"] == "complex" for place in there]
        figures.append(f"{auc([elsewhere[place] for place in there], marks):.2f}")
    print(f"{name:22}  " + "  ".join(f"{cell:20}" for cell in cells) + "  " + "   ".join(figures), flush=True)


def text_of(row: dict[str, Any]) -> str:
    """What a labelled prompt asks."""
    return request_of(row).chat[-1].text()


# ---- cost ------------------------------------------------------------------------------------------------------------


def report_cost() -> None:
    english = "The committee met again on Tuesday and heard what had been found since the spring. "
    texts = {
        "short question": "What is the capital of France?",
        "2,000 characters": (english * 30)[:2000],
        "1 MB": english * 12_600,
        "1 MB of quotes": "«" * (1 << 20),
    }
    print("\ncost per call, median of 500, ms")
    for name, text in texts.items():
        request = ChatRequest(prompt=text)
        times = []
        for _ in range(500):
            start = time.perf_counter()
            classify(request, None)
            times.append(time.perf_counter() - start)
        print(f"{name:18} {statistics.median(times) * 1e3:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure triage, and scores in its place.")
    parser.add_argument("--data", type=Path, help="questions with the outcome of two models, as JSON lines")
    parser.add_argument("--model", type=Path, default=Store().folder(SMOLLM2.name), help="folder of a stored model")
    options = parser.parse_args()
    labelled = rows(PROMPTS)
    report_prompts(labelled)
    if options.data:
        questions = rows(options.data)
        report_kinds(questions)
        report_scores(questions, labelled, options.model)
    report_cost()


if __name__ == "__main__":
    main()
