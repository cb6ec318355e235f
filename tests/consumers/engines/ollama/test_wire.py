"""The client's side of Ollama's API: what is no answer of Ollama's is told in a sentence."""

from __future__ import annotations

import pytest

from consumers.engines.ollama.wire import LineReader, read_embedded, read_models
from consumers.engines.server.errors import BadAnswer


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"message": 5}, "`message` must be an object, not 5."),
        ({"message": {"content": 5}}, "`message.content` must be a string, not 5."),
        ({"done": "yes"}, '`done` must be true or false, not "yes".'),
    ],
)
def test_a_part_of_another_shape_is_told_by_its_field(part: dict[str, object], sentence: str):
    with pytest.raises(BadAnswer) as caught:
        LineReader("r1").read(part)
    assert str(caught.value) == f"Ollama sent a malformed answer. {sentence}"


def test_embeddings_and_lists_of_another_shape_are_told_too():
    with pytest.raises(BadAnswer, match="2 embeddings for 3 texts"):
        read_embedded({"embeddings": [[1.0], [2.0]]}, 3)
    with pytest.raises(BadAnswer, match="`embeddings` is required"):
        read_embedded({}, 1)
    with pytest.raises(BadAnswer, match="`models` must be a list"):
        read_models({"models": "none"})
