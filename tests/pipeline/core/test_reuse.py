"""Who goes on from what was kept, who waits for whom, and what the budget leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.core.batch import BatchPlanner
from pipeline.core.batch_plan import BatchLimits, Plan, ReusablePrompt, StoreKept
from pipeline.core.stored import StoredPrompts
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority
BYTES = 10
LIMITS = BatchLimits(
    slots=4,
    piece_tokens=2048,
    target_s=0.2,
    hold_s=2.0,
    suspensions=3,
    suspended_s=30.0,
    kept_bytes=1 << 20,
    kv_bytes_per_token=BYTES,
    reuse="segments",
)
HEAD = list(range(1000, 1200))


class Scene:
    """A planner whose plans take no time. The tokens of answers are 1, 2, 3 and so on."""

    def __init__(self, stored: StoredPrompts | None = None, **limits) -> None:
        self.planner = BatchPlanner(replace(LIMITS, **limits), stored)
        self.now = 0.0
        self.plans: list[Plan] = []
        self.read: dict[int, int] = {}
        self.loaded: dict[int, int] = {}
        self.prompts: dict[int, list[int]] = {}

    def ask(self, key: int, tokens: list[int], priority: Priority = MEDIUM, *, exact: bool = False, **prompt) -> None:
        self.prompts[key] = tokens
        self.planner.arrived(
            key,
            priority,
            tokens=len(tokens),
            longest=len(tokens) + 100,
            exact_prompt=len(tokens) if exact else 0,
            prompt=ReusablePrompt(tokens, **{"scope": exact} | prompt),
        )

    def turn(self) -> Plan:
        self.now += 0.01
        plan = self.planner.plan(self.now)
        self.plans.append(plan)
        for load in plan.load:
            self.loaded[load.key] = load.tokens
        for key, tokens in plan.read:
            self.read[key] = self.read.get(key, 0) + tokens
        for key in plan.join:
            self.read[key] = self.read.get(key, 0) + 1
        if plan.read:
            self.planner.was_read(plan.read, seconds=0.001 * sum(n for _, n in plan.read), now=self.now)
        elif plan.step:
            self.planner.has_stepped(seconds=0.01, now=self.now)
        return plan

    def until_written(self, *keys: int) -> None:
        """Run until the prompts of these have been read."""
        for _ in range(1000):
            if set(keys) <= set(self.planner.decoding()):
                return
            self.turn()
        raise AssertionError("they are not read")

    def end(self, key: int, answer: int = 0) -> None:
        self.planner.ended(key, self.prompts[key] + list(range(answer)))

    def whole(self, key: int, tokens: list[int], **more) -> None:
        """A request from its beginning to its end."""
        self.ask(key, tokens, **more)
        self.until_written(key)
        self.end(key)


def test_a_second_turn_reads_only_what_is_new():
    scene = Scene()
    scene.ask(1, HEAD)
    scene.until_written(1)
    scene.end(1, answer=20)
    scene.ask(2, HEAD + list(range(20)) + [7] * 30)
    assert scene.planner.unread_tokens() == 30
    scene.until_written(2)
    assert scene.loaded == {2: 220}
    assert scene.read == {1: 200, 2: 30}
    assert (scene.planner.reuse.prompt_tokens, scene.planner.reuse.cached_tokens) == (450, 220)


@pytest.mark.parametrize(("priority", "alone", "pieces"), [(MEDIUM, True, 1), (MEDIUM, False, 4), (LOW, True, 4)])
def test_the_rest_of_a_lone_medium_prompt_is_read_at_once(priority, alone, pieces):
    scene = Scene(target_s=0.02)
    scene.whole(1, HEAD)  # at 1,000 tokens a second
    if not alone:
        scene.ask(3, [5] * 10, LOW)
    scene.ask(2, HEAD + [7] * 80, priority)
    scene.until_written(2)
    assert len([plan for plan in scene.plans for key, _ in plan.read if key == 2]) == pieces


def test_the_same_prompt_again_reads_its_last_token():
    scene = Scene()
    scene.whole(1, HEAD)
    scene.ask(2, HEAD, HIGH)
    scene.until_written(2)
    assert (scene.loaded[2], scene.read[2]) == (199, 1)


def test_a_head_that_is_shorter_than_a_pass_is_not_reused():
    scene = Scene()
    scene.whole(1, HEAD)
    scene.whole(2, HEAD[:15] + [7] * 30)
    assert not scene.loaded


def test_those_with_a_common_head_wait_until_the_first_has_read_it():
    scene = Scene()
    for key in (1, 2, 3):
        scene.ask(key, HEAD + [key] * 40)
    # The head is predicted to be read once.
    assert scene.planner.unread_tokens() == 240 + 40 + 40
    scene.turn()
    assert scene.planner.running() == [1]
    scene.until_written(1, 2, 3)
    assert scene.read == {1: 240, 2: 40, 3: 40}


def test_a_head_is_passed_on_before_the_rest_of_a_long_prompt_is_read():
    scene = Scene(piece_tokens=32)
    scene.ask(1, HEAD + [1] * 2000)
    scene.ask(2, HEAD + [2] * 40)
    scene.until_written(2)
    assert scene.planner._members[1].left > 1000
    assert scene.loaded == {2: 200}


def test_those_that_share_little_are_read_together():
    scene = Scene()
    scene.ask(1, HEAD[:50] + [1] * 40)
    scene.ask(2, HEAD[:50] + [2] * 40)
    scene.turn()
    assert scene.planner.running() == [1, 2]


@pytest.mark.parametrize("kept_bytes", [1 << 20, 0])
def test_a_more_urgent_one_waits_for_no_other(kept_bytes):
    scene = Scene(kept_bytes=kept_bytes)
    scene.ask(1, HEAD + [1] * 40, LOW)
    scene.turn()
    scene.ask(2, HEAD + [2] * 40, HIGH)
    scene.turn()
    assert set(scene.planner.running()) == {1, 2}


def test_a_follower_begins_when_its_leader_is_gone():
    scene = Scene(piece_tokens=32)
    scene.ask(1, HEAD + [1] * 40)
    scene.ask(2, HEAD + [2] * 40)
    scene.turn()
    assert scene.planner.running() == [1]
    scene.planner.ended(1, HEAD[:20])
    scene.until_written(2)
    assert scene.loaded == {2: 20}


def test_without_room_nothing_is_kept_and_the_followers_go_on_alone():
    scene = Scene(kept_bytes=0)
    for key in (1, 2):
        scene.ask(key, HEAD + [key] * 40)
    scene.until_written(1, 2)
    assert scene.read == {1: 240, 2: 240}
    assert not any(plan.keep for plan in scene.plans)


def test_nothing_is_kept_where_the_cache_is_off():
    scene = Scene(reuse="")
    scene.whole(1, HEAD)
    scene.whole(2, HEAD)
    assert scene.read == {1: 200, 2: 200}
    assert not any(plan.keep for plan in scene.plans)


def test_one_scope_does_not_use_what_another_has_left():
    scene = Scene()
    scene.whole(1, HEAD, scope="a")
    scene.whole(2, HEAD, scope="b")
    assert not scene.loaded


def test_an_exact_request_uses_whole_pieces_of_exact_ones():
    scene = Scene()
    scene.whole(1, HEAD)
    scene.whole(2, HEAD, exact=True)
    assert not scene.loaded
    scene.whole(3, HEAD + [7] * 9, exact=True)
    assert scene.loaded == {3: 192}
    pieces = [tokens for plan in scene.plans for key, tokens in plan.read if key == 3]
    assert pieces == [16, 1]


def test_suspended_requests_come_before_kept_prompts():
    scene = Scene(slots=1, kept_bytes=300 * BYTES)
    scene.whole(1, [5] * 250)
    assert scene.planner.reuse.nbytes == 249 * BYTES
    scene.ask(2, HEAD, LOW)
    scene.until_written(2)
    scene.ask(3, [9] * 20, HIGH)
    plan = scene.turn()
    assert plan.suspend == [2]
    assert plan.free
    assert not plan.drop
    assert scene.planner.reuse.nbytes + 200 * BYTES <= 300 * BYTES


def test_a_dropped_request_goes_on_from_what_was_kept_of_its_prompt():
    scene = Scene(slots=1, kept_bytes=230 * BYTES)
    scene.ask(1, HEAD, LOW)
    scene.until_written(1)
    for _ in range(60):
        scene.turn()
    scene.ask(2, [9] * 20, HIGH)
    scene.until_written(2)
    assert any(plan.drop == [1] for plan in scene.plans)
    scene.planner.ended(2, [])
    scene.until_written(1)
    assert scene.loaded == {1: 199}
    # Its own prompt is no part of another one's savings.
    assert scene.planner.reuse.cached_tokens == 0


class TestSnapshots:
    """Of a cache that cannot be cut."""

    def test_it_is_kept_at_the_marks_and_at_the_end(self):
        scene = Scene(reuse="snapshots")
        scene.ask(1, HEAD + [1] * 40, marks=[150, 230])
        scene.until_written(1)
        scene.turn()
        assert [keep.part.end for plan in scene.plans for keep in plan.keep] == [150, 230]
        ended = scene.planner.ended(1, HEAD + [1] * 45)
        assert ended is not None
        assert (ended.part.start, ended.part.end) == (0, 245)

    def test_only_a_whole_one_is_used(self):
        scene = Scene(reuse="snapshots")
        scene.whole(1, HEAD + [1] * 40, marks=[150])
        scene.whole(2, HEAD + [2] * 40, marks=[150])
        assert scene.loaded == {2: 150}

    def test_a_follower_waits_for_a_mark(self):
        scene = Scene(reuse="snapshots", piece_tokens=32)
        scene.ask(1, HEAD + [1] * 40, marks=[150])
        scene.ask(2, HEAD + [2] * 40, marks=[150])
        scene.turn()
        assert scene.planner.running() == [1]
        scene.until_written(2)
        assert scene.loaded == {2: 150}

    def test_no_one_waits_where_no_mark_is_shared(self):
        scene = Scene(reuse="snapshots")
        scene.ask(1, HEAD + [1] * 40, marks=[220])
        scene.ask(2, HEAD + [2] * 40, marks=[220])
        scene.turn()
        assert scene.planner.running() == [1, 2]


# ---- on disk ---------------------------------------------------------------------------------------------------------


def stored(scene: Scene) -> StoredPrompts:
    """What a scene keeps in memory, in files of 10 bytes each."""
    index = scene.planner.reuse._stored
    while written(scene):
        pass
    return index


def after_restart(before: Scene, **limits) -> Scene:
    """A scene that has only the files of another one."""
    index = StoredPrompts(1 << 30, snapshots=limits.get("reuse") == "snapshots")
    for name in stored(before)._files:
        index.found(name, 10)
    return Scene(index, **limits)


def test_a_file_is_made_of_the_parts_that_are_in_memory():
    scene = Scene(StoredPrompts(1 << 30))
    scene.whole(1, HEAD)
    scene.whole(2, HEAD[:100] + [7] * 60)
    store = scene.planner.reuse.next_to_store()
    assert (store.due.file.start, store.due.file.end) == (0, 64)
    assert [(start, end) for _, start, end in store.parts] == [(0, 64)]
    scene.planner.reuse._stored.wrote(store.due, 10)
    store = scene.planner.reuse.next_to_store()
    assert (store.due.file.start, store.due.file.end) == (64, 128)
    assert [(start, end) for _, start, end in store.parts] == [(64, 100), (0, 28)]


def test_a_stored_head_is_fetched_before_its_sequence_begins():
    before = Scene(StoredPrompts(1 << 30))
    before.whole(1, HEAD)
    scene = after_restart(before)
    scene.ask(1, HEAD + [7] * 40)
    assert scene.planner.unread_tokens() == 48
    (load,) = scene.turn().load
    assert (load.tokens, load.fetch.part.start, load.fetch.part.end) == (192, 0, 192)
    assert [file.end for file in load.fetch.files] == [64, 128, 192]
    scene.until_written(1)
    assert scene.read == {1: 48}


def test_only_what_is_not_in_memory_is_fetched():
    before = Scene(StoredPrompts(1 << 30))
    before.whole(1, HEAD)
    scene = after_restart(before)
    scene.whole(1, HEAD[:100] + [7] * 10)
    assert scene.loaded == {1: 64}
    scene.ask(2, HEAD)
    (load,) = scene.turn().load
    assert (load.tokens, load.fetch.part.start) == (192, 100)
    assert [file.start for file in load.fetch.files] == [64, 128]
    scene.until_written(2)
    scene.ask(3, HEAD)
    (load,) = scene.turn().load
    assert (load.tokens, load.fetch) == (192, None)


def test_a_file_is_not_fetched_to_save_less_than_a_block():
    before = Scene(StoredPrompts(1 << 30))
    before.whole(1, HEAD)
    scene = after_restart(before)
    scene.whole(1, HEAD[:65])
    assert scene.loaded == {1: 64}
    scene.whole(2, HEAD[:129])
    assert [file.start for plan in scene.plans for load in plan.load if load.key == 2 for file in load.fetch.files] == [
        64
    ]
    scene.whole(3, HEAD[:170])
    scene.ask(4, HEAD)  # of which 170 are in memory and 192 in files
    (load,) = scene.turn().load
    assert (load.tokens, load.fetch) == (170, None)


def test_a_file_has_no_empty_parts():
    scene = Scene(StoredPrompts(1 << 30))
    scene.whole(1, HEAD[:65])
    scene.whole(2, HEAD[:129])
    assert [[(start, end) for _, start, end in store.parts] for store in iter(lambda: written(scene), None)] == [
        [(0, 64)],
        [(0, 64)],
    ]


def written(scene: Scene) -> StoreKept | None:
    store = scene.planner.reuse.next_to_store()
    if store is not None:
        scene.planner.reuse._stored.wrote(store.due, 10)
    return store


def test_what_memory_has_lost_is_not_stored():
    scene = Scene(StoredPrompts(1 << 30))
    scene.whole(1, HEAD)
    scene.planner.clear()
    assert scene.planner.reuse._stored.next() is None


def test_nothing_is_fetched_that_the_budget_does_not_hold():
    before = Scene(StoredPrompts(1 << 30))
    before.whole(1, HEAD)
    scene = after_restart(before, kept_bytes=100 * BYTES)
    scene.ask(1, HEAD)
    scene.until_written(1)
    assert scene.read == {1: 200}


def test_a_stored_snapshot_is_fetched_whole():
    before = Scene(StoredPrompts(1 << 30, snapshots=True), reuse="snapshots")
    before.ask(1, HEAD, marks=[70, 140])
    before.until_written(1)
    scene = after_restart(before, reuse="snapshots")
    scene.ask(1, HEAD[:100] + [7] * 40)
    (load,) = scene.turn().load
    assert (load.tokens, load.fetch.part.start, load.fetch.part.end) == (70, 0, 70)
    scene.ask(2, HEAD)
    (load,) = scene.turn().load
    assert (load.tokens, [(file.start, file.end) for file in load.fetch.files]) == (140, [(0, 140)])
