"""Triage of one request in hand: read it, judge it, and decide where it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from consumers.router.opinions import Opinions
from pipeline.config import Config
from pipeline.core.ending import Failed, Moved, Outcome, Returned
from pipeline.core.envelope import Envelope
from pipeline.core.triage import Decision, Room, Verdict, Waiting, classify, spill
from pipeline.core.triage import Outcome as Choice
from pipeline.delivery.held import Held
from pipeline.process.role import Role
from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, Request
from pipeline.wire.subjects import Lane, Move, Task, ollama_subject

# A request that stays on its lane is delivered again after this long.
STAY_S = 0.2


@dataclass(slots=True)
class Triage:
    """Decides how the router ends a request that it holds.

    Args:
        me: the role's peers and spans.
        config: the settings.
        opinions: an internal model's, on doubtful cases.
    """

    me: Role
    config: Config
    opinions: Opinions

    async def outcome(self, held: Held, room_now: Callable[[], Room], asking: Callable[[], None]) -> Outcome:
        """How a request ends that no engine has begun.

        Args:
            held: the request.
            room_now: what Ollama has left; called after the verdict.
            asking: called before this waits for an internal model.
        """
        envelope = held.envelope
        try:
            request = self._read(held)
        except HeadraceError as error:
            # Moving it would lose what was wrong with its headers.
            return Failed(error)
        with self.me.tracing.triage() as span:
            verdict = await self._verdict(request, envelope, asking)
            load, room = self.me.peers.load("mlx"), room_now()
            waiting = Waiting(
                verdict=verdict,
                priority=envelope.priority,
                ollama_may=self._ollama_may(request),
                mlx_may=self._mlx_may(request),
                moved=envelope.move not in (None, Move.REPLAYED, Move.PRIORITY),
            )
            decision = spill(waiting, load, room)
            outcome = _outcome_of(decision, verdict, envelope)
            span.decision(
                verdict.task,
                decision.reason,
                move=outcome.how if isinstance(outcome, Moved) else None,
                saturation=load.saturation if load else None,
                mlx_wait_ms=load.predicted_wait_ms.of(envelope.priority) if load else None,
                ollama_ms=room.answer_ms,
            )
        return outcome

    def _read(self, held: Held) -> Request:
        if held.envelope.fault is not None:
            raise held.envelope.fault
        return decode_request(held.body, max_body_bytes=self.config.max_body_bytes)

    async def _verdict(self, request: Request, envelope: Envelope, asking: Callable[[], None]) -> Verdict:
        """What kind of work it is. Without an opinion in time, a doubtful case is complex."""
        verdict = classify(request, None if envelope.task is Task.UNTRIAGED else envelope.task)
        if verdict.certain or not isinstance(request, ChatRequest):
            return verdict
        if not await self.opinions.says_simple(request, asking):
            return verdict
        return verdict._replace(task=Task.SIMPLE, certain=True, reason="an internal model says it is simple")

    def _ollama_may(self, request: Request) -> bool:
        wanted, catalogue = request.wanted_model, self.me.peers.catalogue(self.config)
        if isinstance(request, EmbeddingRequest):
            return catalogue.embedder_on_ollama(wanted) is not None
        if request.needs_mlx and self._mlx_may(request):
            return False
        return catalogue.model_on("ollama", wanted) is not None

    def _mlx_may(self, request: Request) -> bool:
        """Whether MLX has the model; while no worker has said which models it has, it may have any."""
        if isinstance(request, EmbeddingRequest):
            return False
        catalogue = self.me.peers.catalogue(self.config)
        return not catalogue.mlx or catalogue.model_on("mlx", request.wanted_model) is not None


def _outcome_of(decision: Decision, verdict: Verdict, envelope: Envelope) -> Moved | Returned:
    match decision.outcome:
        case Choice.SPILL:
            return Moved(ollama_subject(envelope.priority), Move.SPILLED, verdict.task, decision.reason)
        case Choice.COMPLEX:
            to = Lane(envelope.priority, Task.COMPLEX, envelope.owner).subject
            return Moved(to, Move.COMPLEX, verdict.task, decision.reason)
        case Choice.LEAVE:
            return Returned(STAY_S)
