"""What a request asks for and MLX does not do is noted."""

from consumers.engines.local.child.checks import notes_of
from pipeline.wire.particular import OllamaParticulars
from pipeline.wire.requests import ChatRequest


def test_parameters_of_other_servers_are_noted_where_they_would_change_the_answer():
    request = ChatRequest(
        prompt="x",
        ignore_eos=True,
        min_tokens=0,
        thinking_budget=0,
        ollama=OllamaParticulars({"num_ctx": 5, "mirostat": 2}),
    )
    assert notes_of(request) == [
        f"`{name}` has no effect on this model." for name in ("options.mirostat", "ignore_eos", "thinking_budget")
    ]
