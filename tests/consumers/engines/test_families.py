"""Models in the shape of families: reasoning apart from the answer, and turning it off."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, ResponseFormat
from tests.consumers.engines import families
from tests.consumers.engines.conformance import Answer, until_ready, work
from tests.consumers.engines.families import Family
from tests.consumers.engines.player import Player
from tests.consumers.engines.processes import engine_of

pytest.importorskip("mlx_lm", reason="MLX is not installed")

THOUGHT = "Two and two; a stop STOP, a call <tool_call>{}</tool_call>, ünïcode 🙂."
SAID = "It is 4. STOP"
JSON = '{"a": 1}'
FORM = ResponseFormat("json_object")

# How each family writes reasoning and answer, where its template has not begun either.
_THINK = "<think>\n{}\n</think>\n\n{}"
_OPENED = "{}\n</think>\n\n{}"
WRITTEN = {
    "qwen3": _THINK,
    "qwen35": _OPENED,
    "gpt-oss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "gemma4": "<|channel>thought\n{}\n<channel|>{}",
    "glm": _OPENED,
    "deepseek": _OPENED,
    "deepseek-r1": _OPENED,
    "mistral": "[THINK]{}[/THINK]{}",
    "lfm2": _THINK,
}
FINAL = {"gpt-oss": "<|channel|>final<|message|>{}"}
# The template's arguments by which a model thinks, where it does not by default.
ON = {"deepseek": {"think": True}, "mistral": {"reasoning_effort": "high"}}
THINKING = [family for family in families.FAMILIES if family.name in WRITTEN]
REASONING, PLAIN, FORMED, OTHER_FORM, UNENDED, LOOSE = range(6)


def scripts_of(family: Family) -> list[str]:
    written, final = WRITTEN.get(family.name, "{1}"), FINAL.get(family.name, "{}")
    unended = written.format("Hm.", "").partition("Hm.")[0] + "Hm."
    return [
        written.format(THOUGHT, SAID),
        final.format(SAID),
        written.format(THOUGHT, JSON),
        written.format("", "no"),
        unended,
        written.format(f"\n{THOUGHT}", f"\n\n{SAID}"),
    ]


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    with Player() as player:
        yield player


Play = Callable[..., Answer]


@pytest.fixture(scope="module", params=THINKING, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp("families") / family.name, scripts_of(family))


@pytest.fixture
def play(player, family, folder) -> Play:
    """The answer to a request that plays a script alone."""

    def play(script: int, resumed: dict[str, Any] | None = None, **more) -> Answer:
        return player.together(folder, [work(playing(family, script, **more), **(resumed or {}))])[0]

    return play


def playing(family: Family, script: int, **more) -> ChatRequest:
    return ChatRequest(prompt=f"Play «{script}».", **({"max_tokens": 400} | ON.get(family.name, {}) | more))


def test_reasoning_is_apart_from_the_answer_and_counted(play):
    answer = play(REASONING)
    assert (answer.reasoning, answer.text, answer.tool_calls) == (THOUGHT, SAID, [])
    assert answer.finish_reason == "stop"
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details
    # Besides them there is one token for each character of the answer, white space, a header and the end.
    assert 0 < answer.usage.completion_tokens - details.reasoning_tokens - len(SAID) < 50
    assert details.reasoning_tokens > len(THOUGHT) - len("<tool_call></tool_call>")


def test_an_answer_cut_off_in_its_reasoning_keeps_the_reasoning(play):
    answer = play(REASONING, max_tokens=30)
    assert answer.finish_reason == "length"
    assert answer.text == ""
    assert THOUGHT.startswith(answer.reasoning)
    assert answer.reasoning
    assert any("during the reasoning" in note for note in answer.notes)


def test_a_stop_string_ends_the_answer_and_not_the_reasoning(play):
    answer = play(REASONING, stop="STOP")
    assert (answer.reasoning, answer.text, answer.finish_reason) == (THOUGHT, SAID.removesuffix("STOP"), "stop")


def test_answers_in_a_batch_are_what_they_are_alone(player, family, folder, play):
    alone = [play(script) for script in (REASONING, FORMED)]
    together = player.together(folder, [work(playing(family, script)) for script in (REASONING, FORMED) * 2])
    assert [(a.reasoning, a.text, a.token_ids) for a in together] == [
        (a.reasoning, a.text, a.token_ids) for a in alone
    ] * 2


def test_an_answer_goes_on_wherever_it_was_broken_off(play):
    whole = play(REASONING)
    for cut in range(1, len(whole.token_ids), 7):
        kept = play(REASONING, max_tokens=cut)
        # The end of the first forces out text that may become a mark.
        had = kept.text if whole.text.startswith(kept.text) else ""
        thought = kept.reasoning[: len(kept.reasoning) // 2]
        resumed = play(REASONING, {"resume_tokens": kept.token_ids, "resume_text": had, "resume_reasoning": thought})
        assert thought + resumed.reasoning == whole.reasoning
        assert had + resumed.text == whole.text
        cached = whole.usage.prompt_tokens_details  # what a resumed answer takes over is its own, and is not told
        assert msgspec.structs.replace(resumed.usage, prompt_tokens_details=cached) == whole.usage


def test_an_answer_goes_on_from_the_text_of_another_engine(play):
    begun = play(REASONING, {"resume_reasoning": THOUGHT[:20]})
    assert (begun.reasoning, begun.text) == (THOUGHT[20:], SAID)
    told = play(REASONING, {"resume_reasoning": THOUGHT, "resume_text": SAID[:5]})
    assert (told.reasoning, told.text) == ("", SAID[5:])


def test_an_answer_goes_on_from_a_text_with_white_space_of_its_own(play):
    """Servers leave the line ends around the reasoning in their texts."""
    assert (play(LOOSE).reasoning, play(LOOSE).text) == (THOUGHT, SAID)
    begun = play(LOOSE, {"resume_reasoning": f"\n{THOUGHT[:20]}"})
    assert (begun.reasoning, begun.text) == (THOUGHT[20:], SAID)
    told = play(LOOSE, {"resume_reasoning": f"\n{THOUGHT}", "resume_text": f"\n\n{SAID[:5]}"})
    assert (told.reasoning, told.text) == ("", SAID[5:])
    spaced = play(LOOSE, {"resume_reasoning": f"\n{THOUGHT}", "resume_text": f"\n\n{SAID[:6]}"})
    assert (spaced.reasoning, spaced.text) == ("", SAID[6:])


def test_the_form_of_an_answer_begins_after_its_reasoning(play):
    answer = play(FORMED, response_format=FORM)
    assert (answer.reasoning, answer.text) == (THOUGHT, JSON)
    other = play(OTHER_FORM, response_format=FORM, max_tokens=60)
    assert other.text.startswith("{")


def test_an_answer_with_a_form_does_not_end_in_its_reasoning(play):
    assert play(UNENDED).finish_reason == "stop"
    answer = play(UNENDED, response_format=FORM, max_tokens=40)
    assert (answer.finish_reason, answer.text) == ("length", "")


def test_an_answer_with_a_form_goes_on_after_its_reasoning(play):
    whole = play(FORMED, response_format=FORM)
    for kept in (10, len(whole.token_ids) - 12, len(whole.token_ids) - 4):
        resumed = {"resume_tokens": whole.token_ids[:kept], "resume_text": "", "resume_reasoning": ""}
        answer = play(FORMED, resumed, response_format=FORM)
        assert (answer.reasoning, answer.text) == (THOUGHT, JSON)


def test_reasoning_can_be_turned_off_as_far_as_the_template_can(family, play):
    off = {"think": False, "reasoning_effort": None}
    if family is families.DEEPSEEK_R1:
        with pytest.raises(HeadraceError, match="always reasons") as error:
            play(PLAIN, **off)
        assert (error.value.code, error.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "think")
        return
    answer = play(PLAIN, **off)
    assert (answer.reasoning, answer.text) == ("", SAID)
    noted = {"gpt-oss": "least reasoning effort, `low`", "lfm2": "no effect"}.get(family.name, "")
    assert noted in "".join(answer.notes)
    assert bool(noted) == bool(answer.notes)


async def answered_with_a_crash(engine: EngineProcess, request: ChatRequest, had: str) -> Answer:
    """The answer, after the reasoning of another engine, of one that is killed once some more of it is there."""
    generation, answer = await engine.submit(work(request, resume_reasoning=had)), Answer()
    while not answer.reasoning:
        answer.add(await generation.next())
    assert engine.child_pid is not None
    os.kill(engine.child_pid, signal.SIGKILL)
    while answer.finish_reason is None:
        answer.add(await generation.next())
    await generation.close()
    return answer


@pytest.mark.parametrize("had", [0, 20])
async def test_the_engine_crashes_in_the_midst_of_reasoning_and_nothing_changes(tmp_path, monkeypatch, had):
    monkeypatch.setenv("PYTHONPATH", families.scripted_path())
    thought = " ".join(f"Step {step} of it." for step in range(150))
    folder = families.QWEN35.write(tmp_path / "thinker", [f"{thought}\n</think>\n\n{SAID}"])
    async with engine_of(Config(engine="mlx", model=str(folder), step_timeout_s=30)) as engine:
        await until_ready(engine)
        assert engine.status().facts["thinker"].capabilities[-1] == "thinking"
        restarted = 0
        while not restarted:  # where this process was held up, the answer was complete before the kill
            await until_ready(engine)
            answer = await answered_with_a_crash(
                engine, ChatRequest(prompt="Play «0».", max_tokens=4000), thought[:had]
            )
            restarted = answer.restarted
            assert (answer.reasoning, answer.text) == (thought[had:], SAID)
            assert answer.usage is not None
            # After a text, a token that had not completed any is sampled again.
            assert had or len(answer.token_ids) == answer.usage.completion_tokens
