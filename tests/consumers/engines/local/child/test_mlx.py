"""MLX in the child process, with the demo model."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import pytest
import pytest_asyncio

from consumers.models.names import located
from pipeline.config import Sampling
from pipeline.engine import Engine
from pipeline.wire.errors import ErrorCode
from pipeline.wire.requests import ChatRequest, Tool
from tests.consumers.engines.conformance import ExactConformance, ask, refusal, until, work

pytest.importorskip("mlx_lm", reason="MLX is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

WEATHER = msgspec.convert(
    {"function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    Tool,
)

_GREEDY_ALONE = """
import sys
import mlx.core as mx
from mlx_lm import generate, load
model, tokenizer = load(sys.argv[1])
for question in sys.argv[2:]:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    print(repr(generate(model, tokenizer, prompt, max_tokens=24)))
mx.clear_streams()
"""

# Prints the tokens of a long prompt (2), and the keys that decode in each step until its first token.
_BESIDE_A_LONG_PROMPT = """
import json, queue, sys
from consumers.engines.local.child.loop import Begin, EngineLoop
from consumers.engines.local.child.mlx import MlxBackend
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest

config = Config(prefill_step_tokens=64)
backend = MlxBackend(config, sys.argv[1], lambda note: None)
commands, sent = queue.SimpleQueue(), []
loop = EngineLoop(backend, commands, sent.append, config)

def begin(key, prompt):
    request = ChatRequest(prompt=prompt, max_tokens=200, temperature=0)
    sequence = backend.prepare(key, Work(id=str(key), request=request, model="", seed=1))
    commands.put(Begin(0, sequence, None))
    return len(sequence.prompt)

begin(1, "Count from 1 to 100.")
while not sent or not sent[-1].pieces:
    loop.turn()
prompt_tokens, steps = begin(2, "Repeat: " + "apple " * 200), [[]]
while 2 not in steps[-1]:
    loop.turn()
    steps.append([key for key, _ in sent[-1].pieces])
print(json.dumps([prompt_tokens, steps[1:]]))
backend.close()
"""

# Prints the texts up to the marks of a conversation, and the marks of the same as an exact request.
_MARKS = """
import json, sys
import msgspec
from consumers.engines.local.child.mlx import MlxBackend
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest

backend = MlxBackend(Config(), sys.argv[1], lambda note: None)
backend.facts.reuse = "snapshots"

def prepared(**more):
    request = msgspec.convert({"messages": json.loads(sys.argv[2]), **more}, ChatRequest)
    return backend.prepare(1, Work(id="1", request=request, model="", seed=1))

usual, exact = prepared(), prepared(exact=True)
texts = [backend._tokenizer.decode(usual.prompt[:mark]) for mark in usual.marks]
print(json.dumps([texts, backend._tokenizer.decode(usual.prompt), exact.marks]))
backend.close()
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start):
    # Short prefills, so that even a short prompt takes several steps.
    async with start("mlx", prefill_step_tokens=64) as process:
        as_seen_by_workers: Engine = process
        yield as_seen_by_workers


class TestMlxEngine(ExactConformance):
    async def test_a_batch_streams_what_mlx_lm_generates_alone(self, engine):
        model = located("headrace-demo")
        command = [sys.executable, "-c", _GREEDY_ALONE, model, *self.prompts]
        alone = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=60)
        requests = [ChatRequest(prompt=prompt, max_tokens=24, temperature=0) for prompt in self.prompts]
        together = await asyncio.gather(*(ask(engine, request) for request in requests))
        assert [repr(answer.text) for answer in together] == alone.stdout.splitlines()

    async def test_another_seed_gives_another_answer(self, engine):
        request = ChatRequest(prompt="x", max_tokens=24, temperature=2)
        assert (await ask(engine, request, seed=1)).token_ids != (await ask(engine, request, seed=2)).token_ids

    @pytest.mark.parametrize(
        "sampling",
        [
            {"top_k": 1, "temperature": 1.0},
            {"top_p": 1e-9, "temperature": 1.0},
            {"min_p": 1.0, "temperature": 1.0},
            {"temperature": 1e-30},
        ],
    )
    async def test_sampling_at_its_narrowest_is_greedy(self, engine, sampling):
        greedy = await ask(engine, ChatRequest(prompt="What is 3 + 4?", max_tokens=8, temperature=0))
        narrow = await ask(engine, ChatRequest(prompt="What is 3 + 4?", max_tokens=8, **sampling))
        assert narrow.token_ids == greedy.token_ids

    @pytest.mark.parametrize(
        "sampling",
        [
            {"top_k": 1_000_000},
            {"temperature": 2.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0},
            {"repetition_penalty": 1e-3},
            {"repetition_penalty": 10.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
        ],
    )
    async def test_parameters_at_their_limits_do_no_harm(self, engine, sampling):
        answer = await ask(engine, ChatRequest(prompt="What is 3 + 4?", max_tokens=8, **sampling))
        assert answer.finish_reason is not None
        assert answer.restarted == 0

    async def test_a_frequency_penalty_ends_repetition(self, engine):
        request = ChatRequest(prompt="Count from 1 to 40.", max_tokens=40, temperature=0)
        plain = await ask(engine, request)
        fined = await ask(engine, msgspec.structs.replace(request, frequency_penalty=2.0, presence_penalty=2.0))
        most = [max(map(answer.token_ids.count, answer.token_ids)) for answer in (plain, fined)]
        assert most[1] < most[0]

    async def test_penalties_go_on_where_an_answer_does(self, engine):
        request = ChatRequest(
            prompt="Count from 1 to 40.", max_tokens=30, temperature=0, frequency_penalty=1.0, repetition_penalty=1.2
        )
        whole = await ask(engine, request)
        rest = await ask(engine, request, resume_tokens=whole.token_ids[:11])
        assert rest.text == whole.text
        assert rest.token_ids == whole.token_ids[11:]

    async def test_text_stands_in_for_unknown_tokens(self, engine):
        request = ChatRequest(prompt="Count from 1 to 40.", max_tokens=60, temperature=0)
        whole = await ask(engine, request)
        # At a number's end, where any tokenizer of such text has a token's end as well.
        cut = whole.text.index(" ", len(whole.text) // 3)
        rest = await ask(engine, request, resume_text=whole.text[:cut])
        assert rest.text == whole.text[cut:]

    async def test_tokens_of_another_model_are_refused(self, engine):
        error = await refusal(engine, "x", resume_tokens=[10**7])
        assert error.code is ErrorCode.INVALID_REQUEST

    @pytest.mark.parametrize("arguments", ["[1", "", "null", "3"])
    async def test_an_earlier_tool_call_with_broken_arguments_is_read(self, engine, arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
        request = msgspec.convert({"messages": messages, "max_tokens": 4}, ChatRequest)
        assert (await ask(engine, request)).usage.prompt_tokens

    async def test_structure_never_shows_in_the_text(self, engine):
        for seed in range(4):
            request = ChatRequest(prompt="x", max_tokens=60, temperature=2, seed=seed)
            assert "<|" not in (await ask(engine, request, seed=seed)).text

    async def test_a_long_prompt_takes_several_steps_and_the_others_decode_in_each(self):
        command = [sys.executable, "-c", _BESIDE_A_LONG_PROMPT, located("headrace-demo")]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        prompt_tokens, steps = json.loads(done.stdout)
        assert prompt_tokens > 3 * 64
        assert len(steps) > 2 * (prompt_tokens // 64)
        assert 2 in steps[-1]
        # Each piece is followed by a step. The tokens of the first one were sent before.
        assert sum(1 in step for step in steps) >= len(steps) // 2 - 1

    async def test_a_tool_call_is_no_text(self, engine):
        request = ChatRequest(prompt="What is the weather in Paris?", tools=[WEATHER], temperature=0)
        answer = await ask(engine, request)
        (call,) = answer.tool_calls
        assert call.function.name == "get_weather"
        assert set(msgspec.json.decode(call.function.arguments)) == {"city"}
        assert (answer.text.strip(), answer.finish_reason) == ("", "tool_calls")

    async def test_a_model_told_of_no_tools_calls_none(self, engine):
        request = ChatRequest(
            prompt="What is the weather in Paris?", tools=[WEATHER], tool_choice="none", temperature=0
        )
        answer = await ask(engine, request)
        assert answer.tool_calls == []
        assert answer.finish_reason == "stop"

    async def test_the_result_of_a_tool_is_part_of_the_conversation(self, engine):
        call = {"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
        question = {"role": "user", "content": "What is the weather in Paris?"}
        result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
        messages = [question, {"role": "assistant", "tool_calls": [call]}, result]
        request = msgspec.convert({"messages": messages, "max_tokens": 8}, ChatRequest)
        alone = await ask(engine, ChatRequest(prompt="What is the weather in Paris?", max_tokens=8))
        answer = await ask(engine, request)
        assert answer.usage.prompt_tokens > alone.usage.prompt_tokens

    async def test_memory_of_the_cache_is_told_and_given_back(self, engine):
        held = []
        engine.on_change(lambda: held.append(engine.status().kv_bytes))
        generation = await engine.submit(work(self.unending))
        await generation.next()
        assert engine.status().kv_bytes > 0
        await generation.close()
        await until(engine, lambda: engine.status().slots_used == 0)
        assert engine.status().kv_bytes == 0

    async def test_only_requests_of_one_tenant_take_over_what_was_computed(self, engine):
        request = ChatRequest(prompt="Repeat after me: river, mill, bridge, stone, sea. " * 4, max_tokens=2)
        cached = []
        for tenant in ("alice", "bob", "alice"):
            usage = (await ask(engine, request, tenant=tenant)).usage
            cached.append(usage.prompt_tokens_details.cached_tokens)
        assert cached == [0, 0, usage.prompt_tokens - 1]
        status = engine.status()
        assert 0 < status.reused_tokens < status.prompt_tokens
        assert status.kept_bytes > 0

    async def test_the_scores_of_an_answer_are_those_of_its_tokens(self, engine):
        request = ChatRequest(prompt="What is 3 + 4?", max_tokens=8, temperature=0, logprobs=True, top_logprobs=3)
        answer = await ask(engine, request)
        plain = await ask(engine, ChatRequest(prompt="What is 3 + 4?", max_tokens=8, temperature=0))
        assert answer.token_ids == plain.token_ids
        assert plain.scores == []
        assert "".join(score.token for score in answer.scores) == answer.text
        for score in answer.scores:
            assert bytes(score.octets).decode() == score.token
            assert score.top_logprobs[0].token == score.token  # greedy
            values = [other.logprob for other in score.top_logprobs]
            assert values == sorted(values, reverse=True)
            assert score.logprob == values[0] <= 0

    async def test_scores_go_on_where_an_answer_does_beside_others(self, engine):
        request = ChatRequest(prompt="Count from 1 to 40.", max_tokens=30, temperature=0, logprobs=True)
        whole = await ask(engine, request)
        plain = ChatRequest(prompt="Count from 3 to 12.", max_tokens=30, temperature=0)
        rest, beside = await asyncio.gather(
            ask(engine, request, resume_tokens=whole.token_ids[:11]), ask(engine, plain)
        )
        assert [score.token for score in rest.scores] == [score.token for score in whole.scores[11:]]
        assert beside.scores == []

    async def test_a_bias_rules_a_token_out_or_in(self, engine):
        request = ChatRequest(prompt="What is 3 + 4?", max_tokens=4, temperature=0)
        first = (await ask(engine, request)).token_ids[0]
        without = await ask(engine, msgspec.structs.replace(request, logit_bias={str(first): -100}))
        assert first not in without.token_ids
        always = await ask(engine, msgspec.structs.replace(request, logit_bias={str(first): 100}))
        assert set(always.token_ids) == {first}
        error = await refusal(engine, msgspec.structs.replace(request, logit_bias={"999999": 1}))
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "logit_bias")

    async def test_what_has_no_effect_is_noted_at_the_end(self, engine):
        given = {
            "prompt": "x",
            "max_tokens": 4,
            "verbosity": "high",
            "ollama": {"options": {"mirostat": 1, "num_ctx": 9}},
        }
        answer = await ask(engine, msgspec.convert(given, ChatRequest))
        assert answer.notes == [
            "`verbosity` has no effect on this model.",
            "`options.mirostat` has no effect on this model.",
        ]

    async def test_what_only_ollama_has_is_refused_by_name(self, engine):
        for given, name in (({"suffix": "x"}, "suffix"), ({"ollama": {"template": "x"}}, "template")):
            error = await refusal(engine, msgspec.convert({"prompt": "x", **given}, ChatRequest))
            assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, name)

    async def test_a_raw_prompt_is_continued_without_the_template(self, engine):
        text = "Count from 1 to 5."
        raw = ChatRequest(prompt=text, raw=True, max_tokens=16, temperature=0)
        answer, chat = await ask(engine, raw), await ask(engine, msgspec.structs.replace(raw, raw=None))
        assert answer.usage.prompt_tokens < chat.usage.prompt_tokens
        assert answer.text != chat.text
        same = msgspec.convert(
            {"prompt": text, "ollama": {"raw": True}, "max_tokens": 16, "temperature": 0}, ChatRequest
        )
        assert (await ask(engine, same)).text == answer.text
        assert (
            await ask(
                engine,
                msgspec.convert(
                    {"messages": [{"role": "user", "content": ""}], "raw": True, "max_tokens": 1}, ChatRequest
                ),
            )
        ).usage.prompt_tokens == 1

    async def test_an_answer_goes_on_where_the_assistants_message_ends(self, engine):
        chat = ChatRequest(prompt="Count from 1 to 40.", max_tokens=30, temperature=0)
        whole = (await ask(engine, chat)).text
        cut = whole.index(" ", len(whole) // 2)
        turns = [{"role": "user", "content": "Count from 1 to 40."}, {"role": "assistant", "content": whole[:cut]}]
        rest = await ask(engine, msgspec.convert({"messages": turns, "max_tokens": 8, "temperature": 0}, ChatRequest))
        assert whole[cut:].startswith(rest.text)
        assert len(rest.text) > 3
        assert rest.notes == ["The answer continues the assistant's message at the end."]

    async def test_another_template_takes_the_models_place(self, start, tmp_path):
        file = tmp_path / "strict.jinja"
        file.write_text(
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "User: {{ m.content }}\n{% endfor %}Answer:"
        )
        async with start("mlx", chat_template=str(file)) as engine:
            turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
            answer = await ask(engine, msgspec.convert({"messages": turns, "max_tokens": 2}, ChatRequest))
            assert len(answer.notes) == 1
            assert "system message" in answer.notes[0]
            raw = await ask(engine, ChatRequest(prompt="User: a\n\nb\nAnswer:", raw=True, max_tokens=2))
            assert raw.usage.prompt_tokens == answer.usage.prompt_tokens

    async def test_the_template_gets_its_arguments(self, start, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(located("headrace-demo"), folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(
            json.dumps(settings | {"chat_template": settings["chat_template"] + "{{ more | default('') }}"})
        )
        async with start("mlx", model=str(folder)) as engine:
            plain = ChatRequest(prompt="x")
            more = ChatRequest(prompt="x", chat_template_kwargs={"more": "one two three"})
            assert await engine.counter.count_tokens(more) > await engine.counter.count_tokens(plain)


async def test_a_cache_that_cannot_be_cut_is_kept_where_a_next_turn_begins():
    messages = [
        {"role": "system", "content": "You are a helper who answers in a few words, and says what is known. " * 3},
        {"role": "user", "content": "What is 3 + 4?"},
    ]
    command = [sys.executable, "-c", _MARKS, located("headrace-demo"), json.dumps(messages)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=60)
    (system, whole), prompt, exact = json.loads(done.stdout.splitlines()[-1])
    assert prompt.startswith(whole)
    assert whole.startswith(system)
    assert messages[0]["content"].strip() in system
    assert "3 + 4" not in system
    assert "3 + 4" in whole
    assert exact
    assert all(mark % 32 == 0 for mark in exact)


async def test_a_new_process_keeps_nothing_of_the_one_before_and_its_counts_go_on(start):
    prompt = "Repeat after me: river, mill, bridge, stone, sea. " * 4
    async with start("mlx") as engine:
        first = await ask(engine, ChatRequest(prompt=prompt, max_tokens=4, temperature=0))
        counted = engine.status().prompt_tokens
        os.kill(engine.child_pid, signal.SIGKILL)
        await until(engine, lambda: engine.status().state != "ready")
        second = await ask(engine, ChatRequest(prompt=prompt, max_tokens=4, temperature=0))
        assert second.token_ids == first.token_ids
        assert second.usage.prompt_tokens_details.cached_tokens == 0
        assert counted > 0
        assert (engine.status().prompt_tokens, engine.status().reused_tokens) == (2 * counted, 0)


async def test_a_models_own_context_template_arguments_and_sampling(start, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(located("headrace-demo"), folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"chat_template": settings["chat_template"] + "{{ more | default('') }}"}))
    own = {
        "context_tokens": 256,
        "template_arguments": {"more": "one two three"},
        "sampling": Sampling(temperature=0.0),
    }
    async with start("mlx", model=str(folder), **own) as engine:
        assert [known.context_tokens for known in engine.status().facts.values()] == [256]
        overridden = ChatRequest(prompt="x", chat_template_kwargs={"more": ""})
        assert await engine.counter.count_tokens(ChatRequest(prompt="x")) > await engine.counter.count_tokens(
            overridden
        )
        story = ChatRequest(prompt="Tell me a story.", max_tokens=24)
        assert len({(await ask(engine, story, seed=seed)).text for seed in range(3)}) == 1
        warm = ChatRequest(prompt="Tell me a story.", max_tokens=24, temperature=5.0)
        assert len({(await ask(engine, warm, seed=seed)).text for seed in range(3)}) == 3
