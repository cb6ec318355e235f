"""llama.cpp's own server, as the library `xllamacpp` has it. Only this module imports the library.

The server runs in threads of this process and listens on a loopback port, which a key protects: other users of the
machine and web pages cannot use it. A crash of the native code ends the whole process, whose parent must restart it.
"""

from __future__ import annotations

import os
import secrets
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx

# A slot's share of the context is at least this many tokens; several slots get more memory, not less context.
SLOT_CONTEXT_TOKENS = 2048
# The context of all slots together, if it gives each slot more.
CONTEXT_TOKENS = 8192
# Prompt tokens in one step. While it runs, every other answer stands still and no cancel is noticed.
_STEP_TOKENS = 128
_LOOK_TIMEOUT_S = 10.0
_STRING = 8
_MAX_NAME_BYTES = 64


class LlamaError(Exception):
    """The library or the model's file cannot be used. The message is a sentence."""


class LlamaFacts(NamedTuple):
    """What is known of a loaded model.

    Attributes:
        architecture: as the file names it, for example `llama`; empty if the file does not begin with it.
        quantization: the type of most weights, for example `Q4_1`.
        parameters: how many it has.
        weights_bytes: their size in memory.
        trained_tokens: the context that it was trained with.
        slot_tokens: the context of each slot.
        template: its chat template.
        calls_tools: whether its chat template has a form for tools.
    """

    architecture: str
    quantization: str
    parameters: int
    weights_bytes: int
    trained_tokens: int
    slot_tokens: int
    template: str
    calls_tools: bool


class LlamaServer:
    """A running server. The constructor loads the model and blocks until it is ready.

    Args:
        gguf: the model's file.
        slots: how many requests run at once.
        threads: how many threads compute; 0 for half of the cores, at least one.

    Raises:
        LlamaError: the library is not installed, or it cannot load the file.
    """

    def __init__(self, gguf: Path, *, slots: int, threads: int) -> None:
        self.key = secrets.token_urlsafe(24)
        self._gguf = gguf
        if not gguf.is_file():
            raise LlamaError(f"{gguf} does not exist.")
        try:
            import xllamacpp  # noqa: PLC0415 - it is not there on every platform
        except ImportError as error:
            raise LlamaError(f"llama.cpp is not installed on this platform ({error}).") from None
        try:
            self._server: Any = xllamacpp.Server(_parameters(xllamacpp, gguf, slots, threads, self.key))
        except RuntimeError as error:
            raise LlamaError(f"llama.cpp cannot load {gguf}: {str(error) or 'see the log'}.") from None
        self.url = str(self._server.listening_address)

    def facts(self) -> LlamaFacts:
        """What the server says of its model; raises LlamaError."""
        try:
            with httpx.Client(
                base_url=self.url, headers=self.headers, trust_env=False, timeout=_LOOK_TIMEOUT_S
            ) as http:
                properties = http.get("/props").raise_for_status().json()
                (listed,) = http.get("/v1/models").raise_for_status().json()["data"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise LlamaError(f"llama.cpp does not describe {self._gguf} ({error}).") from None
        meta = listed["meta"]
        return LlamaFacts(
            architecture=architecture(self._gguf),
            quantization=str(meta.get("ftype", "")).removeprefix("all "),
            parameters=int(meta["n_params"]),
            weights_bytes=int(meta["size"]),
            trained_tokens=int(meta["n_ctx_train"]),
            slot_tokens=int(properties["default_generation_settings"]["n_ctx"]),
            template=str(properties.get("chat_template", "")),
            calls_tools=bool(properties.get("chat_template_caps", {}).get("supports_tools")),
        )

    @property
    def headers(self) -> dict[str, str]:
        """The headers that a call needs."""
        return {"authorization": f"Bearer {self.key}"}

    def close(self) -> None:
        """Stop the server. Requests that run break off."""
        self._server = None


def _parameters(library: Any, gguf: Path, slots: int, threads: int, key: str) -> Any:
    parameters = library.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_parallel = slots
    parameters.n_ctx = max(CONTEXT_TOKENS, slots * SLOT_CONTEXT_TOKENS)
    parameters.n_batch = parameters.n_ubatch = _STEP_TOKENS
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or default_threads()
    parameters.api_keys = [key]
    parameters.endpoint_slots = parameters.ui = False
    parameters.offline = True  # it can download models by itself
    parameters.cache_ram_mib = 0  # by default, it keeps up to 8 GiB of old prompts
    parameters.enable_reasoning = 0
    parameters.verbosity = 0
    return parameters


def default_threads() -> int:
    """Half of the cores that this process can use, at least one: the other engine computes on them too."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // 2)


def architecture(gguf: Path) -> str:
    """The architecture that a GGUF file names first, or an empty string.

    The library `gguf` reads the whole vocabulary before it can tell, which takes seconds.
    """
    with gguf.open("rb") as file:
        head = file.read(256)
    try:
        (length,) = struct.unpack_from("<Q", head, 24)
        name = head[32 : 32 + length]
        kind, size = struct.unpack_from("<IQ", head, 32 + length)
    except struct.error:
        return ""
    if not head.startswith(b"GGUF") or name != b"general.architecture" or kind != _STRING or size > _MAX_NAME_BYTES:
        return ""
    start = 32 + length + 12
    return head[start : start + size].decode(errors="replace")
