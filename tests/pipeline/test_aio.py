import asyncio
import contextlib
import logging

import pytest

from pipeline.aio import Background, Grouping, cancellation_kept, wait_set


async def test_what_a_background_task_raises_is_logged_with_its_name(caplog: pytest.LogCaptureFixture):
    async def fail() -> None:
        raise ValueError("on purpose")

    background = Background()
    with caplog.at_level(logging.ERROR):
        background.start(fail(), what="a failing task")
        assert await background.join(60)
    assert "a failing task failed" in caplog.text
    assert "on purpose" in caplog.text


async def test_joining_waits_for_what_starts_meanwhile():
    done = []
    background = Background()

    async def first() -> None:
        background.start(second(), what="second")

    async def second() -> None:
        done.append("second")

    background.start(first(), what="first")
    assert await background.join()
    assert done == ["second"]
    assert len(background) == 0


async def test_joining_ends_at_its_timeout_and_cancelling_ends_the_tasks():
    background = Background()
    task = background.start(asyncio.Event().wait(), what="endless")
    assert not await background.join(0.0)
    background.cancel()
    assert await background.join()
    assert task.cancelled()


async def test_an_event_is_awaited_until_its_time_is_over():
    event = asyncio.Event()
    assert not await wait_set(event, 0.0)
    event.set()
    assert await wait_set(event, None)


async def test_a_cancellation_that_a_call_swallows_ends_the_block():
    begun = asyncio.Event()

    async def swallow() -> None:
        with cancellation_kept():
            begun.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = asyncio.create_task(swallow())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_cancellation_that_a_call_turns_into_its_own_error_is_kept():
    async def call() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("closed") from None

    async def work() -> None:
        with cancellation_kept():
            await call()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Grouped:
    """Carries out groups of numbers, each when the test says so."""

    def __init__(self) -> None:
        self.grouping: Grouping[int] = Grouping()
        self.groups: list[list[int]] = []
        self.gate = asyncio.Semaphore(0)
        self.fails = False

    async def work(self, group: list[int]) -> None:
        self.groups.append(list(group))
        await self.gate.acquire()
        if self.fails:
            raise ValueError(group)

    def start(self, number: int, most: int = 9) -> asyncio.Task[None]:
        return asyncio.create_task(self.grouping.carry_out(number, self.work, most=most))


async def turns() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_comes_while_a_group_is_carried_out_is_the_next_group():
    grouped = Grouped()
    first = grouped.start(1)
    await turns()
    others = [grouped.start(number) for number in (2, 3, 4)]
    await turns()
    assert grouped.groups == [[1]]
    grouped.gate.release()
    await first
    await turns()
    assert grouped.groups == [[1], [2, 3, 4]]
    assert not any(task.done() for task in others)
    grouped.gate.release()
    await asyncio.gather(*others)


async def test_a_group_has_at_most_so_many_items_and_none_is_left_out():
    grouped = Grouped()
    tasks = [grouped.start(number, most=2) for number in range(5)]
    for _ in tasks:
        grouped.gate.release()
    await asyncio.gather(*tasks)
    assert grouped.groups == [[0, 1], [2, 3], [4]]


async def test_each_member_of_a_group_raises_what_its_work_raises_and_the_next_group_is_carried_out():
    grouped = Grouped()
    grouped.fails = True
    tasks = [grouped.start(number) for number in (1, 2)]
    grouped.gate.release()
    assert [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)] == [ValueError, ValueError]
    grouped.fails = False
    grouped.gate.release()
    await grouped.start(3)
    assert grouped.groups == [[1, 2], [3]]


async def test_a_cancelled_member_takes_no_other_one_with_it():
    grouped = Grouped()
    tasks = [grouped.start(number) for number in (1, 2)]
    await turns()
    tasks[0].cancel()
    await turns()
    grouped.gate.release()
    await tasks[1]
    assert tasks[0].cancelled()
    assert grouped.groups == [[1, 2]]
