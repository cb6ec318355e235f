"""Which models there are, which of them answer users, and which engine may answer a request that names one.

Names come in two dialects. Ollama's are `[registry/][namespace/]name[:tag]`, where a missing tag is `latest` and the
registry and `library/` may be left out. MLX's are repositories (`owner/Name-1.1B-4bit`) or paths, and stand for
themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName

_DEFAULT_TAG = "latest"
_DEFAULT_PREFIXES = ("registry.ollama.ai/", "library/")
# A point between digits belongs to a version or a size: `llama3.2` is another family than `llama3`.
_WORDS = re.compile(r"(?:[^\W_]|(?<=\d)\.(?=\d))+")
_SHOWN_CHARS = 80


def is_internal(name: str, internal: Sequence[str]) -> bool:
    """Whether name is a model that the pipeline keeps for its own work.

    A listed name without a tag (or with `latest`) takes the whole family: every name in which it stands as a word of
    its own, or as neighbouring words written apart (`tiny-llama`), whatever registry, owner, size, quantization or tag
    surrounds it. That takes `my-tinyllama-finetune` too, since the weights behind such a name may be the listed ones,
    but not `tinyllama2`, which is another word. A listed name with a tag takes that tag, its finer ones (`1.1b` takes
    `1.1b-chat`), and the bare name, which may stand for any tag.
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
    """Where neighbouring words end that, joined, are the wanted one."""
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
    """An Ollama name's path and tag; a colon before the last slash is a registry's port."""
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
    """Whether two Ollama names are one model: `x` is `x:latest` is `library/x`, in any letter case."""
    return _canonical(a) == _canonical(b)


def spelled(requested: str, listed: Sequence[str]) -> str:
    """The listed spelling of a requested name: Ollama's clients add `:latest`, and some write another letter case."""
    if requested in listed:
        return requested
    return next((name for name in listed if same_model(name, requested)), requested)


def ollama_model_for(
    requested: str | None, table: Mapping[str, str], available: Iterable[str], internal: Sequence[str]
) -> str | None:
    """The model by which Ollama may answer a request, as Ollama spells it, or None where it must not answer.

    Args:
        requested: the model that the request names, or None where any may answer.
        table: configured equivalents, MLX's name to Ollama's.
        available: the models that Ollama has and that can chat.
        internal: models that answer nobody.

    A request that names a model gets it or its equivalent. One that names none gets the first equivalent of the table
    that is there, else the first available model by name: a choice that Ollama's order does not change.
    """
    if requested is not None and is_internal(requested, internal):
        return None
    there = {_canonical(name): name for name in sorted(available) if not is_internal(name, internal)}
    if requested is None:
        wanted = [_canonical(name) for name in table.values()] + sorted(there)
    else:
        equivalents = [theirs for ours, theirs in table.items() if _same_mlx(ours, requested)]
        wanted = [_canonical(name) for name in (requested, *equivalents)]
    return next((there[name] for name in wanted if name in there), None)


def embedder_for(
    requested: str | None, embedders: Iterable[str], chatting: Iterable[str], internal: Sequence[str]
) -> str | None:
    """The model by which Ollama embeds for a request, as Ollama spells it, or None where none may.

    Args:
        requested: the model that the request names, or None: then the first embedder by name.
        embedders: the models that Ollama has for nothing else.
        chatting: those that chat; one of them embeds where it is asked for by name.
        internal: models that work for nobody.

    There are no equivalents: vectors of two models cannot be compared.
    """
    available = embedders if requested is None else [*embedders, *chatting]
    return ollama_model_for(requested, {}, available, internal)


def mlx_model_for(
    requested: str | None, table: Mapping[str, str], served: Sequence[str], internal: Sequence[str]
) -> str | None:
    """The model by which MLX may answer a request, or None: the counterpart of `ollama_model_for`.

    Args:
        requested: the model that the request names, or None where any may answer: then the first served.
        table: configured equivalents, MLX's name to Ollama's.
        served: the models that MLX answers to.
        internal: models that answer nobody.
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
    return a.casefold() == b.casefold()


@dataclass(frozen=True)
class Catalogue:
    """The models known now, on both engines.

    Args:
        mlx: what MLX serves, or will once it is loaded.
        ollama: what Ollama has and can chat with; empty where it does not answer.
        table: configured equivalents, MLX's name to Ollama's.
        internal: models that answer nobody.
        embedders: what Ollama has for embeddings alone.
    """

    mlx: Sequence[str]
    ollama: Sequence[str] = ()
    table: Mapping[str, str] = field(default_factory=dict)
    internal: Sequence[str] = ()
    embedders: Sequence[str] = ()

    def model_on(self, engine: EngineName, requested: str | None) -> str | None:
        """The model by which engine may answer the request, or None."""
        if engine == "mlx":
            return mlx_model_for(requested, self.table, self.mlx, self.internal)
        return ollama_model_for(requested, self.table, self.ollama, self.internal)

    def engines_for(self, requested: str | None) -> frozenset[EngineName]:
        """The engines that may answer the request; at least one.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`; `unsupported_parameter` for a model that only embeds.
        """
        self._check_internal(requested)
        engines: tuple[EngineName, ...] = ("mlx", "ollama")
        able = frozenset(engine for engine in engines if self.model_on(engine, requested) is not None)
        if not able:
            if requested is not None and self.only_embeds(requested):
                raise HeadraceError(
                    ErrorCode.UNSUPPORTED_PARAMETER,
                    f"the model {requested[:_SHOWN_CHARS]!r} makes embeddings and does not chat",
                    param="model",
                )
            raise self._missing(requested, embeds=False)
        return able

    def embedder(self, requested: str | None) -> str:
        """The model that embeds for the request, as Ollama spells it.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`.
        """
        self._check_internal(requested)
        found = self.embedder_on_ollama(requested)
        if found is None:
            raise self._missing(requested, embeds=True)
        return found

    def only_embeds(self, name: str) -> bool:
        """Whether a model is there that makes embeddings and does not chat."""
        return embedder_for(name, self.embedders, (), self.internal) is not None

    def embedder_on_ollama(self, requested: str | None) -> str | None:
        """The model by which Ollama may embed for the request, or None."""
        return embedder_for(requested, self.embedders, self.ollama, self.internal)

    def _check_internal(self, requested: str | None) -> None:
        if requested is not None and is_internal(requested, self.internal):
            raise HeadraceError(
                ErrorCode.MODEL_INTERNAL,
                f"the model {requested[:_SHOWN_CHARS]!r} is kept for the pipeline's own work: name another",
                param="model",
            )

    def _missing(self, requested: str | None, *, embeds: bool) -> HeadraceError:
        if requested is None:
            message = f"no engine has a model that {'makes embeddings' if embeds else 'may answer'}"
        else:
            known = ", ".join(name for name in self.listed() if (name in self.embedders) is embeds) or "none"
            served = self.model_on("mlx", requested) is not None
            message = f"no engine has the model {requested[:_SHOWN_CHARS]!r}{' for embeddings' if served else ''}"
            message += f"; there are: {known}"
        return HeadraceError(ErrorCode.MODEL_NOT_FOUND, message, param="model")

    def listed(self) -> list[str]:
        """The names shown to clients: MLX's, then Ollama's by name, each once, internal ones left out."""
        names = dict.fromkeys((*self.mlx, *sorted((*self.ollama, *self.embedders))))
        return [name for name in names if not is_internal(name, self.internal)]
