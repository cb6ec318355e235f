"""A model server as an engine: its models, its slots, and the circuit breaker that pauses calls to a failing server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Self

from consumers.engines.server.dialect import M, ServerDialect
from consumers.engines.server.errors import BadAnswer, ServerError
from consumers.engines.server.generation import ServerGeneration
from consumers.engines.server.plain import reader_of
from consumers.engines.server.thoughts import ThoughtsAnew
from pipeline.aio import wait_set
from pipeline.config import Config
from pipeline.core.breaker import Breaker, BreakerPermit
from pipeline.core.models import OfferedModel, by_preference, embedder_for, is_internal, ollama_model_for
from pipeline.core.parallel import RunsAtOnce
from pipeline.core.server_pace import ServerPace
from pipeline.engine import Embedded, Embedder, EngineStatus, Misbehaved, TokenCounter, TurnedAway, Work
from pipeline.machine import memory_total
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import EngineName, WorkerState
from pipeline.wire.requests import EmbeddingRequest

REFRESH_S = 10.0  # between two reads of the models of a healthy server
RETRY_S = 0.2  # before the second try at a server that does not answer; then the breaker sets the pauses
LOOK_TIMEOUT_S = 3.0
SIMULATED_FAMILY = "simulated"
_FAILURES_TO_TRIP = 2


class ServerEngine(Generic[M]):
    """A model server as an engine. Entering it checks the server once. A server that is away is `down` until a later
    check finds it.

    Servers report text without token ids. Some cannot continue an answer that another attempt began: such work is
    refused with `engine_failed`, and only another engine can continue it, from its text. There an answer that breaks
    off ends the same way if its client has seen a part of it. Otherwise another attempt can succeed (`Misbehaved`).

    Args:
        config: the settings; `ollama_models`, `spill_models`, `internal_models` and `plain_tool_calls` are read.
        dialect: the server, in the terms of its API.
        slots: the most requests that the server gets at once.
    """

    # All servers beside MLX serve the lanes of spilled requests, which bear this name.
    name: EngineName = "ollama"
    simulated: bool = False
    embedder: Embedder | None
    counter: TokenCounter | None = None

    def __init__(self, config: Config, dialect: ServerDialect[M], *, slots: int) -> None:
        self.embedder = self
        self._config = config
        self._dialect = dialect
        self._slots = slots
        self._breaker = Breaker(failures_to_trip=_FAILURES_TO_TRIP, probe_timeout_s=2 * LOOK_TIMEOUT_S)
        self._memory = memory_total() if dialect.is_local else None
        self._pace = ServerPace()
        self._parallel = RunsAtOnce(slots)
        self._model = ""  # of the latest request
        self._loaded: Mapping[str, int] = {}
        self._models: Sequence[M] = ()
        self._unseen = "not checked yet"
        self._failed_for = ""  # the request that failed last; empty after an answer
        self._keys = itertools.count()
        self._generations: dict[str, ServerGeneration] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._told: object = None
        self._look_now = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._look()
        self._watcher = asyncio.create_task(self._watch(), name="server-watcher")
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        for generation in list(self._generations.values()):
            await generation.close()
        await self._dialect.close()

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL of the server."""
        return self._dialect.url

    @property
    def _usable(self) -> list[M]:
        """The models that answer users' chats, the preferred one first."""
        internal = self._config.internal_models
        chatting = [model for model in self._models if model.chats and not is_internal(model.name, internal)]
        order = [*self._config.ollama_models, *self._config.spill_models.values()]
        names = by_preference(
            (OfferedModel(model.name, model.parameters, model.size or 0) for model in chatting), order, self._memory
        )
        return sorted(chatting, key=lambda model: names.index(model.name))

    @property
    def _embedding_models(self) -> list[str]:
        internal = self._config.internal_models
        return [model.name for model in self._models if model.embeds and not is_internal(model.name, internal)]

    def status(self) -> EngineStatus:
        """The engine as it is now. It is down while the server does not answer, fails, or has no usable model."""
        reason = self._breaker.reason or self._unseen
        models = [model.name for model in self._usable]
        embedding_models = self._embedding_models
        named = {*models, *embedding_models}
        if not reason and not (models or embedding_models):
            reason = f"{self._dialect.place} has no usable model. {self._dialect.advice}"
        state: WorkerState = "down" if reason else "ready"
        now = asyncio.get_running_loop().time()
        pace = self._pace.pace(self._model or next(iter(models), ""), now)
        left = [self._pace.left(key) for key in self._generations]
        return EngineStatus(
            state=state,
            models=models,
            slots_used=len(self._generations),
            slots_total=self._parallel.slots(now, measured=pace.tokens_per_s > 0),
            pending_tokens=sum(tokens for tokens, _ in left),
            tokens_per_s=pace.tokens_per_s,
            tokens_per_request=pace.tokens_per_request,
            pending_prompt_tokens=sum(prompt_tokens for _, prompt_tokens in left),
            prompt_tokens_per_s=pace.prompt_tokens_per_s,
            prompt_tokens_per_request=pace.prompt_tokens_per_request,
            answer_tokens_per_s=pace.answer_tokens_per_s,
            loading_s=pace.loading_s,
            rests=self._rests(now),
            empty=not self._unseen and not (models or embedding_models),
            reason=reason,
            standin=any(model.standin for model in self._models),
            tool_models=[model.name for model in self._usable if model.calls_tools],
            embedding_models=embedding_models,
            server=self.url,
            dialect=self._dialect.dialect,
            facts={each.name: self._dialect.facts(each, self._loaded) for each in self._models if each.name in named},
        )

    def _rests(self, now: float) -> dict[str, float]:
        """How long each running request probably still takes, in seconds; infinite while that is not known."""
        return {generation.request_id: self._pace.rest_s(key, now) for key, generation in self._generations.items()}

    def on_change(self, callback: Callable[[], None]) -> None:
        """As `Engine.on_change`. Changes of rates and pending tokens do not count, because they never stop; that a rate
        becomes known does.
        """
        self._callbacks.append(callback)

    def _changed(self) -> None:
        status = self.status()
        slots = (status.slots_used, status.slots_total, status.tokens_per_s > 0)
        current = (status.state, status.reason, status.models, status.embedding_models, slots)
        if current != self._told:
            self._told = current
            for callback in self._callbacks:
                callback()

    def resolve(self, model: str | None) -> str:
        """The server's name of the requested model, or of its equivalent. None: the preferred one (`by_preference`).

        Raises:
            HeadraceError: `model_internal`, `model_not_found`; `unavailable` while the server's models are not known.
        """
        internal = self._config.internal_models
        self._check_internal(model)
        names = [usable.name for usable in self._usable]
        found = ollama_model_for(model, self._config.spill_models, names, internal)
        if found is None:
            raise self._missing(model, "a model that chats")
        return found

    def embedding_model(self, model: str | None) -> str:
        """As `Embedder.embedding_model`. None: the first by name."""
        self._check_internal(model)
        chatting = [usable.name for usable in self._usable]
        found = embedder_for(model, self._embedding_models, chatting, self._config.internal_models)
        if found is None:
            raise self._missing(model, "a model that makes embeddings")
        return found

    def _check_internal(self, model: str | None) -> None:
        if model is not None and is_internal(model, self._config.internal_models):
            raise HeadraceError(
                ErrorCode.MODEL_INTERNAL,
                f"Model {quoted(model)} is internal and cannot be requested. Choose another model.",
                param="model",
            )

    def _missing(self, model: str | None, any_: str) -> HeadraceError:
        if not self._models and self._unseen:
            return HeadraceError(ErrorCode.UNAVAILABLE, f"{self._dialect.place} does not answer: {self._unseen}.")
        asked = any_ if model is None else f"model {quoted(model)}"
        return HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"{self._dialect.place} does not have {asked}.", param="model")

    # ---- work --------------------------------------------------------------------------------------------------------

    async def submit(self, work: Work) -> ServerGeneration:
        """Begin work.

        Raises:
            HeadraceError: `unavailable` while calls are paused; `engine_failed` for work that was begun elsewhere and
                that the server cannot continue; `invalid_request` for a conversation that the server's API cannot
                carry; `unsupported_parameter` for what it has no parameter for.
        """
        call = self._dialect.call(work, next((known for known in self._models if known.name == work.model), None))
        now = asyncio.get_running_loop().time()
        permit = self._permit(now)
        key = f"{next(self._keys)}"
        reader = reader_of(call.reader, work, plain_calls=self._config.plain_tool_calls)
        if work.resume_reasoning and not work.resume_text:
            reader = ThoughtsAnew(reader, work.resume_reasoning)
        self._model = work.model
        self._pace.begun(key, work.model, now, limit=call.limit)
        self._parallel.begun(key, now)
        generation = ServerGeneration(
            work.id,
            reader,
            call.parts,
            limit=call.limit,
            parted=lambda _: self._parted(key),
            # The client has seen the beginning of a streamed answer.
            failure=lambda error: self._failure(
                permit,
                error,
                request_id=work.id,
                final=work.request.streams and generation.begun and not self._dialect.continues,
            ),
            ended=lambda ended: self._ended(key, ended, permit),
        )
        self._generations[key] = generation
        self._changed()
        return generation

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """As `Embedder.embed`. Embeddings do not count in the rates, which are for answers."""
        loop = asyncio.get_running_loop()
        permit = self._permit(loop.time())
        try:
            embedded = await self._dialect.embed(request, model)
        except ServerError as error:
            raise self._failure(permit, error) from None
        except BadAnswer as error:
            raise self._failure(permit, ServerError(str(error))) from None
        except asyncio.CancelledError:
            self._breaker.abandoned(permit, loop.time())
            raise
        self._breaker.succeeded(permit)
        return embedded

    def _permit(self, now: float) -> BreakerPermit:
        permit = self._breaker.permit(now) if self._breaker.closed else None
        if permit is None:
            raise HeadraceError(
                ErrorCode.UNAVAILABLE,
                f"Calls to {self._dialect.label} are paused after failures: {self._breaker.reason}.",
            )
        return permit

    def _failure(
        self, permit: BreakerPermit, error: ServerError, *, request_id: str = "", final: bool = False
    ) -> HeadraceError:
        """The request's error after one of the server's; tells the breaker, once for all attempts of one request: a
        request that makes a model fail takes the server from no other request. `final`: no attempt here can succeed.
        """
        refusal = self._dialect.refusal(error)
        if refusal is not None:
            self._breaker.succeeded(permit)
        elif not error.away and request_id and request_id == self._failed_for:
            self._breaker.abandoned(permit, asyncio.get_running_loop().time())
        else:
            self._failed_for = request_id
            self._breaker.failed(permit, asyncio.get_running_loop().time(), f"{self.url}: {error.message}")
            self._changed()  # before the next check, which can find the server well again
        self._look_now.set()
        if refusal is not None:
            return refusal
        label = self._dialect.label
        if error.away and error.status is not None:
            return TurnedAway(f"{label} is busy: {error.message}")
        if error.away:
            return HeadraceError(ErrorCode.UNAVAILABLE, f"{label} is away: {error.message}")
        message = f"{label} failed: {error.message}"
        return HeadraceError(ErrorCode.ENGINE_FAILED, message) if final else Misbehaved(message)

    def _parted(self, key: str) -> None:
        """A part of an answer has come: it can show the server's speed, and how many requests it runs at once."""
        self._pace.part(key, asyncio.get_running_loop().time())
        self._parallel.part(key)
        self._changed()

    def _ended(self, key: str, generation: ServerGeneration, permit: BreakerPermit) -> None:
        now = asyncio.get_running_loop().time()
        if generation.whole:
            self._failed_for = ""
            self._breaker.succeeded(permit)
        else:
            self._breaker.abandoned(permit, now)
        self._parallel.ended(key, now, self._pace.usual_first_s(self._model))
        self._pace.ended(key, now, generation.timing)
        self._generations.pop(key, None)
        self._changed()

    # ---- health ------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Check the server from time to time: at once after a failure, and by the breaker's plan while it is open."""
        while True:
            await wait_set(self._look_now, self._pause_s())
            self._look_now.clear()
            await self._look()

    def _pause_s(self) -> float:
        now = asyncio.get_running_loop().time()
        due = self._breaker.next_wake(now)
        if due is not None:
            return max(0.0, due - now)
        return RETRY_S if self._unseen else REFRESH_S

    async def refresh(self) -> None:
        """Read the models now: there may be a new one."""
        await self._look()

    async def _look(self) -> None:
        """Read the models, if the breaker permits it. The result closes an open breaker, or prolongs its pause."""
        loop = asyncio.get_running_loop()
        probing = not self._breaker.closed
        permit = self._breaker.permit(loop.time())
        if permit is None:
            return
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                self._models = await self._dialect.models()
                loaded = await self._dialect.loaded()
        except (ServerError, TimeoutError) as error:
            self._unseen = str(error) or "no answer in time"
            self._breaker.failed(permit, loop.time(), f"{self.url}: {self._unseen}")
        else:
            self._unseen = ""
            if loaded is not None:
                self._loaded = loaded
            self._pace.loaded(None if loaded is None else frozenset(self._loaded))
            if probing:
                self._parallel.restarted()
            if any(model.standin for model in self._models):
                self._parallel.told(self._slots)
            # The stand-in reports the family `simulated` if no model runs behind it.
            self.simulated = any(model.family == SIMULATED_FAMILY for model in self._usable)
            if probing:  # a list does not prove that answers work, so it does not clear their failures
                self._breaker.succeeded(permit)
        self._changed()
