"""Models in the shape of families, here and on mlx-lm's own server: what an answer shows of the same scripts.

On demand, since it starts two servers for each family: `make real ARGS="-m slow -k beside"`. Both servers get the same
weights, templates and requests of OpenAI's API. Switches are sent as the family's template names them, which both take,
and as OpenAI's API does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

from bench.peer import mlx_lm_server
from tests.consumers.engines import families, test_families, test_family_tools
from tests.consumers.engines.families import Family
from tests.consumers.engines.test_family_tools import ADD, FINE, TOOLS, WEATHER
from tests.e2e.conftest import running

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]

TABLE = [family for family in families.FAMILIES if family.name in test_family_tools.CALLS]
THINKING = set(test_families.WRITTEN)
# The template's own arguments. GPT-OSS cannot turn it off, LFM2's template has none.
_SWITCH = ({"enable_thinking": True}, {"enable_thinking": False})
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3": _SWITCH,
    "qwen35": _SWITCH,
    "gemma4": _SWITCH,
    "glm": _SWITCH,
    "deepseek": ({"thinking": True}, {"thinking": False}),
    "mistral": ({"reasoning_effort": "high"}, {"reasoning_effort": "none"}),
    "gpt-oss": ({"reasoning_effort": "high"}, {"reasoning_effort": "low"}),
}
# Their prompts have the same length with it and without. In the first two, the answer shows whether it was on.
SAME_LENGTH = {"glm", "deepseek", "mistral"}
# Without the marks in it that `test_families` has: a call in reasoning is a column of its own.
REASONED, SPOKEN = "Two and two, ünïcode 🙂.", "It is 4."
ONE, TWO, AFTER_THOUGHT, SAID = (
    test_family_tools.ONE,
    test_family_tools.TWO,
    test_family_tools.AFTER_THOUGHT,
    test_family_tools.SAID,
)
THOUGHT, PLAIN = 6, 7  # after those of `test_family_tools`


class Cell(NamedTuple):
    """How well a server does one thing, and what it did."""

    score: int
    seen: str


NOTHING = Cell(0, "-")


class Seen(NamedTuple):
    """What an answer has. Each part of a call's arguments that came alone counts in `parts`."""

    reasoning: str
    text: str
    calls: list[tuple[str, Any]]
    ids: list[str]
    parts: int
    prompt_tokens: int
    reasoning_tokens: int


class Server:
    """One of the two."""

    def __init__(self, url: str, family: Family) -> None:
        self._web = httpx.Client(base_url=url, timeout=100, trust_env=False)
        self._family = family

    def ask(self, script: int, *, tools: bool = False, turns: list[dict[str, Any]] | None = None, **more: Any) -> Seen:
        """The answer to a question that plays a script, streamed, with reasoning on unless `more` says otherwise."""
        messages = [{"role": "user", "content": f"Play «{script}»."}, *(turns or [])]
        body: dict[str, Any] = {"messages": messages, "max_tokens": 800, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        if self._family.name in SWITCHES:
            body["chat_template_kwargs"] = SWITCHES[self._family.name][0]
        if tools:
            body["tools"] = msgspec.to_builtins(TOOLS)
        answer = self._web.post("/v1/chat/completions", json=body | more)
        answer.raise_for_status()
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        return _seen([json.loads(line) for line in lines])

    def close(self) -> None:
        self._web.close()


def _seen(events: list[dict[str, Any]]) -> Seen:
    deltas = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    usage: dict[str, Any] = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
    made: list[list[str]] = []
    parts = 0
    for part in (part for delta in deltas for part in delta.get("tool_calls") or ()):
        function = part["function"]
        if function.get("name"):
            made.append([part["id"], function["name"], function.get("arguments") or ""])
        else:
            made[-1][2] += function["arguments"]
            parts += 1
    return Seen(
        "".join(delta.get("reasoning_content") or delta.get("reasoning") or "" for delta in deltas),
        "".join(delta.get("content") or "" for delta in deltas),
        [(name, _loaded(arguments)) for _, name, arguments in made],
        [call_id for call_id, _, _ in made],
        parts,
        usage.get("prompt_tokens", 0),
        (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0),
    )


def _loaded(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


# ---- the columns -----------------------------------------------------------------------------------------------------


def split(server: Server, family: Family) -> Cell:
    """Reasoning apart from the answer: 1 apart, 2 without the white space of its marks, 3 counted."""
    if family.name not in THINKING:
        return NOTHING
    answer = server.ask(THOUGHT)
    if (answer.reasoning.strip(), answer.text.strip()) != (REASONED, SPOKEN):
        return Cell(0, f"content {answer.text[:24]!r}")
    exact = (answer.reasoning, answer.text) == (REASONED, SPOKEN)
    counted = exact and bool(answer.reasoning_tokens)
    return Cell(1 + exact + counted, "apart" + ", trimmed" * exact + ", counted" * counted)


def off(server: Server, family: Family) -> Cell:
    """Off by the template's own argument."""
    if family.name not in SWITCHES:
        return NOTHING
    return _off(server, family, chat_template_kwargs=SWITCHES[family.name][1])


def off_by_effort(server: Server, family: Family) -> Cell:
    """Off as OpenAI's clients ask for it."""
    if family.name not in SWITCHES:
        return NOTHING
    return _off(server, family, chat_template_kwargs={}, reasoning_effort="none")


def _off(server: Server, family: Family, **how: Any) -> Cell:
    on, answer = server.ask(PLAIN), server.ask(PLAIN, **how)
    heard = answer.prompt_tokens != on.prompt_tokens or family.name in SAME_LENGTH
    said = (answer.reasoning, answer.text.strip()) == ("", SPOKEN)
    return Cell(int(heard and said), "off" if heard and said else "ignored" if not heard else f"{answer.text[:24]!r}")


def one_call(server: Server, _: Family) -> Cell:
    return _calls(server.ask(ONE, tools=True), WEATHER)


def two_calls(server: Server, family: Family) -> Cell:
    # GPT-OSS ends its turn with a call.
    return NOTHING if family is families.GPT_OSS else _calls(server.ask(TWO, tools=True), WEATHER, ADD)


def _calls(answer: Seen, *expected: tuple[str, Any]) -> Cell:
    right = answer.calls == list(expected)
    clean = right and not answer.text.strip()
    return Cell(right + clean, "called" if clean else f"calls {len(answer.calls)}, content {answer.text[:24]!r}")


def streamed(server: Server, _: Family) -> Cell:
    """How many parts the arguments came in beside the first one."""
    answer = server.ask(ONE, tools=True)
    right = answer.calls == [WEATHER]
    return Cell(answer.parts + 1 if right else 0, f"{answer.parts + 1} parts" if right else "no call")


def call_in_reasoning(server: Server, family: Family) -> Cell:
    return NOTHING if family.name not in THINKING else _calls(server.ask(AFTER_THOUGHT, tools=True), WEATHER)


def second_turn(server: Server, _: Family) -> Cell:
    first = server.ask(ONE, tools=True)
    if first.calls != [WEATHER]:
        return Cell(0, "no call")
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for call_id, (name, arguments) in zip(first.ids, first.calls, strict=True)
    ]
    results = [{"role": "tool", "tool_call_id": call_id, "content": f"sunny «{SAID}»"} for call_id in first.ids]
    try:
        answer = server.ask(
            ONE, tools=True, turns=[{"role": "assistant", "content": "", "tool_calls": calls}, *results]
        )
    except httpx.HTTPError as error:
        return Cell(0, type(error).__name__)
    return Cell(
        int(answer.text.strip() == FINE), "answered" if answer.text.strip() == FINE else f"{answer.text[:24]!r}"
    )


COLUMNS: dict[str, Callable[[Server, Family], Cell]] = {
    "reasoning apart": split,
    "off by the template's argument": off,
    "off by reasoning_effort": off_by_effort,
    "one call": one_call,
    "two calls": two_calls,
    "arguments": streamed,
    "a call in reasoning": call_in_reasoning,
    "second turn": second_turn,
}


def row_of(url: str, family: Family) -> dict[str, Cell]:
    server = Server(url, family)
    try:
        return {name: _measured(column, server, family) for name, column in COLUMNS.items()}
    finally:
        server.close()


def _measured(column: Callable[[Server, Family], Cell], server: Server, family: Family) -> Cell:
    try:
        return column(server, family)
    except httpx.HTTPError as error:
        return Cell(0, type(error).__name__)


@pytest.fixture(params=TABLE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    family: Family = request.param
    return family


def scripts_of(family: Family) -> list[str]:
    written, final = (table.get(family.name, "{}") for table in (test_families.WRITTEN, test_families.FINAL))
    return [*test_family_tools.scripts_of(family), written.format(REASONED, SPOKEN), final.format(SPOKEN)]


@pytest.fixture
def folder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", families.scripted_path())
    return family.write(tmp_path / family.name, scripts_of(family))


@pytest.fixture
def ours(folder: Path, tmp_path: Path) -> Iterator[str]:
    environ = {"HEADRACE_MODEL": str(folder), "HEADRACE_OLLAMA_HOST": "none", "PYTHONPATH": families.scripted_path()}
    with running(tmp_path, environ=environ) as pipeline:
        yield pipeline.http


def test_beside_mlx_lm(family: Family, folder: Path, ours: str, figure: Callable[[str], None]) -> None:
    with mlx_lm_server(folder) as theirs:
        other = row_of(theirs, family)
    own = row_of(ours, family)
    for name in COLUMNS:
        if own[name] != NOTHING:
            figure(f"{name:<30}  {own[name].seen:<28}  mlx_lm.server: {other[name].seen}")
    behind = [name for name in COLUMNS if own[name].score < other[name].score]
    assert behind == []
    assert [name for name in COLUMNS if own[name] != NOTHING and not own[name].score] == []
