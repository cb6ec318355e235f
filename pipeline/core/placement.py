"""What becomes of a request that an engine did not answer: another engine, another attempt, or an error.

Pure: facts in, an outcome out. The same policy serves the workers of both engines and the router's evacuation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.core.backoff import doubled
from pipeline.core.ending import Failed, Moved, Outcome, Returned, failure
from pipeline.core.envelope import Envelope
from pipeline.core.models import CannotLoad, Catalogue, mlx_model_for
from pipeline.engine import Misbehaved
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, Request
from pipeline.wire.subjects import Lane, Move, Task, ollama_subject

# A request is delivered again after this long, and after twice as long each further time.
RETRY_DELAY_S = 0.5
MOST_DELAY_S = 32.0
# A busy engine turns a request away this many times before that uses up an attempt.
MOST_TURN_AWAYS = 60
_NOTHING = Catalogue(())


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The models of all workers, as one worker knows them.

    Attributes:
        catalogue: the models on both engines.
        complete: whether a worker of the other engine has said which models it has, or has had the time to.
        others: the models of the other workers of the same engine.
        lends: whether an MLX worker is ready that takes requests from Ollama's lanes.
    """

    catalogue: Catalogue
    complete: bool = True
    others: Catalogue = _NOTHING
    lends: bool = False


class Tries(NamedTuple):
    """How often a request was tried.

    Attributes:
        tried: deliveries that counted as attempts, this one included.
        attempt: the number of this attempt in the record, which counts the engine's restarts too.
        most: how many attempts the request has.
        turned_away: how often the engine was busy and turned it away, this time included; 0 if it was not busy.
    """

    tried: int
    attempt: int
    most: int
    turned_away: int = 0


def after_error(
    error: HeadraceError,
    *,
    engine: EngineName,
    envelope: Envelope,
    request: Request,
    models: KnownModels,
    tries: Tries,
) -> Outcome:
    """The outcome of a request that an engine refused or failed to answer, unless `is_for_another`.

    Args:
        error: what the engine raised.
        engine: which one.
        envelope: the request's.
        request: its body.
        models: all workers' models.
        tries: how often it was tried.
    """
    if engine == "ollama":
        # The last attempt is left to MLX as long as it is not known what it has.
        uses_attempt = isinstance(error, Misbehaved) and tries.tried < tries.most
        elsewhere = _from_ollama(error, envelope, request, models, uses_attempt=uses_attempt)
    else:
        elsewhere = _from_mlx(error, envelope, request, models)
    return elsewhere or _at_the_same_engine(error, envelope, tries)


def is_for_another(error: HeadraceError, engine: EngineName, request: Request, models: KnownModels) -> bool:
    """Whether an engine refused a request for a model that another worker of it has. That worker is left to take it."""
    return lacks_model(error) and is_on(models.others, engine, request)


def lacks_model(error: HeadraceError) -> bool:
    """Whether an engine refused a request because it does not have its model, or cannot load it."""
    return error.code is ErrorCode.MODEL_NOT_FOUND or isinstance(error, CannotLoad)


def is_on(catalogue: Catalogue, engine: EngineName, request: Request) -> bool:
    """Whether the workers of an engine whose models these are have the one for a request."""
    if isinstance(request, EmbeddingRequest):
        return engine == "ollama" and catalogue.embedder_on_ollama(request.wanted_model) is not None
    return catalogue.model_on(engine, request.wanted_model) is not None


def back_to_mlx(envelope: Envelope, request: Request, catalogue: Catalogue, *, why: str) -> Moved | None:
    """The move from Ollama's lane to the lane that only MLX serves; None where MLX cannot answer the request.

    Args:
        envelope: the request's.
        request: its body. MLX makes no embeddings.
        catalogue: the models on both engines.
        why: shown to people.
    """
    if isinstance(request, EmbeddingRequest):
        return None
    if mlx_model_for(request.wanted_model, catalogue.table, catalogue.mlx, catalogue.internal) is None:
        return None
    to = Lane(envelope.priority, Task.COMPLEX, envelope.owner).subject
    return Moved(to, Move.RETURNED, envelope.task, f"back from ollama: {why}")


def lent_to_mlx(envelope: Envelope, request: Request, models: KnownModels, *, why: str) -> Moved | Returned | None:
    """How Ollama's worker gives a request that it holds to MLX; None where MLX cannot answer it.

    Returned, it is the first of Ollama's lane, and an MLX worker takes it from there at once. Moved, it waits with the
    others.
    """
    moved = back_to_mlx(envelope, request, models.catalogue, why=why)
    if moved is None or not models.lends:
        return moved
    return Returned(error=HeadraceError(ErrorCode.UNAVAILABLE, moved.why))


def _from_ollama(
    error: HeadraceError, envelope: Envelope, request: Request, models: KnownModels, *, uses_attempt: bool
) -> Outcome | None:
    """Back to MLX, or another try while MLX's models are not known yet: it may have the one that is asked for."""
    moved = back_to_mlx(envelope, request, models.catalogue, why=error.message)
    if moved is None and not models.complete and not isinstance(request, EmbeddingRequest):
        return Returned(_delay_s(envelope.delivered), uses_attempt=uses_attempt, error=error)
    return moved


def _from_mlx(error: HeadraceError, envelope: Envelope, request: Request, models: KnownModels) -> Outcome | None:
    """Where a request goes whose model this worker does not have, or which only Ollama can honour. What came back from
    Ollama stays with MLX.
    """
    needed = request.needs_ollama if isinstance(request, ChatRequest) else ""
    if error.code is not ErrorCode.UNSUPPORTED_PARAMETER or error.param != needed:
        needed = ""
    if not (needed or lacks_model(error)) or envelope.move is Move.RETURNED:
        return None
    try:
        model = _model_on_ollama(request, models.catalogue)
    except HeadraceError as refusal:
        if lacks_model(refusal) and not models.complete:
            return Returned(_delay_s(envelope.delivered), error=error)
        return Failed(refusal)
    if model is not None:
        to = ollama_subject(envelope.priority)
        return Moved(to, Move.SPILLED, envelope.task, _why_on_ollama(error, needed, model))
    return Returned(_delay_s(envelope.delivered), error=error) if needed and not models.complete else None


def _why_on_ollama(error: HeadraceError, needed: str, model: str) -> str:
    if needed:
        return f"only ollama supports {needed}"
    if isinstance(error, CannotLoad):
        return f"mlx cannot load its model, ollama has {model}"
    return f"only ollama has the model {model}"


def _model_on_ollama(request: Request, catalogue: Catalogue) -> str | None:
    """Ollama's model for a request, None where it has none; raises the error of a request that no engine can answer."""
    if isinstance(request, EmbeddingRequest):
        return catalogue.embedder(request.wanted_model)
    catalogue.engines_for(request.wanted_model)
    return catalogue.model_on("ollama", request.wanted_model)


def _at_the_same_engine(error: HeadraceError, envelope: Envelope, tries: Tries) -> Outcome:
    """Another attempt at the same engine, or the end."""
    busy_for_long = tries.turned_away > MOST_TURN_AWAYS
    if isinstance(error, CannotLoad):
        return failure(error)
    if error.code is ErrorCode.UNAVAILABLE and not busy_for_long:
        # The engine is away, and did nothing with the request: its deadline alone bounds the wait.
        return Returned(_delay_s(tries.turned_away or envelope.delivered), error=error)
    if not (busy_for_long or isinstance(error, Misbehaved)):
        return failure(error)
    if tries.tried < tries.most:
        return Returned(_delay_s(tries.tried), uses_attempt=True, error=error)
    attempts = "1 attempt" if tries.attempt == 1 else f"{tries.attempt} attempts"
    return failure(
        HeadraceError(
            ErrorCode.ENGINE_FAILED,
            f"Request {envelope.id} failed after {attempts} and was moved to the dead letters. {error.message}",
        )
    )


def _delay_s(times: int) -> float:
    return doubled(RETRY_DELAY_S, times, most_s=MOST_DELAY_S)
