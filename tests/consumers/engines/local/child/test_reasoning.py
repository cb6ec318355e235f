"""What a family's chat template takes to turn reasoning on and off, found by rendering it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from consumers.engines.local.child.checks import template_messages
from consumers.engines.local.child.reasoning import Reasoning
from pipeline.wire.answers import FunctionCall, ToolCall
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatMessage, ChatRequest
from tests.consumers.engines import families
from tests.consumers.engines.families import Family

pytest.importorskip("mlx_lm", reason="MLX is not installed")

OFF = {"think": False}
WAYS_OFF = [
    OFF,
    {"reasoning_effort": "none"},
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"reasoning": {"effort": "none"}},
    {"thinking": {"type": "disabled"}},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Any]:
    from mlx_lm.tokenizer_utils import load

    folder = tmp_path_factory.mktemp("families")
    return {family.name: load(family.write(folder / family.name, ["x"])) for family in families.FAMILIES}


@pytest.fixture(params=families.FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture
def tokenizer(tokenizers, family) -> Any:
    return tokenizers[family.name]


@pytest.fixture
def reasoning(tokenizer) -> Reasoning:
    return Reasoning(tokenizer, tokenizer.eos_token_ids)


def asking(**fields: Any) -> ChatRequest:
    return decode_chat(msgspec.json.encode({"prompt": "Hi", **fields}), max_body_bytes=1 << 20)


def prompt_of(tokenizer: Any, reasoning: Reasoning, **fields: Any) -> str:
    request = asking(**fields)
    arguments = reasoning.plan(request).arguments | (request.chat_template_kwargs or {})
    messages = template_messages(request.chat)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments))


OFF_ARGUMENTS = {
    "qwen3": {"enable_thinking": False},
    "qwen35": {"enable_thinking": False},
    "gemma4": {"enable_thinking": False},
    "glm": {"enable_thinking": False},
    "deepseek": {"thinking": False},
    "mistral": {"reasoning_effort": "none"},
    "gpt-oss": {"reasoning_effort": "low"},
}
HIGH_ARGUMENTS = {
    "qwen3": {"enable_thinking": True},
    "qwen35": {"enable_thinking": True},
    "gemma4": {"enable_thinking": True},
    "glm": {"enable_thinking": True},
    "deepseek": {"thinking": True},
    "mistral": {"reasoning_effort": "high"},
    "gpt-oss": {"reasoning_effort": "high"},
}


@pytest.mark.parametrize("off", WAYS_OFF, ids=str)
def test_each_way_to_turn_it_off_reaches_the_template(family, reasoning, off):
    if family is families.DEEPSEEK_R1:
        with pytest.raises(HeadraceError) as refused:
            reasoning.plan(asking(**off))
        assert (refused.value.code, refused.value.param) == (ErrorCode.UNSUPPORTED_PARAMETER, next(iter(off)))
        return
    plan = reasoning.plan(asking(**off))
    assert plan.arguments == OFF_ARGUMENTS.get(family.name, {})
    noted = family.name in ("gpt-oss", "lfm2")
    assert [f"`{next(iter(off))}`" in note for note in plan.notes] == [True] * noted


def test_off_and_on_are_different_prompts_and_off_begins_no_reasoning(family, tokenizer, reasoning):
    if family.name not in OFF_ARGUMENTS:
        pytest.skip("its template takes nothing")
    off, on = prompt_of(tokenizer, reasoning, **OFF), prompt_of(tokenizer, reasoning, reasoning_effort="high")
    assert off != on
    assert not reasoning.opened(tokenizer.encode(off, add_special_tokens=False))
    assert reasoning.opened(tokenizer.encode(on, add_special_tokens=False)) == (
        family.name in ("qwen35", "glm", "deepseek")
    )


@pytest.mark.parametrize("word", ["low", "high", "max"])
def test_an_amount_reaches_a_template_that_has_amounts(family, reasoning, word):
    plan = reasoning.plan(asking(reasoning_effort=word))
    wanted = HIGH_ARGUMENTS.get(family.name, {})
    if family is families.GPT_OSS and word == "low":
        wanted = {"reasoning_effort": "low"}
    assert plan.arguments == wanted
    exact = family is families.GPT_OSS or (family is families.MISTRAL and word != "low")
    assert len(plan.notes) == (0 if exact else 1)


def test_without_a_wish_the_template_decides(reasoning):
    assert reasoning.plan(asking()) == ({}, [])


def test_thinking_of_a_model_that_does_is_not_noted(family, reasoning):
    noted = family.name in ("llama3", "phi", "lfm2")
    assert [note for note in reasoning.plan(asking(think=True)).notes if "no effect" in note] == [
        "`think` has no effect on this model."
    ] * noted


def test_arguments_that_a_template_does_not_have_are_noted(reasoning):
    plan = reasoning.plan(asking(chat_template_kwargs={"add_vision_id": True, "messages_": 1}))
    assert plan.notes == [
        "`chat_template_kwargs.add_vision_id` has no effect on this model.",
        "`chat_template_kwargs.messages_` has no effect on this model.",
    ]


def test_a_model_that_ends_messages_with_more_than_one_token_ends_its_answer_with_each(tokenizers):
    tokenizer = tokenizers["gpt-oss"]
    vocabulary = tokenizer.get_vocab()
    assert Reasoning(tokenizer, [vocabulary["<|return|>"]]).end_tokens == {
        vocabulary["<|return|>"],
        vocabulary["<|call|>"],
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_earlier_reasoning_reaches_the_template_under_its_own_name(family, tokenizer, name):
    takes = family.name in ("glm", "mistral")
    messages = [
        ChatMessage(role="user", content="Hi"),
        ChatMessage(role="assistant", content="Ho", **{name: "I thought"}),
        ChatMessage(role="user", content="And?"),
    ]
    rendered = tokenizer.apply_chat_template(template_messages(messages), add_generation_prompt=True, tokenize=False)
    assert ("I thought" in rendered) == takes


def test_reasoning_of_another_kind_than_text_is_left_out():
    message = ChatMessage(role="assistant", content="Ho", reasoning={"effort": "high"}, thinking=True)
    assert template_messages([message]) == [{"role": "assistant", "content": "Ho"}]


def test_a_template_that_mlx_lm_does_not_know_reasons_by_default(tmp_path):
    from mlx_lm.tokenizer_utils import load

    template = families.GLM.template.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    family = Family("own", families.MISTRAL.special, (), template, "</s>")
    tokenizer = load(family.write(tmp_path, ["x"]))
    assert not tokenizer.has_thinking
    reasoning = Reasoning(tokenizer)
    assert prompt_of(tokenizer, reasoning).endswith("[THINK]")
    assert prompt_of(tokenizer, reasoning, **OFF).endswith("[/THINK]")


# Command A's switch, and Seed-OSS's number of tokens.
REASONING = "{% if reasoning is defined and not reasoning %}<think></think>{% endif %}"
BUDGET = "{% if thinking_budget is defined and thinking_budget == 0 %}<think></think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "off", "on"),
    [(REASONING, {"reasoning": False}, {"reasoning": True}), (BUDGET, {"thinking_budget": 0}, {})],
    ids=["a switch", "a budget"],
)
def test_other_arguments_turn_reasoning_off(tmp_path, template, off, on):
    from mlx_lm.tokenizer_utils import load

    family = Family("own", ("<eos>",), ("<think>", "</think>"), "HOW" + template, "<eos>")
    reasoning = Reasoning(load(family.write(tmp_path, ["x"])))
    assert reasoning.plan(asking(**OFF)) == (off, [])
    assert reasoning.plan(asking(think=True)) == (on, [])
    assert len(reasoning.plan(asking(reasoning_effort="high")).notes) == 1


@pytest.mark.parametrize(("start", "end"), [("<thought>", "</thought>"), ("◁think▷", "◁/think▷")])
def test_marks_of_other_families_are_known(tmp_path, start, end):
    from mlx_lm.tokenizer_utils import load

    template = "{{ messages[0].content }}{% if add_generation_prompt %}" + start + "{% endif %}"
    family = Family("own", ("<eos>",), (start, end), template, "<eos>")
    tokenizer = load(family.write(tmp_path, ["x"]))
    reasoning = Reasoning(tokenizer)
    prompt = tokenizer.encode(prompt_of(tokenizer, reasoning), add_special_tokens=False)
    separator = reasoning.separator(prompt, calls=False)
    assert separator is not None
    assert [*separator.push(f"hm\n{end}\n\nParis"), *separator.flush()] == [("reasoning", "hm"), ("answer", "Paris")]


EFFORT = "{% set known = reasoning_effort in ['low', 'high'] %}{{ reasoning_effort if known else 'DEFAULT' }}"


@pytest.mark.parametrize(
    ("default", "word", "taken"),
    [("max", "low", "low"), ("max", "medium", "high"), ("max", "high", "high"), ("Medium", "medium", "medium")],
)
def test_a_word_that_a_template_does_not_know_is_not_taken_for_one(tmp_path, default, word, taken):
    from mlx_lm.tokenizer_utils import load

    family = Family("own", ("<eos>",), ("<think>", "</think>"), EFFORT.replace("DEFAULT", default), "<eos>")
    reasoning = Reasoning(load(family.write(tmp_path, ["x"])))
    assert reasoning.plan(asking(reasoning_effort=word)).arguments == {"reasoning_effort": taken}
    least = reasoning.plan(asking(**OFF))
    assert (least.arguments, len(least.notes)) == ({"reasoning_effort": "low"}, 1)


@pytest.mark.parametrize("channel", ["", "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"])
def test_a_prompt_may_begin_a_message_of_a_channel(tokenizers, channel):
    tokenizer = tokenizers["gpt-oss"]
    prompt = tokenizer.encode(f"<|start|>user<|message|>Hi<|end|><|start|>assistant{channel}", add_special_tokens=False)
    separator = Reasoning(tokenizer).separator(prompt, calls=False)
    assert separator is not None
    assert separator.place == {"": "between", "a": "reasoning", "f": "answer"}[channel[11:12]]


def test_a_call_with_a_text_and_a_thought_is_rendered(family, tokenizer):
    call = ToolCall(FunctionCall("f", "{}"), "abcdefghi")
    messages = [
        ChatMessage(role="user", content="Hi"),
        ChatMessage(role="assistant", content="I look.", thinking="I thought", tool_calls=[call]),
        ChatMessage(role="tool", content="1", tool_call_id="abcdefghi"),
    ]
    rendered = tokenizer.apply_chat_template(template_messages(messages), add_generation_prompt=True, tokenize=False)
    takes = family.name in ("qwen3", "qwen35", "gemma4", "glm", "mistral")
    assert ("I thought" in rendered) == takes


def test_a_model_without_a_template_takes_nothing(tmp_path):
    from mlx_lm.tokenizer_utils import load

    family = Family("base", ("<eos>",), (), "", "<eos>")
    folder = family.write(tmp_path, ["x"])
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}'
    )
    reasoning = Reasoning(load(folder))
    assert not reasoning.thinks
    assert reasoning.plan(asking(**OFF)) == ({}, [])
