"""The requests that a worker serves: each under a permit of the engine's, from its begin to its end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.aio import Background
from pipeline.core.ending import Failed, Returned
from pipeline.core.permits import Permit, Permits
from pipeline.delivery.taking import Taken
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Priority
from pipeline.worker.serving import Serving, ServingContext

log = logging.getLogger(__name__)

# Requests that are returned at the end of a drain have this long to be returned.
_RETURNING_S = 2.0


@dataclass(slots=True, eq=False)
class Job:
    """A request that is served under a permit; `permit` is released when the request leaves the engine."""

    taken: Taken
    serving: Serving
    permit: Permit


@dataclass(slots=True)
class Jobs:
    """The requests in one worker's hands, and the permits for them. One writer: the worker's event loop.

    Args:
        context: shared by the servings.
        on_change: called after a permit was used or released.
        on_ended: called with a request that has ended, and its cost in weighted tokens.
    """

    context: ServingContext
    on_change: Callable[[], None]
    on_ended: Callable[[Taken, float], None]
    _permits: Permits = field(init=False, default_factory=Permits)
    _jobs: set[Job] = field(init=False, default_factory=set)
    _tasks: Background = field(init=False, default_factory=Background)

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(list(self._jobs))

    # ---- permits

    def permits(self) -> Permits:
        """The permits, by what the engine reports now."""
        status = self.context.engine.status()
        self._permits.observe(
            ready=status.state == "ready",
            total=status.slots_total,
            used=status.slots_used,
            suspends=status.suspends,
        )
        return self._permits

    def release(self, permit: Permit) -> None:
        """No request runs under permit any more. Twice is harmless."""
        self._permits.release(permit)
        self.on_change()

    # ---- serving

    def begin(self, taken: Taken, permit: Permit, *, reason: str, extra: bool = False) -> None:
        """Serve a request under a permit.

        Args:
            taken: the request.
            permit: reserved for it.
            reason: why this engine serves it.
            extra: another worker had begun it.
        """
        self._permits.use(permit)
        serving = Serving(self.context, taken.held, reason, lambda: self.release(permit), extra)
        job = Job(taken, serving, permit)
        self._jobs.add(job)
        self._tasks.start(self._serve(job), what=f"serving request {taken.envelope.name}")
        self.on_change()

    async def _serve(self, job: Job) -> None:
        try:
            await job.serving.run()
        except Exception:
            # The other requests go on. The lease of this one runs out, and the delivery counts as an attempt.
            log.exception("Request %s could not be served.", job.taken.envelope.name)
        finally:
            self.on_ended(job.taken, self.cost(job))
            self._jobs.discard(job)
            self.release(job.permit)

    def cancel(self, name: str) -> None:
        """End the request of this name, if it is here, with the error `cancelled`."""
        for job in self:
            if job.taken.envelope.name == name:
                error = HeadraceError(ErrorCode.CANCELLED, f"Request {job.taken.envelope.id} was cancelled.")
                job.serving.interrupt(Failed(error))

    def close(self) -> None:
        """Grant no more permits."""
        self._permits.close()

    async def drain(self, drain_s: float) -> None:
        """Let what runs finish within drain_s seconds, then return the rest."""
        await self._tasks.join(drain_s)
        for job in self:
            job.serving.interrupt(Returned())
        await self._tasks.join(_RETURNING_S)

    # ---- counts

    def running(self) -> Counter[Priority]:
        """How many requests the engine has, by priority."""
        return Counter(job.taken.envelope.priority for job in self._jobs if job.permit.state == "used")

    def servings(self) -> list[Serving]:
        """Those that the engine has."""
        return [job.serving for job in self._jobs if job.permit.state == "used"]

    def as_urgent(self, priority: Priority) -> int:
        """How many requests of this priority and of more urgent ones the engine has."""
        running, order = self.running(), list(Priority)
        return sum(running[each] for each in order[: order.index(priority) + 1])

    def held(self) -> Counter[str]:
        """How many requests are in hand, by durable consumer, including those that have left the engine."""
        return Counter(job.taken.consumer for job in self._jobs)

    @property
    def unstored(self) -> int:
        """How many requests have left the engine and are still being ended."""
        return sum(job.permit.state == "released" for job in self._jobs)

    def cost(self, job: Job) -> float:
        """What a request has cost so far, weighted tokens. The tokens of its prompt are known when it ends."""
        prompt_tokens, output_tokens = job.serving.cost_tokens
        return prompt_tokens * self.context.config.prompt_token_cost + output_tokens
