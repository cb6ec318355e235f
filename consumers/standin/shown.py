"""The stand-in's models as Ollama's lists show them. Sizes, families and quantizations are those of the files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from consumers.engines.llamacpp import LlamaFacts
from consumers.standin.embedding import EMBEDDER
from pipeline.wire.ollama import NEVER, time_text

_FAMILY = "headrace"
_SIMULATED = "simulated"


class Shown(msgspec.Struct, frozen=True):
    """One model, as `/api/tags`, `/api/ps` and `/api/show` describe it.

    Attributes:
        name: with its tag.
        can: Ollama's names of its capabilities.
        family: its architecture.
        parent: the name of the model that it is made of.
        format: of its files.
        files: of its weights.
        parameters: how many it has; 0 if that is not known.
        quantization: the type of most weights.
        memory_bytes: the size of its weights in memory; 0 for the size of its files.
        template: its chat template.
        slot_tokens: the context of each request; 0 if that is not known.
        trained_tokens: the context that it was trained with.
    """

    name: str
    can: Sequence[str]
    family: str = _FAMILY
    parent: str = ""
    format: str = ""
    files: Sequence[Path] = ()
    parameters: int = 0
    quantization: str = ""
    memory_bytes: int = 0
    template: str = ""
    slot_tokens: int = 0
    trained_tokens: int = 0

    def tag(self) -> dict[str, Any]:
        """The entry of `/api/tags`. `standin` is not Ollama's: headrace's Ollama engine reads it."""
        modified = max((path.stat().st_mtime for path in self.files), default=time.time())
        return self._named() | {
            "modified_at": time_text(modified),
            "size": self._size(),
            "capabilities": list(self.can),
            "standin": True,
        }

    def running(self) -> dict[str, Any]:
        """The entry of `/api/ps`: every model is loaded for as long as the stand-in runs."""
        return self._named() | {
            "size": self.memory_bytes or self._size(),
            "size_vram": 0,
            "expires_at": NEVER,
            "context_length": self.slot_tokens,
        }

    def about(self, version: str) -> dict[str, Any]:
        """The answer of `/api/show`."""
        entry = self.tag()
        info: dict[str, Any] = {"general.architecture": self.family, "general.basename": self.name.partition(":")[0]}
        if self.parameters:
            info |= {"general.parameter_count": self.parameters, f"{self.family}.context_length": self.trained_tokens}
        return {
            "modelfile": f"# {version}\n",
            "parameters": f"num_ctx {self.slot_tokens}" if self.slot_tokens else "",
            "template": self.template,
            "model_info": info,
            **{key: entry[key] for key in ("details", "capabilities", "modified_at")},
        }

    def _named(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "model": self.name,
            "digest": self._digest(),
            "details": {
                "parent_model": self.parent,
                "format": self.format,
                "family": self.family,
                "families": [self.family],
                "parameter_size": f"{self.parameters / 1e6:.2f}M" if self.parameters else "",
                "quantization_level": self.quantization,
            },
        }

    def _size(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def _digest(self) -> str:
        """The digest of the list of its files."""
        listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.files) or self.name
        return hashlib.sha256(listing.encode()).hexdigest()


def of_demo(name: str, parent: str, folder: Path | None, *, simulated: bool) -> Shown:
    """The demo model, or the engine that simulates one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return Shown(
        tagged(name),
        ["completion", "tools"] if _calls_tools(folder) else ["completion"],
        family=_SIMULATED if simulated else _FAMILY,
        parent=parent,
        format="safetensors" if files else "",
        files=files,
    )


def of_llama(name: str, gguf: Path, facts: LlamaFacts, *, parent: str = "") -> Shown:
    """A GGUF file on llama.cpp."""
    return Shown(
        tagged(name),
        ["completion", "tools"] if facts.calls_tools else ["completion"],
        family=facts.architecture,
        parent=parent,
        format="gguf",
        files=[gguf],
        parameters=facts.parameters,
        quantization=facts.quantization,
        memory_bytes=facts.weights_bytes,
        template=facts.template,
        slot_tokens=facts.slot_tokens,
        trained_tokens=facts.trained_tokens,
    )


FEATURE_HASHING = Shown(f"{EMBEDDER}:latest", ["embedding"])


def tagged(name: str) -> str:
    """The name as Ollama lists it."""
    return name if ":" in name else f"{name}:latest"


def _calls_tools(folder: Path | None) -> bool:
    """Whether the model's chat template, a file of its own or part of the tokenizer's, has a form for tool calls."""
    places = [folder / name for name in ("chat_template.jinja", "tokenizer_config.json")] if folder else []
    return any("<tool_call>" in place.read_text() for place in places if place.is_file())
