"""What an engine did not answer goes to one that can, is tried again, or ends: never without an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.ending import Buried, Failed, Moved, Returned
from pipeline.core.envelope import Envelope
from pipeline.core.models import CannotLoad, Catalogue
from pipeline.core.placement import MOST_TURN_AWAYS, KnownModels, Tries, after_error, back_to_mlx, is_for_another
from pipeline.engine import Misbehaved, TurnedAway
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import Move, Priority, Task

CATALOGUE = Catalogue(["big"], ["small"], {"big": "twin"}, ["tinyllama"], ["embeds"])
MISSING = HeadraceError(ErrorCode.MODEL_NOT_FOUND, "mlx does not have it")
AWAY = HeadraceError(ErrorCode.UNAVAILABLE, "the connection failed")
WRONG = Misbehaved("Ollama says: out of memory")


def envelope(**fields):
    return Envelope("r1", Priority.LOW, Task.SIMPLE, stored_at=1.0, **{"delivered": 1} | fields)


def chat(model=None):
    return ChatRequest(prompt="x", model=model)


def after(error, request, *, engine="mlx", models=None, tries=1, max_attempts=3, turned_away=0, **fields):
    return after_error(
        error,
        engine=engine,
        envelope=envelope(**fields),
        request=request,
        models=models or KnownModels(CATALOGUE),
        tries=Tries(tries, tries, max_attempts, turned_away),
    )


# ---- from MLX


@pytest.mark.parametrize(
    ("request_", "model"),
    [(chat("small"), "small"), (EmbeddingRequest("x"), "embeds"), (EmbeddingRequest("x", model="embeds"), "embeds")],
)
def test_a_model_that_only_ollama_has_moves_the_request_there(request_, model):
    outcome = after(MISSING, request_)
    assert outcome == Moved("llm.ollama.low", Move.SPILLED, Task.SIMPLE, f"only ollama has the model {model}")


def test_what_only_ollama_can_honour_goes_there_where_it_has_the_model():
    refused = HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, "no", param="suffix")
    for model in (None, "small"):
        request = ChatRequest(prompt="x", model=model, suffix="end")
        outcome = after(refused, request)
        assert outcome == Moved("llm.ollama.low", Move.SPILLED, Task.SIMPLE, "only ollama supports suffix")
        assert after(refused, request, move=Move.RETURNED) == Failed(refused)
    for_mlx = ChatRequest(prompt="x", model="big", suffix="end")
    assert after(refused, for_mlx) == Failed(refused)
    waits = after(refused, for_mlx, models=KnownModels(CATALOGUE, complete=False))
    assert waits == Returned(0.5, error=refused)
    other = HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, "no", param="tools")
    assert after(other, ChatRequest(prompt="x", suffix="end")) == Failed(other)


def test_a_request_that_came_back_from_ollama_is_not_sent_there_again():
    assert after(MISSING, chat("small"), move=Move.RETURNED) == Failed(MISSING)


@pytest.mark.parametrize("request_", [chat("theirs"), EmbeddingRequest("x", model="theirs")])
def test_a_model_that_no_engine_has_is_an_error_once_ollama_could_say_so(request_):
    waits = after(MISSING, request_, models=KnownModels(CATALOGUE, complete=False))
    assert waits == Returned(0.5, error=MISSING)
    outcome = after(MISSING, request_)
    assert isinstance(outcome, Failed)
    assert outcome.error.code is ErrorCode.MODEL_NOT_FOUND
    assert "theirs" in outcome.error.message


def test_an_internal_model_is_refused_whichever_worker_has_been_heard():
    outcome = after(MISSING, chat("tinyllama"), models=KnownModels(CATALOGUE, complete=False))
    assert outcome.error.code is ErrorCode.MODEL_INTERNAL


def test_a_model_of_another_mlx_worker_leaves_the_request_to_it():
    # Whether or not Ollama has it too.
    for on_ollama in ([], ["small"], ["other"]):
        models = KnownModels(Catalogue(["big", "other"], on_ollama), others=Catalogue(["other"], on_ollama))
        assert is_for_another(MISSING, "mlx", chat("other"), models)
        assert not is_for_another(MISSING, "mlx", chat("big"), models)
        assert not is_for_another(AWAY, "mlx", chat("other"), models)
    assert after(MISSING, chat("other"), models=KnownModels(models.catalogue), move=Move.RETURNED) == Failed(MISSING)


@pytest.mark.parametrize("heard", [True, False], ids=["known", "not heard yet"])
def test_a_model_that_cannot_be_loaded_ends_the_request_with_the_reason(heard):
    failed = CannotLoad("broken", "why")
    # This worker's own status may still have the model as one that can be loaded.
    for names in (Catalogue([], cannot_load={"broken": "why"}), Catalogue(["broken"])):
        outcome = after(failed, chat("broken"), models=KnownModels(names, complete=heard), turned_away=0)
        if heard or names.mlx:
            assert isinstance(outcome, Failed)
            assert outcome.error.message == failed.message
        else:
            assert outcome == Returned(0.5, error=failed)
    assert after(failed, chat("broken"), move=Move.RETURNED) == Failed(failed)


def test_a_model_that_one_worker_cannot_load_leaves_the_request_to_another_one_or_to_ollama():
    failed = CannotLoad("broken", "why")
    assert is_for_another(failed, "mlx", chat("broken"), KnownModels(CATALOGUE, others=Catalogue(["broken"])))
    assert not is_for_another(failed, "mlx", chat("broken"), KnownModels(CATALOGUE, others=Catalogue(["big"])))
    models = KnownModels(Catalogue([], ["broken"], cannot_load={"broken": "why"}))
    why = "mlx cannot load its model, ollama has broken"
    assert after(failed, chat("broken"), models=models) == Moved("llm.ollama.low", Move.SPILLED, Task.SIMPLE, why)


def test_a_request_for_any_model_goes_to_ollama_where_mlx_can_load_none_and_else_ends_with_the_reason():
    failed = CannotLoad("broken", "why")
    models = KnownModels(Catalogue([], ["small"], cannot_load={"broken": "why"}))
    why = "mlx cannot load its model, ollama has small"
    assert after(failed, chat(None), models=models) == Moved("llm.ollama.low", Move.SPILLED, Task.SIMPLE, why)
    outcome = after(failed, chat(None), models=KnownModels(Catalogue([], cannot_load={"broken": "why"})))
    assert isinstance(outcome, Failed)
    assert (outcome.error.code, outcome.error.message) == (ErrorCode.UNAVAILABLE, failed.message)


def test_mlx_makes_no_embeddings_on_any_worker():
    models = KnownModels(CATALOGUE, others=Catalogue(["big", "embeds"]))
    assert not is_for_another(MISSING, "mlx", EmbeddingRequest("x", model="embeds"), models)


def test_other_errors_of_mlx_stay_with_it():
    long = HeadraceError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long")
    assert after(long, chat("small")) == Failed(long)


# ---- from Ollama

# What Ollama says of a request need not be true of MLX.
_REFUSALS = (ErrorCode.UNSUPPORTED_PARAMETER, ErrorCode.INVALID_REQUEST, ErrorCode.CONTEXT_LENGTH_EXCEEDED)


@pytest.mark.parametrize("error", [AWAY, WRONG, MISSING, *(HeadraceError(code, "no") for code in _REFUSALS)])
@pytest.mark.parametrize("model", [None, "big", "twin"])
def test_what_ollama_cannot_do_goes_back_to_mlx_where_it_has_the_model(error, model):
    outcome = after(error, chat(model), engine="ollama", move=Move.SPILLED)
    why = f"back from ollama: {error.message}"
    assert outcome == Moved("llm.request.low.complex", Move.RETURNED, Task.SIMPLE, why)


def test_a_tenants_request_goes_back_to_its_tenants_lane():
    moved = back_to_mlx(envelope(owner="acme"), chat("big"), CATALOGUE, why="away")
    assert moved.to == "llm.request.low.t.acme.complex"


@pytest.mark.parametrize("request_", [chat("small"), EmbeddingRequest("x")])
def test_what_mlx_cannot_answer_stays_with_ollama(request_):
    assert back_to_mlx(envelope(), request_, CATALOGUE, why="ollama is away") is None
    assert after(AWAY, request_, engine="ollama") == Returned(0.5, error=AWAY)


@pytest.mark.parametrize("error", [WRONG, MISSING, HeadraceError(ErrorCode.ENGINE_FAILED, "begun elsewhere")])
def test_ollamas_failures_are_no_end_before_mlx_could_say_which_models_it_has(error):
    nothing_known = KnownModels(Catalogue([], ["small"]), complete=False)
    outcome = after(error, chat(), engine="ollama", models=nothing_known, delivered=2, tries=3)
    assert outcome == Returned(1.0, error=error)
    assert isinstance(after(WRONG, EmbeddingRequest("x"), engine="ollama", models=nothing_known, tries=3), Buried)
    earlier = after(error, chat(), engine="ollama", models=nothing_known, delivered=1, tries=1)
    assert earlier == Returned(0.5, uses_attempt=error is WRONG, error=error)


@pytest.mark.parametrize("request_", [chat("large"), EmbeddingRequest("x", model="vectors")])
def test_a_model_of_another_ollama_leaves_the_request_to_its_worker(request_):
    models = KnownModels(CATALOGUE, others=Catalogue((), ["large"], embedders=["vectors"]))
    assert is_for_another(MISSING, "ollama", request_, models)
    assert isinstance(after(MISSING, request_, engine="ollama"), Failed)


# ---- again, or the end


@pytest.mark.parametrize("engine", ["mlx", "ollama"])
def test_an_engine_that_is_away_uses_up_no_attempt_and_is_asked_ever_more_rarely(engine):
    delays = [
        after(AWAY, chat("small"), engine=engine, delivered=times, tries=1).delay_s for times in (1, 2, 3, 7, 8, 500)
    ]
    assert delays == [0.5, 1.0, 2.0, 32.0, 32.0, 32.0]
    assert not after(AWAY, chat("small"), engine=engine, delivered=500).uses_attempt


@pytest.mark.parametrize("engine", ["mlx", "ollama"])
def test_an_engine_that_misbehaves_uses_up_attempts_and_its_words_reach_the_reader(engine):
    outcomes = [after(WRONG, chat("small"), engine=engine, delivered=9, tries=tries) for tries in (1, 2, 3)]
    assert outcomes[:2] == [Returned(delay_s, uses_attempt=True, error=WRONG) for delay_s in (0.5, 1.0)]
    assert isinstance(outcomes[2], Buried)
    assert outcomes[2].error.message == (
        "Request r1 failed after 3 attempts and was moved to the dead letters. Ollama says: out of memory"
    )


def test_one_attempt_is_one_attempt():
    assert "after 1 attempt and" in after(WRONG, chat(), tries=1, max_attempts=1).error.message


def test_a_request_that_brings_the_engine_down_is_not_tried_again():
    guilty = HeadraceError(ErrorCode.ENGINE_FAILED, "it crashes the engine")
    assert after(guilty, chat()) == Buried(guilty)


@given(
    engine=st.sampled_from(["mlx", "ollama"]),
    error=st.one_of(st.sampled_from(ErrorCode).map(lambda code: HeadraceError(code, "no")), st.just(Misbehaved("no"))),
    request_=st.sampled_from([chat(), chat("small"), chat("nobody"), EmbeddingRequest("x")]),
    move=st.sampled_from([None, *Move]),
    complete=st.booleans(),
    tries=st.integers(1, 5),
)
def test_only_an_engine_that_is_away_or_models_not_yet_known_make_a_request_wait_for_nothing(
    engine, error, request_, move, complete, tries
):
    outcome = after(error, request_, engine=engine, move=move, models=KnownModels(CATALOGUE, complete), tries=tries)
    if isinstance(outcome, Returned) and not outcome.uses_attempt:
        assert error.code is ErrorCode.UNAVAILABLE or not complete
    if isinstance(outcome, Returned) and outcome.uses_attempt:
        assert tries < 3


def test_a_busy_engine_uses_up_attempts_only_after_it_turned_the_request_away_many_times():
    busy = TurnedAway("Ollama is busy: server busy, please try again")
    waits = after(busy, chat("small"), engine="ollama", turned_away=MOST_TURN_AWAYS)
    assert waits == Returned(32.0, error=busy)
    tried = after(busy, chat("small"), engine="ollama", turned_away=MOST_TURN_AWAYS + 1, tries=1)
    assert tried == Returned(0.5, uses_attempt=True, error=busy)
    ended = after(busy, chat("small"), engine="ollama", turned_away=MOST_TURN_AWAYS + 3, tries=3)
    assert isinstance(ended, Buried)
    assert "server busy" in ended.error.message
    away = after(AWAY, chat("small"), engine="ollama", delivered=MOST_TURN_AWAYS + 9, tries=9)
    assert away == Returned(32.0, error=AWAY), "an engine that does not answer is waited for"


def test_deliveries_that_workers_handed_back_do_not_count_as_turned_away():
    busy = TurnedAway("Ollama is busy: server busy, please try again")
    outcome = after(busy, chat("small"), engine="ollama", delivered=MOST_TURN_AWAYS + 9, turned_away=1)
    assert outcome == Returned(0.5, error=busy)
