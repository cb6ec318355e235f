"""The known models: which of them answer users, and which engine can answer a request that names one.

Names come in two dialects. Ollama's are `[registry/][namespace/]name[:tag]`, where a missing tag is `latest` and the
registry and `library/` are optional. MLX's are repositories (`owner/Name-1.1B-4bit`) or paths, and can be spelled as if
they were Ollama's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import EngineName


class CannotLoad(HeadraceError):
    """The model is known and cannot be loaded now. It is tried again after a pause.

    Args:
        name: of the model.
        why: one line.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, f"Model {quoted(name)} cannot be loaded: {why}", param="model")


_DEFAULT_TAG = "latest"
_DEFAULT_PREFIXES = ("registry.ollama.ai/", "library/")
# A point between digits is part of a version or a size: `llama3.2` and `llama3` are different families.
_WORDS = re.compile(r"(?:[^\W_]|(?<=\d)\.(?=\d))+")


def is_internal(name: str, internal: Sequence[str]) -> bool:
    """Whether name is an internal model, which only the pipeline itself uses.

    A listed name without a tag (or with `latest`) covers the whole family: every name that contains it as a word, or as
    neighbouring words (`tiny-llama`), with any registry, owner, size, quantization or tag around it. That includes
    `my-tinyllama-finetune`, whose weights can be the listed ones, but not `tinyllama2`, which is another word. A listed
    name with a tag covers that tag, its finer ones (`1.1b` covers `1.1b-chat`), and the bare name, which can mean any
    tag.
    """
    return any(_is_of(name, listed) for listed in internal)


def _is_of(name: str, listed: str) -> bool:
    family, tag = _split_tag(listed.rpartition("/")[2])
    wanted = "".join(_words(family))
    words = _words(name)
    ends = _ends_of_run(words, wanted)
    if not ends or tag == _DEFAULT_TAG:
        return bool(ends)
    size = "".join(_words(tag))
    bare = name.casefold().endswith(f":{_DEFAULT_TAG}") or any(end == len(words) for end in ends)
    return bare or any(_ends_of_run(words[end:], size) for end in ends)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def _ends_of_run(words: Sequence[str], wanted: str) -> list[int]:
    """The ends of the runs of neighbouring words that, joined, are the wanted word."""
    if not wanted:
        return []
    ends = []
    for start in range(len(words)):
        joined = ""
        for end in range(start, len(words)):
            joined += words[end]
            if joined == wanted:
                ends.append(end + 1)
            if not wanted.startswith(joined):
                break
    return ends


def _split_tag(name: str) -> tuple[str, str]:
    """The path and the tag of an Ollama name. A colon before the last slash is a registry's port."""
    path, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        return name, _DEFAULT_TAG
    return path, tag or _DEFAULT_TAG


def _canonical(name: str) -> str:
    path, tag = _split_tag(name.strip().casefold())
    for prefix in _DEFAULT_PREFIXES:
        path = path.removeprefix(prefix)
    return f"{path}:{tag}"


def same_model(a: str, b: str) -> bool:
    """Whether two Ollama names are the same model: `x`, `x:latest` and `library/x` are, in any letter case."""
    return _canonical(a) == _canonical(b)


def spelled(requested: str, listed: Sequence[str]) -> str:
    """The listed spelling of a requested name: Ollama's clients add `:latest`, and some write another letter case."""
    if requested in listed:
        return requested
    return next((name for name in listed if same_model(name, requested)), requested)


def ollama_model_for(
    requested: str | None, table: Mapping[str, str], available: Iterable[str], internal: Sequence[str]
) -> str | None:
    """The model by which Ollama can answer a request, as Ollama spells it, or None if it cannot.

    Args:
        requested: the model that the request names, or None for any.
        table: configured equivalents, MLX's name to Ollama's.
        available: Ollama's models that chat, the preferred one first.
        internal: models that answer no request.

    A request that names a model gets it or its equivalent. A request that names none gets the first available model:
    the Ollama engine lists them by `by_preference`.
    """
    if requested is not None and is_internal(requested, internal):
        return None
    there = {_canonical(name): name for name in available if not is_internal(name, internal)}
    if requested is None:
        wanted = list(there)
    else:
        equivalents = [theirs for ours, theirs in table.items() if _same_mlx(ours, requested)]
        wanted = [_canonical(name) for name in (requested, *equivalents)]
    return next((there[name] for name in wanted if name in there), None)


class OfferedModel(NamedTuple):
    """A chat model at Ollama. `parameters`: how many it has; `size`: of its files, in bytes; 0 if that is not known."""

    name: str
    parameters: float = 0.0
    size: int = 0


def by_preference(offered: Iterable[OfferedModel], order: Sequence[str], memory: int | None) -> list[str]:
    """The names of Ollama's chat models, the one that should answer a request without a model first.

    Models of a configured order come first. Then those whose files take no more than half of the memory, which MLX's
    model shares, the most parameters first. The others come last, the smallest first. Equal ones stand by name, so
    that Ollama's order does not matter.

    Args:
        offered: the models.
        order: names, the preferred one first.
        memory: of the machine that Ollama runs on, in bytes; None if it is not known: every model fits.
    """
    places = {_canonical(name): place for place, name in reversed(list(enumerate(order)))}

    def key(model: OfferedModel) -> tuple[int, float, str]:
        place = places.get(_canonical(model.name))
        if place is not None:
            return (0, place, model.name)
        if memory is None or 2 * model.size <= memory:
            return (1, -model.parameters, model.name)
        return (2, model.size, model.name)

    return [model.name for model in sorted(offered, key=key)]


def embedder_for(
    requested: str | None, embedders: Iterable[str], chatting: Iterable[str], internal: Sequence[str]
) -> str | None:
    """The model by which Ollama makes a request's embeddings, as Ollama spells it, or None if it cannot.

    Args:
        requested: the model that the request names, or None for the first embedding model by name.
        embedders: Ollama's models that only make embeddings.
        chatting: Ollama's models that chat. One of them makes embeddings if a request names it.
        internal: models that answer no request.

    Embedding models have no equivalents: the vectors of two models cannot be compared.
    """
    available = sorted(embedders) if requested is None else [*embedders, *chatting]
    return ollama_model_for(requested, {}, available, internal)


def mlx_model_for(
    requested: str | None, table: Mapping[str, str], served: Sequence[str], internal: Sequence[str]
) -> str | None:
    """The model by which MLX can answer a request, or None: the counterpart of `ollama_model_for`.

    Args:
        requested: the model that the request names, or None for the first served.
        table: configured equivalents, MLX's name to Ollama's.
        served: the models that MLX serves.
        internal: models that answer no request.
    """
    if requested is not None and is_internal(requested, internal):
        return None
    there = [name for name in served if not is_internal(name, internal)]
    if requested is None:
        return next(iter(there), None)
    named = (name for name in there if _same_mlx(name, requested))
    equivalent = (
        name
        for ours, theirs in table.items()
        if same_model(theirs, requested)
        for name in there
        if _same_mlx(name, ours)
    )
    return next(named, None) or next(equivalent, None)


def _same_mlx(a: str, b: str) -> bool:
    """Whether a name stands for a model of MLX. Lists show it beside Ollama's, and clients write Ollama's spellings."""
    return a.casefold() == b.casefold() or same_model(a, b)


@dataclass(frozen=True)
class Catalogue:
    """The models of both engines, as they are known now.

    Args:
        mlx: the models that MLX serves, or will serve once they are loaded.
        ollama: Ollama's models that chat; empty if it does not answer.
        table: configured equivalents, MLX's name to Ollama's.
        internal: models that answer no request.
        embedders: Ollama's models that only make embeddings.
        cannot_load: models of MLX whose last load failed in each worker that has them, and why. Those that are in
            `mlx` may be tried again.
    """

    mlx: Sequence[str]
    ollama: Sequence[str] = ()
    table: Mapping[str, str] = field(default_factory=dict)
    internal: Sequence[str] = ()
    embedders: Sequence[str] = ()
    cannot_load: Mapping[str, str] = field(default_factory=dict)

    def model_on(self, engine: EngineName, requested: str | None) -> str | None:
        """The model by which an engine can answer the request, or None."""
        if engine == "mlx":
            return mlx_model_for(requested, self.table, self.mlx, self.internal)
        return ollama_model_for(requested, self.table, self.ollama, self.internal)

    def engines_for(self, requested: str | None) -> frozenset[EngineName]:
        """The engines that can answer the request; at least one.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`; `unsupported_parameter` for a model that only makes
                embeddings.
            CannotLoad: the only engine that has the model cannot load it.
        """
        self._check_internal(requested)
        engines: tuple[EngineName, ...] = ("mlx", "ollama")
        able = frozenset(engine for engine in engines if self.model_on(engine, requested) is not None)
        if not able:
            if requested is not None and self.only_embeds(requested):
                raise HeadraceError(
                    ErrorCode.UNSUPPORTED_PARAMETER,
                    f"Model {quoted(requested)} only makes embeddings and does not chat. Choose another model.",
                    param="model",
                )
            raise self.refusal(requested) or self._missing(requested, embeds=False)
        return able

    def refusal(self, requested: str | None) -> CannotLoad | None:
        """Why MLX could not load the model when it last tried; None if it could, or does not have it.

        A request for any model is refused only where MLX has no other one.
        """
        if requested is None:
            failed = (name for name in self.cannot_load if not is_internal(name, self.internal))
            name = None if self.mlx else next(failed, None)
            return None if name is None else CannotLoad(name, self.cannot_load[name])
        name = mlx_model_for(requested, self.table, list(self.cannot_load), self.internal)
        return None if name is None else CannotLoad(name, self.cannot_load[name])

    def embedder(self, requested: str | None) -> str:
        """The model that makes the request's embeddings, as Ollama spells it.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`.
        """
        self._check_internal(requested)
        found = self.embedder_on_ollama(requested)
        if found is None:
            raise self._missing(requested, embeds=True)
        return found

    def only_embeds(self, name: str) -> bool:
        """Whether name is an available model that makes embeddings and does not chat."""
        return embedder_for(name, self.embedders, (), self.internal) is not None

    def embedder_on_ollama(self, requested: str | None) -> str | None:
        """The model by which Ollama can make the request's embeddings, or None."""
        return embedder_for(requested, self.embedders, self.ollama, self.internal)

    def _check_internal(self, requested: str | None) -> None:
        if requested is not None and is_internal(requested, self.internal):
            raise HeadraceError(
                ErrorCode.MODEL_INTERNAL,
                f"Model {quoted(requested)} is internal and cannot be requested. Choose another model.",
                param="model",
            )

    def _missing(self, requested: str | None, *, embeds: bool) -> HeadraceError:
        if requested is None:
            message = f"No engine has a model that {'makes embeddings' if embeds else 'chats'}."
        else:
            known = ", ".join(name for name in self.listed() if (name in self.embedders) is embeds) or "none"
            served = self.model_on("mlx", requested) is not None
            purpose = " for embeddings" if served else ""
            message = f"Model {quoted(requested)} is not available{purpose}. Available models: {known}."
        return HeadraceError(ErrorCode.MODEL_NOT_FOUND, message, param="model")

    def listed(self) -> list[str]:
        """The names that clients see: MLX's, then Ollama's by name, each once, without internal ones. A model that both
        engines have stands there under MLX's name: `smollm2`, not `smollm2:latest`. One whose last load failed is not
        listed.
        """
        names: dict[str, str] = {}
        mlx = (name for name in self.mlx if name not in self.cannot_load)
        for name in (*mlx, *sorted((*self.ollama, *self.embedders))):
            names.setdefault(_canonical(name), name)
        return [name for name in names.values() if not is_internal(name, self.internal)]
