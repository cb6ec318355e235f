"""What the scripts of the Python clients share: checks with names, the pipelines, and their counts.

A script prints one JSON object for each check: `{"check": ..., "result": "yes" | "no" | "none", "note": ...}`. "none"
means that the client has no such function. It runs in an environment that has the client and nothing of headrace.
"""

from __future__ import annotations

import json
import os
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

URL = os.environ["HEADRACE_URL"]  # the demo model, and llama.cpp's place beside it
SLOW = os.environ["HEADRACE_SLOW_URL"]  # the simulated engine: two slots, three seconds for an answer
OPENAI, SLOW_OPENAI = f"{URL}/v1", f"{SLOW}/v1"
HIGH = {"X-Priority": "high"}
KEY = {"Idempotency-Key": f"retry-{os.getpid()}"}  # sent with a call that gives up before its answer

QUESTION = "What is the capital of France?"
ASK = [{"role": "user", "content": QUESTION}]
ANSWER = "Paris"
WEATHER = "What is the weather in Paris?"
ASK_WEATHER = [{"role": "user", "content": WEATHER}]
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "The weather in a city.", "parameters": PLACE}
TOOL = {"type": "function", "function": FUNCTION}
CAPITAL = {
    "type": "object",
    "properties": {"capital": {"enum": ["Paris", "Rome"]}, "rivers": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["capital", "rivers"],
    "additionalProperties": False,
}
UNKNOWN = "no-such-model"
EMBEDDER = "feature-hashing"
WAIT_S = 30.0

_checks = dict[str, Callable[[], object]]()


class NoSuchFunction(Exception):
    """The client has no such function."""


def check(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register a function as the check of that name. It fails by raising."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        _checks[name] = function
        return function

    return register


def lacks(name: str, reason: str) -> None:
    """The client has no such function."""

    def function() -> None:
        raise NoSuchFunction(reason)

    _checks[name] = function


def run() -> None:
    """Run all checks of the script, in order."""
    only = os.environ.get("HEADRACE_CHECKS", "").split()
    for name, function in _checks.items():
        if only and name not in only:
            continue
        try:
            found = {"result": "yes", "note": function() or ""}
        except NoSuchFunction as reason:
            found = {"result": "none", "note": str(reason)}
        except Exception as error:
            traceback.print_exc()
            found = {"result": "no", "note": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"check": name, **found}), flush=True)


def counts(base: str) -> dict[str, int]:
    """How many requests of all priorities are in each state."""
    with urllib.request.urlopen(f"{base}/queue/stats") as response:
        stats = json.load(response)
    states = ("queued", "running", "done", "failed", "cancelled")
    return {state: sum(stats[lane][state] for lane in ("high", "medium", "low")) for state in states} | {
        "high": stats["high"]["done"]
    }


def until(fact: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    """Wait until fact is true."""
    give_up_at = time.monotonic() + wait_s
    while not fact():
        assert time.monotonic() < give_up_at, f"not within {wait_s:.0f} s: {what}"
        time.sleep(0.05)


@contextmanager
def counted(base: str, state: str) -> Iterator[None]:
    """The calls in the block add exactly one request to those in that state, and none to the failed ones."""
    before = counts(base)
    yield
    until(lambda: counts(base)[state] > before[state], f"a request is {state}")
    until(lambda: counts(base)["queued"] + counts(base)["running"] == 0, "no request is left")
    after = counts(base)
    assert after[state] == before[state] + 1, f"{after[state] - before[state]} requests are {state}"
    assert after["failed"] == before["failed"], "a request failed"


@contextmanager
def cancelled() -> Iterator[None]:
    """The call in the block ends early at the slow pipeline, and its request is cancelled."""
    with counted(SLOW, "cancelled"):
        yield


@contextmanager
def answered_once() -> Iterator[None]:
    """However often the client repeats the call at the slow pipeline, it is one request."""
    before = counts(SLOW)["cancelled"]
    with counted(SLOW, "done"):
        yield
    assert counts(SLOW)["cancelled"] == before, "the request was cancelled"


@contextmanager
def urgent() -> Iterator[None]:
    """The call in the block is a request of priority HIGH."""
    with counted(URL, "high"):
        yield


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[None]:
    """The block raises that exception with these words in its text."""
    text = None
    try:
        yield
    except kind as error:
        text = f"{type(error).__name__}: {error}"
    assert text is not None, f"no {kind.__name__}"
    assert all(word in text for word in words), f"no {words} in {text}"


def says(text: str | None, word: str = ANSWER) -> None:
    """The text has the right word."""
    assert word in (text or ""), f"no {word} in {text!r}"


def is_weather_call(name: str, arguments: Any) -> None:
    """A call of the weather tool for Paris."""
    decoded = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
    assert (name, decoded) == ("get_weather", {"city": "Paris"}), (name, decoded)


def is_capital(answer: Any) -> None:
    """An instance of CAPITAL."""
    decoded = json.loads(answer) if isinstance(answer, str) else answer
    assert decoded["capital"] in {"Paris", "Rome"}, decoded
    assert decoded["rivers"] in range(1, 10), decoded
