"""What every shell does with asyncio: run tasks beside its own work, and wait for an event or a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")


class Background:
    """Tasks that run beside their owner and that no one awaits one by one.

    What a task raises is logged, so that no exception is lost. The owner ends what is left with `join` or `cancel`.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None], *, what: str) -> asyncio.Task[None]:
        """Run work. `what` names it in the log if it fails."""
        task = asyncio.get_running_loop().create_task(work, name=what)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def join(self, timeout_s: float | None = None) -> bool:
        """Wait until no task is left, those included that start meanwhile. Returns whether that was within timeout_s.

        Cancelling is safe: the tasks go on.
        """
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while self._tasks:
            left_s = None if deadline is None else deadline - loop.time()
            if left_s is not None and left_s <= 0:
                return False
            # Not `gather`: since Python 3.12 it gives the event loop no turn for what is done, which then stays here.
            await asyncio.wait(self._tasks, timeout=left_s)
        return True

    def cancel(self) -> None:
        """Cancel what is left, without waiting for it."""
        for task in self._tasks:
            task.cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)


class Grouping(Generic[_Item]):
    """Carries items out in groups: those that come while one group is carried out are the next group.

    An item that comes alone waits for nothing, and a group is as large as the work is slow.
    """

    def __init__(self) -> None:
        self._group: list[_Item] = []
        self._next: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def carry_out(self, item: _Item, work: Callable[[list[_Item]], Awaitable[None]], *, most: int) -> None:
        """Have work carry an item out in a group, and wait until it has.

        Cancelling is safe: the group is carried out all the same.

        Args:
            item: the item.
            work: the same for all items. What it raises, every member of the group raises.
            most: the most items in a group.
        """
        if self._next is None or len(self._group) >= most:
            self._group = []
            self._next = asyncio.get_running_loop().create_task(self._in_turn(self._group, work))
        self._group.append(item)
        await asyncio.shield(self._next)

    async def _in_turn(self, group: list[_Item], work: Callable[[list[_Item]], Awaitable[None]]) -> None:
        async with self._turn:
            if group is self._group:
                self._next = None
            await work(group)


async def wait_set(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Wait until event is set. Returns whether it was, within timeout_s seconds (None: no limit)."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


@contextmanager
def cancellation_kept() -> Iterator[None]:
    """Cancel the task at the end of the block if it was cancelled in it and a call swallowed that.

    Before Python 3.12 `asyncio.wait_for`, which the NATS client uses, loses a cancellation that arrives together with
    the result. The client turns one into an error of its own if its connection is closed.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
