"""The accuracy and the cost of triage.

    python -m bench.triage [--data FILE]

Prints the precision and recall of "simple" on the labelled prompts of the test suite, and the time per call. FILE holds
questions with the outcome of a smaller model: JSON lines, optionally gzipped, each with `prompt`, `weak_correct` and
`subject`. For these, the benchmark prints how well the score orders them: the AUC of "the smaller model fails", on two
halves of the subjects.

The vocabulary was chosen with the labelled prompts in view. Their figures detect regressions; they do not estimate the
accuracy on unseen prompts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.core.triage import classify
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Task

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "triage_prompts.jsonl"


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line) for line in lines]


def request_of(row: dict[str, Any]) -> ChatRequest:
    return msgspec.convert({key: row[key] for key in ("prompt", "messages") if key in row}, ChatRequest)


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The probability that a positive scores above a negative; a tie counts half (Mann-Whitney U)."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks = [0.0] * len(scores)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        for place in range(start, end):
            ranks[order[place]] = (start + end + 1) / 2
        start = end
    count = sum(positive)
    total = sum(rank for rank, is_positive in zip(ranks, positive, strict=True) if is_positive)
    return (total - count * (count + 1) / 2) / (count * (len(scores) - count))


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


def report_questions(questions: Sequence[dict[str, Any]]) -> None:
    subjects = sorted({row["subject"] for row in questions})
    print("\nquestions    subjects    rows    AUC")
    for name, chosen in (("odd ones", subjects[::2]), ("even ones", subjects[1::2]), ("all", subjects)):
        part = [row for row in questions if row["subject"] in chosen]
        scores = [classify(request_of(row), None).score for row in part]
        failed = [not row["weak_correct"] for row in part]
        print(f"{name:10}  {len(chosen):9}  {len(part):6}  {auc(scores, failed):.3f}")


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
    parser = argparse.ArgumentParser(description="Measure the accuracy and the cost of triage.")
    parser.add_argument("--data", type=Path, help="questions with the outcome of a smaller model, as JSON lines")
    options = parser.parse_args()
    report_prompts(rows(PROMPTS))
    if options.data:
        report_questions(rows(options.data))
    report_cost()


if __name__ == "__main__":
    main()
