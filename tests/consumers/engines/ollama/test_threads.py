"""`num_thread` is chosen once for each model, because a change loads the model again."""

from consumers.engines.ollama.threads import Threads
from consumers.engines.ollama.wire import LoadedModel

ON_CPU, ON_GPU = LoadedModel("m:latest", 0), LoadedModel("m:latest", 1 << 30)


def sent(threads: Threads, model: str = "m") -> int | None:
    return threads.added({"model": model}).get("options", {}).get("num_thread")


def test_without_a_number_there_is_nothing_to_choose():
    threads = Threads(0)
    assert threads.knows("m")
    assert not threads.wanted
    assert threads.added({"model": "m"}) == {"model": "m"}


def test_a_model_on_the_cpu_gets_the_number_beside_its_other_options():
    threads = Threads(3)
    assert not threads.knows("m")
    threads.choose("m", [ON_CPU])
    assert threads.knows("m")
    assert threads.added({"model": "m", "options": {"seed": 1}}) == {
        "model": "m",
        "options": {"seed": 1, "num_thread": 3},
    }


def test_a_model_on_a_gpu_gets_none():
    threads = Threads(3)
    threads.choose("m", [ON_GPU])
    assert threads.knows("m")
    assert sent(threads) is None


def test_a_model_that_is_not_loaded_goes_where_the_others_are():
    threads = Threads(3)
    threads.choose("m", [LoadedModel("other", 0)])
    assert sent(threads) == 3
    threads = Threads(3)
    threads.choose("m", [LoadedModel("other", 5)])
    assert sent(threads) is None


def test_the_number_stays_while_the_model_is_loaded_even_on_a_gpu():
    threads = Threads(3)
    threads.choose("m", [])
    threads.review([ON_GPU])
    assert sent(threads) == 3
    threads.review([])
    assert not threads.knows("m")
    threads.choose("m", [])
    assert sent(threads) is None


def test_a_model_that_the_cpu_unloads_keeps_its_number():
    threads = Threads(3)
    threads.choose("m", [])
    threads.review([])
    assert sent(threads) == 3
