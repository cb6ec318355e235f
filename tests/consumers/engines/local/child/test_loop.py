"""The engine's loop and its checks, turn by turn, without a process."""

import queue

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from consumers.engines.local import protocol
from consumers.engines.local.child.checks import answer_limit, template_messages
from consumers.engines.local.child.guided import Guide
from consumers.engines.local.child.instance import _Bytes
from consumers.engines.local.child.loop import Begin, EngineLoop, _Rates, batch_limits
from consumers.engines.local.child.seeds import key_bits
from consumers.engines.local.child.simulated import SimulatedBackend
from consumers.engines.local.protocol import Cancel, Facts, Rejected, Reset, Shutdown, Step
from pipeline.config import Config
from pipeline.core.batch_plan import Plan
from pipeline.engine import FIRST_SLOTS, Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatMessage, ChatRequest
from pipeline.wire.subjects import Priority

FAST = {"engine": "simulated", "simulated_tokens_per_s": 1e6, "simulated_prefill_tokens_per_s": 1e9}


class Scene:
    """A loop with the simulated engine. The test runs each turn."""

    def __init__(self, *, kv_bytes_per_token: int = 0, finds_slots: bool = False, **options) -> None:
        config = Config(**FAST | options)
        self.backend = SimulatedBackend(config, lambda _: None)
        self.backend.facts.kv_bytes_per_token = kv_bytes_per_token
        if finds_slots:
            self.backend.facts.slots = 0
        self.commands = queue.SimpleQueue()
        self.sent = []
        self.loop = EngineLoop(self.backend, self.commands, self.sent.append, config)

    def begin(
        self,
        key: int,
        *,
        epoch: int = 0,
        max_tokens: int = 8,
        priority: Priority = Priority.MEDIUM,
        prompt: str = "x",
        guide: Guide | None = None,
        coming: int = 0,
    ) -> None:
        request = ChatRequest(prompt=prompt, max_tokens=max_tokens)
        work = Work(id=f"r{key}", request=request, model="", seed=key)
        sequence = self.backend.prepare(key, work)
        sequence.guide = guide
        self.commands.put(Begin(epoch, sequence, None, priority, coming=coming))

    def run(self) -> None:
        """Run the commands so far, and the requests that they began, to their end."""
        for _ in range(10_000):
            if self.commands.empty() and not self.loop._begun:
                return
            self.loop.turn()
        raise AssertionError("the loop does not come to an end")

    def until(self, *keys: int) -> None:
        """Run until each of these requests has produced something."""
        for _ in range(10_000):
            if {key for key, _ in self.pieces()} >= set(keys):
                return
            self.loop.turn()
        raise AssertionError("they produce nothing")

    def answers(self) -> dict[int, list[int]]:
        """The tokens of each request."""
        tokens: dict[int, list[int]] = {}
        for key, piece in self.pieces():
            tokens.setdefault(key, []).extend(piece.token_ids)
        return tokens

    def pieces(self) -> list[tuple[int, Piece]]:
        return [entry for frame in self.sent if isinstance(frame, Step) for entry in frame.pieces]


def test_one_frame_a_step_has_every_sequence():
    scene = Scene()
    for key in (1, 2, 3):
        scene.begin(key)
    for _ in range(6):
        scene.loop.turn()
    assert [key for key, _ in scene.sent[-1].pieces] == [1, 2, 3]


def test_the_first_token_of_a_prompt_is_sent_as_soon_as_it_has_been_read():
    scene = Scene()
    scene.begin(1)
    scene.loop.turn()
    assert [key for key, _ in scene.sent[-1].pieces] == [1]


def test_an_answer_whose_form_can_be_followed_no_further_is_refused_and_the_others_go_on():
    vocabulary = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=len(_Bytes.tokens))
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_regex("a+"), log_level=0)
    scene = Scene()
    scene.begin(1)
    scene.begin(2, guide=Guide(matcher, "structured_outputs"))
    scene.until(1, 2)
    matcher.consume_token(ord("b"))
    scene.run()
    (rejected,) = [frame for frame in scene.sent if isinstance(frame, Rejected)]
    assert (rejected.key, rejected.code, rejected.param) == (2, ErrorCode.INVALID_REQUEST, "structured_outputs")
    assert len(scene.answers()[1]) == 8


def test_prompts_of_one_priority_are_read_together_in_pieces():
    scene = Scene(prefill_step_tokens=32)
    for key in (1, 2, 3, 4):
        scene.begin(key, prompt="x" * 64)
    for _ in range(3):
        scene.loop.turn()
    assert [[key for key, _ in frame.pieces] for frame in scene.sent] == [[], [], [1, 2, 3, 4]]


def test_a_prompt_is_read_together_with_one_that_is_on_its_way():
    scene = Scene(inter_token_target_s=30.0)
    scene.begin(1, priority=Priority.HIGH, coming=1)
    scene.loop.turn()
    assert not scene.sent
    # The loop waits for the next request, and does not read meanwhile.
    scene.begin(2, priority=Priority.HIGH)
    for _ in range(2):
        scene.loop.turn()
    assert [key for key, _ in scene.sent[-1].pieces] == [1, 2]


def test_a_request_that_does_not_come_is_not_awaited_for_long():
    scene = Scene(inter_token_target_s=0.01)
    scene.begin(1, priority=Priority.HIGH, coming=1)
    scene.run()
    assert len(scene.answers()[1]) == 8


def test_the_number_of_slots_that_was_found_is_told():
    scene = Scene(finds_slots=True, simulated_tokens_per_s=4000, simulated_answer_tokens=100_000)
    for key in range(1, 30):
        scene.begin(key, max_tokens=10_000)
    scene.until(1)
    assert scene.sent[-1].stats.slots == FIRST_SLOTS
    for _ in range(2000):
        scene.loop.turn()
        if scene.sent[-1].stats.slots > FIRST_SLOTS:
            return
    raise AssertionError("no wider batch is tried")


def test_high_takes_the_place_of_low_which_goes_on_where_it_was():
    undisturbed, scene = Scene(slots=1), Scene(slots=1)
    undisturbed.begin(1, max_tokens=50)
    undisturbed.run()
    scene.begin(1, max_tokens=50, priority=Priority.LOW)
    scene.until(1)
    scene.begin(2, max_tokens=8, priority=Priority.HIGH)
    scene.run()
    order = [key for key, _ in scene.pieces()]
    assert order.index(2) < 5
    assert 1 not in order[order.index(2) : len(order) - order[::-1].index(2)]
    assert scene.answers()[1] == undisturbed.answers()[1]
    assert [key for frame in scene.sent for key in frame.suspended] == [1]
    assert [key for frame in scene.sent for key in frame.resumed] == [1]


@pytest.mark.parametrize("kept_kv_bytes", [1 << 20, 0])
def test_a_suspended_request_is_read_again_only_if_its_cache_was_dropped(kept_kv_bytes):
    scene = Scene(slots=1, kv_bytes_per_token=10, kept_kv_bytes=kept_kv_bytes)
    read = scene.backend.batch.read
    pieces = []
    scene.backend.batch.read = lambda planned: pieces.extend(planned) or read(planned)
    scene.begin(1, max_tokens=20, priority=Priority.LOW, prompt="x" * 40)
    scene.until(1)
    scene.begin(2, priority=Priority.HIGH)
    scene.run()
    assert sum(tokens for key, tokens in pieces if key == 1) == (9 if kept_kv_bytes else 9 + 9 + 1)
    assert len(scene.answers()[1]) == 20


def test_a_cancelled_sequence_produces_nothing_more_and_the_others_go_on():
    scene = Scene()
    scene.begin(1)
    scene.begin(2)
    scene.loop.turn()
    scene.loop.turn()
    scene.loop.turn()
    scene.sent.clear()
    scene.commands.put(Cancel(1))
    scene.commands.put(Cancel(99))
    scene.run()
    assert {key for key, _ in scene.pieces()} == {2}


def test_sequences_wait_in_order_for_memory_that_all_may_need():
    scene = Scene(kv_bytes_per_token=1, kv_bytes_limit=512)
    for key in (1, 2, 3):
        scene.begin(key)
    scene.loop.turn()
    assert scene.loop._planner.running() == [1, 2]
    scene.run()
    assert {key for key, _ in scene.pieces()} == {1, 2, 3}


def test_a_step_that_raises_empties_the_batch_and_says_so():
    scene = Scene()
    scene.begin(1)
    scene.loop.turn()
    scene.backend.batch.step = lambda: 1 / 0
    scene.loop.turn()
    assert scene.sent[-1] == Reset(1, "ZeroDivisionError: division by zero", scene.backend.facts)
    scene.begin(2, epoch=0)
    scene.begin(3, epoch=1)
    scene.sent.clear()
    scene.run()
    assert {key for key, _ in scene.pieces()} == {3}


def test_an_answer_that_cannot_be_decoded_ends_alone():
    scene = Scene()
    scene.begin(1)
    scene.begin(2)
    scene.loop.turn()
    scene.loop._begun[1].sequence.transcript.detokenizer = None
    scene.run()
    (rejected,) = [frame for frame in scene.sent if isinstance(frame, Rejected)]
    assert (rejected.key, rejected.code) == (1, ErrorCode.ENGINE_FAILED)
    assert scene.pieces()[-1][1].finish_reason == "length"


def test_expected_tokens_are_those_of_an_average_answer():
    scene = Scene(simulated_answer_tokens=10)
    scene.begin(1, max_tokens=100)
    scene.run()
    scene.begin(2, max_tokens=100)
    scene.begin(3, max_tokens=4)
    scene.loop.turn()
    assert scene.sent[-1].stats.tokens_per_request == 10
    assert scene.sent[-1].stats.pending_tokens == 9 + 3


def test_reading_and_writing_are_measured_apart():
    rates = _Rates()
    rates.took(Plan(read=[(1, 60), (2, 40)]), 1, 1.0)
    rates.took(Plan(step=True), 0, 0.1)
    rates.took(Plan(step=True), 8, 0.1)
    assert rates.prompt_tokens_per_s == pytest.approx(100)
    assert rates.tokens_per_s == pytest.approx(40)


def test_what_is_left_to_read_is_told():
    scene = Scene(slots=1, simulated_answer_tokens=10)
    scene.begin(1, prompt="x" * 400)
    scene.run()
    scene.begin(2, prompt="x" * 400)
    scene.begin(3, prompt="x" * 400)
    scene.loop.turn()
    stats = scene.sent[-1].stats
    prompt = len(scene.loop._begun[3].sequence.prompt)
    assert stats.prompt_tokens_per_request == prompt
    assert prompt <= stats.pending_prompt_tokens < 2 * prompt, "one was read, or a part of it; one waits"


def test_shutdown_ends_the_loop_whatever_runs():
    scene = Scene()
    scene.begin(1)
    scene.commands.put(Shutdown())
    scene.loop.run()
    assert scene.sent == []


# ---- checks ----------------------------------------------------------------------------------------------------------


def test_a_limit_is_cut_to_what_fits():
    sizes = {"room_tokens": 100, "default": 50}
    assert [answer_limit(wanted, prompt_tokens=90, **sizes) for wanted in (None, 9, 10, 11)] == [10, 9, 10, 10]
    with pytest.raises(HeadraceError) as caught:
        answer_limit(1, prompt_tokens=100, **sizes)
    assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


@given(st.integers(1, 300), st.none() | st.integers(1, 300), st.integers(1, 300))
def test_an_answer_never_leaves_its_room(prompt_tokens, wanted, default):
    try:
        limit = answer_limit(wanted, prompt_tokens=prompt_tokens, room_tokens=200, default=default)
    except HeadraceError:
        assert prompt_tokens >= 200
    else:
        assert 1 <= limit <= 200 - prompt_tokens


def test_the_budget_of_kept_caches_is_the_setting_or_a_share_of_the_free_memory():
    facts = Facts(4096, 100, calls_tools=False, kv_bytes_per_token=1, reuse="segments")
    assert batch_limits(Config(), facts).kept_bytes == 1 << 30
    facts.free_bytes = 4000
    assert batch_limits(Config(), facts).kept_bytes == 1000
    assert batch_limits(Config(kept_kv_bytes=7), facts).kept_bytes == 7
    assert batch_limits(Config(), facts).reuse == "segments"
    assert batch_limits(Config(prompt_cache=False), facts).reuse == ""


def test_templates_see_plain_text_and_arguments_as_objects():
    call = {"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    conversation = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    system, assistant, tool = template_messages(msgspec.convert(conversation, list[ChatMessage]))
    assert system == {"role": "system", "content": "ab"}
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert tool["tool_call_id"] == "c1"


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**31))
def test_keys_are_64_bits_of_seed_and_position(seed, position):
    assert 0 <= key_bits(seed, position) < 2**64
    assert key_bits(seed, position) != key_bits(seed, position + 1)
    assert key_bits(seed, position) != key_bits(seed + 1, position)


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_survive_the_pipe():
    request = msgspec.convert({"prompt": "я", "tools": [{"function": {"name": "f"}}]}, ChatRequest)
    work = Work(id="r1", request=request, model="m", seed=2**63 - 1, resume_tokens=[1, 2], resume_text="abc")
    for frame in (protocol.Submit(1, 0, work), Cancel(2), Shutdown()):
        assert protocol.decode_to_child(protocol.encode(frame)[protocol.LENGTH_BYTES :]) == frame
    facts = protocol.Facts(4096, 640, calls_tools=True, kv_bytes_per_token=1024)
    error = HeadraceError(ErrorCode.INVALID_REQUEST, "no", param="stop")
    pieces = [(7, Piece(text="я", token_ids=[5], finish_reason="stop"))]
    step = Step(pieces, suspended=[7], resumed=[8])
    for frame in (protocol.Ready(facts), Rejected.of(1, error), step, Reset(1, "e", facts), protocol.LoadFailed("x")):
        data = protocol.encode(frame)
        assert int.from_bytes(data[: protocol.LENGTH_BYTES], "big") == len(data) - protocol.LENGTH_BYTES
        assert protocol.decode_from_child(data[protocol.LENGTH_BYTES :]) == frame
    assert Rejected.of(1, error).error().param == "stop"


def test_a_token_after_the_end_of_its_answer_in_the_same_turn_is_dropped():
    """A suspended sequence returns the token that was due, and may step in the same turn."""
    scene = Scene()
    scene.begin(1, max_tokens=1)
    scene.begin(2, max_tokens=5)
    scene.loop._take_commands()
    scene.loop._report(Plan(suspend=[1, 2]), [(1, 1), (1, 2), (2, 1)])
    assert scene.answers() == {1: [1], 2: [1]}
    assert scene.sent[-1].suspended == [2]
