"""Which engine may answer for which model."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.models import (
    CannotLoad,
    Catalogue,
    OfferedModel,
    by_preference,
    is_internal,
    mlx_model_for,
    ollama_model_for,
    same_model,
    spelled,
)
from pipeline.wire.errors import ErrorCode, HeadraceError

INTERNAL = ["tinyllama"]
NAMES = st.text(st.sampled_from("aZ19:/-_. é"), max_size=24)


@pytest.mark.parametrize(
    "name",
    [
        "tinyllama",
        "TinyLlama",
        "tinyllama:latest",
        "tinyllama:1.1b",
        "tinyllama:1.1b-chat-q4_0",
        "library/tinyllama",
        "registry.example/library/tinyllama:latest",
        "registry.example:5000/library/tinyllama:1.1b",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "mlx-community/TinyLlama-1.1B-Chat-v1.0-4bit",
        "hf.co/someone/TinyLlama-1.1B-Chat-v1.0-GGUF:Q4_K_M",
        "TinyLlama_v1.1",
        "tinyllama@sha256:0123abcd",
        "tinyllama.gguf",
        "tiny-llama",
        "Tiny_Llama:1.1b",
        "my-tinyllama-finetune",
        "/models/tinyllama/snapshot",
    ],
)
def test_listed_family_is_internal_however_it_is_written(name):
    assert is_internal(name, INTERNAL)


@pytest.mark.parametrize(
    "name",
    [
        "tinyllama2-foo",
        "tinyllama2",
        "xtinyllama",
        "tinydolphin",
        "llama3.2:1b",
        "tiny",
        "llama",
        "",
        ":",
        "/",
    ],
)
def test_other_families_are_not_internal(name):
    assert not is_internal(name, INTERNAL)


def test_version_after_a_point_is_another_family():
    assert is_internal("llama3:8b", ["llama3"])
    assert not is_internal("llama3.2:8b", ["llama3"])
    assert is_internal("Llama3.2-1B", ["llama3.2"])


@pytest.mark.parametrize(
    "name",
    [
        "tinyllama",
        "tinyllama:latest",
        "tinyllama:1.1b",
        "tinyllama:1.1b-chat-q4_0",
        "a/TinyLlama-1.1B-Chat-v1.0",
    ],
)
def test_listed_tag_takes_itself_its_finer_ones_and_the_bare_name(name):
    assert is_internal(name, ["tinyllama:1.1b"])


@pytest.mark.parametrize("name", ["tinyllama:3b", "mlx-community/TinyLlama-3B", "mistral:1.1b"])
def test_listed_tag_leaves_other_tags_alone(name):
    assert not is_internal(name, ["tinyllama:1.1b"])


@pytest.mark.parametrize("listed", ["tinyllama:latest", "library/tinyllama", "TINYLLAMA"])
def test_listed_name_may_be_spelled_in_full(listed):
    assert is_internal("tinyllama:1.1b", [listed])


@pytest.mark.parametrize("listed", ["", " ", ":", "/", "--"])
@given(name=NAMES)
def test_blank_listed_name_takes_nothing(listed, name):
    assert not is_internal(name, [listed])


@given(NAMES, st.sampled_from(["tinyllama", "TinyLLaMA"]), NAMES)
def test_family_set_off_by_separators_is_internal_wherever_it_stands(before, family, after):
    assert is_internal(f"{before}/{family}-{after}", INTERNAL)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("x", "x:latest"),
        ("library/x", "x"),
        ("registry.ollama.ai/library/x:latest", "X"),
        ("me/x", "me/x:latest"),
        ("x:", "x"),
        ("host:5000/x", "host:5000/x:latest"),
    ],
)
def test_names_of_one_ollama_model(a, b):
    assert same_model(a, b)
    assert same_model(b, a)


@pytest.mark.parametrize(("a", "b"), [("x", "x:1b"), ("me/x", "x"), ("x", "y"), ("x:1b", "x:1b-q4")])
def test_names_of_different_ollama_models(a, b):
    assert not same_model(a, b)


def test_named_model_is_answered_by_itself_or_its_equivalent_only():
    table = {"org/Big-4bit": "big:8b"}
    there = ["other:latest", "big:8b", "tinyllama:latest"]
    assert ollama_model_for("org/Big-4bit", table, there, INTERNAL) == "big:8b"
    assert ollama_model_for("ORG/big-4bit", table, there, INTERNAL) == "big:8b"
    assert ollama_model_for("other", table, there, INTERNAL) == "other:latest"
    assert ollama_model_for("org/Unknown", table, there, INTERNAL) is None
    assert ollama_model_for("org/Big-4bit", table, ["other:latest"], INTERNAL) is None
    assert ollama_model_for("org/Big-4bit", {}, there, INTERNAL) is None


def test_unnamed_model_is_the_first_of_the_list_that_is_not_internal():
    table = {"m1": "gone", "m2": "zeta"}
    assert ollama_model_for(None, table, ["tinyllama:latest", "beta:1", "alpha:latest"], INTERNAL) == "beta:1"
    assert ollama_model_for(None, table, [], []) is None


GB = 10**9
SMALL, MIDDLE, BIG = (
    OfferedModel("small:1b", 1e9, GB),
    OfferedModel("middle:8b", 8e9, 5 * GB),
    OfferedModel("big:70b", 70e9, 40 * GB),
)


@pytest.mark.parametrize("offered", list(permutations([SMALL, MIDDLE, BIG])))
@pytest.mark.parametrize(
    ("order", "memory", "names"),
    [
        ([], None, ["big:70b", "middle:8b", "small:1b"]),
        ([], 80 * GB, ["big:70b", "middle:8b", "small:1b"]),
        ([], 16 * GB, ["middle:8b", "small:1b", "big:70b"]),
        ([], 4 * GB, ["small:1b", "middle:8b", "big:70b"]),
        ([], GB, ["small:1b", "middle:8b", "big:70b"]),
        (["SMALL:1b", "gone", "big:70b", "small:1b"], 16 * GB, ["small:1b", "big:70b", "middle:8b"]),
    ],
)
def test_the_configured_order_comes_first_and_then_the_most_parameters_that_fit(offered, order, memory, names):
    assert by_preference(offered, order, memory) == names


def test_models_of_unknown_size_stand_by_name():
    assert by_preference([OfferedModel("b:1"), OfferedModel("a:2"), OfferedModel("a:1")], [], 1) == [
        "a:1",
        "a:2",
        "b:1",
    ]


@pytest.mark.parametrize("requested", [None, "tinyllama", "TinyLlama:1.1b", "m"])
def test_internal_model_is_never_chosen_even_where_the_table_says_so(requested):
    table = {"m": "tinyllama:1.1b"}
    assert ollama_model_for(requested, table, ["tinyllama:1.1b", "tinyllama:latest"], INTERNAL) is None
    assert mlx_model_for("tinyllama", {"m": "tinyllama"}, ["m"], INTERNAL) is None


def test_mlx_answers_for_its_names_and_for_their_ollama_equivalents():
    table = {"org/Big-4bit": "big:8b", "org/Absent": "absent"}
    served = ["org/Small", "org/Big-4bit"]
    assert mlx_model_for(None, table, served, []) == "org/Small"
    assert mlx_model_for("org/big-4BIT", table, served, []) == "org/Big-4bit"
    assert mlx_model_for("big:8b", table, served, []) == "org/Big-4bit"
    assert mlx_model_for("big", table, served, []) is None
    assert mlx_model_for("absent", table, served, []) is None
    assert mlx_model_for("Small", table, served, []) is None


def catalogue(**changes):
    facts = {
        "mlx": ["org/Big-4bit"],
        "ollama": ["small:1b", "big:8b", "tinyllama:latest"],
        "table": {"org/Big-4bit": "big:8b"},
        "internal": INTERNAL,
    }
    return Catalogue(**(facts | changes))


@pytest.mark.parametrize(
    ("requested", "engines"),
    [
        (None, {"mlx", "ollama"}),
        ("org/Big-4bit", {"mlx", "ollama"}),
        ("big:8b", {"mlx", "ollama"}),
        ("small:1b", {"ollama"}),
    ],
)
def test_engines_that_may_answer(requested, engines):
    assert catalogue().engines_for(requested) == engines


def test_without_an_equivalent_only_mlx_may_answer_for_its_model():
    assert catalogue(table={}).engines_for("org/Big-4bit") == {"mlx"}


@pytest.mark.parametrize(
    ("requested", "code"),
    [
        ("tinyllama", ErrorCode.MODEL_INTERNAL),
        ("a/TinyLlama-9x", ErrorCode.MODEL_INTERNAL),
        ("gpt-9", ErrorCode.MODEL_NOT_FOUND),
        ("small", ErrorCode.MODEL_NOT_FOUND),
    ],
)
def test_a_model_nobody_may_answer_with_is_refused_by_code(requested, code):
    with pytest.raises(HeadraceError) as refusal:
        catalogue().engines_for(requested)
    assert refusal.value.code is code
    assert refusal.value.param == "model"


def test_a_refusal_names_the_models_there_are_and_no_internal_one():
    with pytest.raises(HeadraceError, match=r"org/Big-4bit, big:8b, small:1b\.$"):
        catalogue().engines_for("gpt-9")


def test_an_engine_with_internal_models_alone_answers_nobody():
    with pytest.raises(HeadraceError) as refusal:
        catalogue(mlx=["org/TinyLlama"], ollama=["tinyllama"]).engines_for(None)
    assert refusal.value.code is ErrorCode.MODEL_NOT_FOUND


@pytest.mark.parametrize("requested", ["smollm2", "smollm2:latest", "library/smollm2", "SmolLM2:Latest"])
def test_a_model_of_mlx_answers_to_every_spelling_by_which_the_lists_show_it(requested):
    names = catalogue(mlx=["smollm2"], ollama=["qwen3:4b"], table={"smollm2": "smollm2:135m"})
    assert spelled(requested, names.listed()) == "smollm2"
    assert names.engines_for(requested) == {"mlx"}
    assert names.model_on("mlx", requested) == "smollm2"
    assert ollama_model_for(requested, names.table, ["smollm2:135m"], INTERNAL) == "smollm2:135m"
    with pytest.raises(HeadraceError, match='Model "smollm2:360m" is not available'):
        names.engines_for("smollm2:360m")


def test_lists_show_each_model_once_and_no_internal_one():
    assert catalogue(mlx=["b", "a"], ollama=["z", "a", "tinyllama"]).listed() == ["b", "a", "z"]


def test_a_model_that_both_engines_have_is_listed_once_under_mlx_name_and_either_may_answer():
    names = catalogue(mlx=["smollm2"], ollama=["smollm2:latest", "qwen3:4b"], table={})
    assert names.listed() == ["smollm2", "qwen3:4b"]
    assert names.engines_for("smollm2") == {"mlx", "ollama"}
    assert names.model_on("ollama", "smollm2") == "smollm2:latest"


def test_a_request_that_names_no_embedder_gets_the_first_by_name_and_no_chatting_model():
    assert catalogue(embedders=["nomic-embed-text", "all-minilm"]).embedder(None) == "all-minilm"
    with pytest.raises(HeadraceError, match="No engine has a model that makes embeddings"):
        catalogue().embedder(None)


def test_a_model_that_chats_embeds_where_it_is_named_as_at_ollama():
    assert catalogue(embedders=["all-minilm:latest"]).embedder("small:1b") == "small:1b"
    assert catalogue(embedders=["all-minilm:latest"]).embedder("ALL-minilm") == "all-minilm:latest"


@pytest.mark.parametrize(
    ("requested", "code"),
    [
        ("tinyllama", ErrorCode.MODEL_INTERNAL),
        ("text-embedding-3-small", ErrorCode.MODEL_NOT_FOUND),
        # MLX makes none, and an equivalent's vectors would be of another space.
        ("org/Big-4bit", ErrorCode.MODEL_NOT_FOUND),
    ],
)
def test_no_other_model_embeds_in_the_place_of_the_one_that_is_named(requested, code):
    with pytest.raises(HeadraceError) as refusal:
        catalogue(embedders=["all-minilm"]).embedder(requested)
    assert (refusal.value.code, refusal.value.param) == (code, "model")


def test_a_refusal_names_those_that_do_what_is_asked():
    names = catalogue(embedders=["all-minilm:latest", "tinyllama:embed"])
    with pytest.raises(
        HeadraceError, match=r'"org/Big-4bit" is not available for embeddings. Available models: all-minilm:latest\.$'
    ):
        names.embedder("org/Big-4bit")
    with pytest.raises(
        HeadraceError, match=r'Model "gpt-9" is not available. Available models: org/Big-4bit, big:8b, small:1b\.$'
    ):
        names.engines_for("gpt-9")


def test_an_embedder_is_listed_and_does_not_chat():
    names = catalogue(embedders=["all-minilm:latest", "tinyllama:embed"])
    assert names.listed() == ["org/Big-4bit", "all-minilm:latest", "big:8b", "small:1b"]
    with pytest.raises(HeadraceError, match="does not chat") as refusal:
        names.engines_for("all-minilm")
    assert refusal.value.code is ErrorCode.UNSUPPORTED_PARAMETER
    assert names.engines_for(None) == {"mlx", "ollama"}


@given(st.lists(NAMES), st.lists(NAMES), st.none() | NAMES)
def test_no_internal_model_embeds(embedders, chatting, requested):
    names = catalogue(embedders=[*embedders, "tinyllama"], ollama=[*chatting, "x/tinyllama"])
    chosen = names.embedder_on_ollama(requested)
    assert chosen is None or not is_internal(chosen, INTERNAL)


@given(st.lists(NAMES), st.lists(NAMES), st.none() | NAMES)
def test_no_engine_is_given_an_internal_model(mlx, ollama, requested):
    names = catalogue(mlx=[*mlx, "x/tinyllama"], ollama=[*ollama, "tinyllama:1b"], table={"a": "tinyllama:1b"})
    chosen = [names.model_on(engine, requested) for engine in ("mlx", "ollama")]
    assert not any(is_internal(name, INTERNAL) for name in chosen if name is not None)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("demo", "demo"),
        ("demo:latest", "demo"),
        ("Demo", "demo"),
        ("library/demo", "demo"),
        ("mini", "mini:latest"),
        ("big:1b", "big:1b"),
        ("big", "big"),
        ("big:8b", "big:8b"),
        ("org/Demo-4bit", "org/Demo-4bit"),
        ("other:latest", "other:latest"),
    ],
)
def test_a_requested_name_is_spelled_as_it_is_listed_and_a_tag_or_size_is_never_dropped(requested, expected):
    assert spelled(requested, ("demo", "mini:latest", "big:1b", "org/Demo-4bit")) == expected


def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason_and_not_listed():
    failed = {"org/Big-4bit": "its file is incomplete."}
    names = catalogue(mlx=["other"], ollama=[], cannot_load=failed)
    for requested in ("org/Big-4bit", "org/big-4BIT", "big:8b"):
        with pytest.raises(CannotLoad) as refusal:
            names.engines_for(requested)
        assert refusal.value.message == 'Model "org/Big-4bit" cannot be loaded: its file is incomplete.'
        assert (refusal.value.code, refusal.value.param) == (ErrorCode.UNAVAILABLE, "model")
    with pytest.raises(HeadraceError) as missing:
        names.engines_for("gpt-9")
    assert missing.value.code is ErrorCode.MODEL_NOT_FOUND
    assert names.engines_for(None) == {"mlx"}
    may_be_tried = catalogue(mlx=["other", "org/Big-4bit"], ollama=[], cannot_load=failed)
    assert may_be_tried.engines_for("org/Big-4bit") == {"mlx"}
    assert may_be_tried.listed() == ["other"]


def test_a_request_for_any_model_is_refused_with_the_reason_where_mlx_can_load_none():
    failed = {"tinyllama": "it is internal.", "big": "its file is incomplete."}
    with pytest.raises(CannotLoad, match='Model "big" cannot be loaded: its file is incomplete'):
        catalogue(mlx=[], ollama=[], cannot_load=failed).engines_for(None)
    assert catalogue(mlx=[], ollama=["mini"], cannot_load=failed).engines_for(None) == {"ollama"}
    assert catalogue(mlx=["other"], cannot_load=failed).refusal(None) is None
    with pytest.raises(HeadraceError, match="No engine has a model that chats"):
        catalogue(mlx=[], ollama=[], cannot_load={"tinyllama": "it is internal."}).engines_for(None)


def test_a_model_that_mlx_cannot_load_is_answered_by_its_equivalent():
    names = catalogue(mlx=[], cannot_load={"org/Big-4bit": "why"})
    assert names.engines_for("org/Big-4bit") == {"ollama"}
