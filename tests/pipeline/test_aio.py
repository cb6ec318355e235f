import asyncio
import contextlib
import logging

import pytest

from pipeline.aio import Background, cancellation_kept, wait_set


async def test_what_a_background_task_raises_is_logged_with_its_name(caplog: pytest.LogCaptureFixture):
    async def fail() -> None:
        raise ValueError("on purpose")

    background = Background()
    with caplog.at_level(logging.ERROR):
        background.start(fail(), what="a failing task")
        assert await background.join(5)
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
