"""The calls of Ollama's API that work becomes: their paths and bodies. No I/O.

Options and tool calls are translated by `pipeline.wire.ollama`. Source of the shapes: Ollama's API reference
(`POST /api/chat`, `POST /api/generate`, `POST /api/embed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from consumers.engines.ollama.wire import OllamaModel
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.ollama import format_of, write_call, write_options
from pipeline.wire.particular import SWITCHES
from pipeline.wire.requests import ChatMessage, ChatRequest, EmbeddingRequest

# Ollama's sampler takes a seed of 32 bits, and -1 draws one.
_SEED_MODULUS = 2**31
# Other servers' parameters that Ollama has as options.
_SHARED = ("typical_p", "mirostat", "repeat_last_n")
CHAT_PATH = "/api/chat"
GENERATE_PATH = "/api/generate"


def call_of(work: Work, model: OllamaModel, *, default_max_tokens: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of the call for work: `/api/generate` where a prompt is not one turn of a chat.

    Ollama must refuse a prompt that does not fit, and not cut it (`truncate`, `shift`). A model thinks only if the
    request asks for it: it would use up the answer's tokens.

    Raises:
        HeadraceError: `unsupported_parameter` for a request with `logit_bias`, or with images for a model that is known
            not to read them; `invalid_request` for a conversation where one prompt is needed.
    """
    request = work.request
    _check(request, model)
    particular = request.ollama
    body: dict[str, Any] = {
        "model": work.model,
        "stream": True,
        "think": _think(request, model),
        "truncate": False,
        "shift": False,
        "options": {
            "num_predict": default_max_tokens,
            **_other_options(request),
            **write_options(request),
            "seed": work.seed % _SEED_MODULUS,
        },
    }
    if request.alternatives is not None:
        body |= {"logprobs": True, "top_logprobs": request.alternatives}
    if (form := format_of(request.response_format)) is not None:
        body["format"] = form
    if particular is not None and particular.keep_alive is not None:
        body["keep_alive"] = particular.keep_alive
    if request.is_raw or request.needs_ollama not in ("", "images") or (particular is not None and particular.needed):
        return GENERATE_PATH, body | _prompt(request)
    body["messages"] = _messages(request.chat)
    if request.tools and request.tool_choice != "none":
        body["tools"] = msgspec.to_builtins(request.tools)
    return CHAT_PATH, body


def notes_on(request: ChatRequest, model: OllamaModel) -> list[str]:
    """A note for each parameter that asks for something which Ollama does not do with this model."""
    others = set(request.chat_template_kwargs or ()) - {*SWITCHES, "reasoning_effort"}
    asks = {
        "chat_template_kwargs": bool(others),
        "verbosity": request.verbosity not in (None, "", "medium"),
    }
    asks |= {name: True for name in request.of_others if name not in _SHARED}
    notes = [f"`{name}` has no effect at Ollama." for name, asked in asks.items() if asked]
    if request.thinking not in (None, "none") and not _think(request, model):
        notes.append(f"Model {quoted(model.name)} does not think before it answers.")
    return notes


def _check(request: ChatRequest, model: OllamaModel) -> None:
    if request.logit_bias:
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER, "Ollama does not support `logit_bias`. Leave it out.", param="logit_bias"
        )
    if request.needs_ollama == "images" and not model.sees:
        message = f"Model {quoted(model.name)} does not support images. Choose another model."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="messages")


def _think(request: ChatRequest, model: OllamaModel) -> bool | str:
    """Ollama's `think`. It refuses one for a model that does not think, and words for all models but gpt-oss."""
    wanted = request.thinking
    if wanted is None or wanted == "none" or not model.thinks(assumed=bool(request.think)):
        return False
    return wanted if model.family.replace("-", "") == "gptoss" else True


def _other_options(request: ChatRequest) -> dict[str, Any]:
    """Ollama's own options, as the client sent them. The number of threads is this machine's affair."""
    given = {name: value for name, value in request.of_others.items() if name in _SHARED}
    given |= request.ollama.options if request.ollama is not None else {}
    return {name: value for name, value in given.items() if value is not None and name != "num_thread"}


def _prompt(request: ChatRequest) -> dict[str, Any]:
    """The fields of `/api/generate`: a system prompt and one prompt of the user."""
    *earlier, last = request.chat
    if last.role != "user" or any(turn.role not in ("system", "developer") for turn in earlier):
        message = f"`{request.needs_ollama}` needs one prompt. Leave out the earlier turns."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="messages")
    particular = request.ollama
    fields = {
        "prompt": last.text(),
        "system": "\n\n".join(turn.text() for turn in earlier),
        "images": last.images(),
        "suffix": request.suffix,
        "raw": request.is_raw,
        "template": particular and particular.template,
        "context": particular and particular.context,
    }
    return {name: value for name, value in fields.items() if value or name == "prompt"}


def embed_body(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    """The body of `POST /api/embed` for a request."""
    body: dict[str, Any] = {"model": model, "input": request.texts}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    if request.truncate is not None:
        body["truncate"] = request.truncate
    if request.ollama is not None:
        options = {name: value for name, value in request.ollama.options.items() if name != "num_thread"}
        body |= {"options": options} if options else {}
        body |= {"keep_alive": request.ollama.keep_alive} if request.ollama.keep_alive is not None else {}
    return body


def _messages(chat: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation. A tool's result has its tool's name at Ollama and its call's id at OpenAI, hence `names`."""
    names: dict[str, str] = {}
    messages = []
    for turn in chat:
        message: dict[str, Any] = {
            "role": "system" if turn.role == "developer" else turn.role,
            "content": turn.text(),
        }
        if images := turn.images():
            message["images"] = images
        if turn.thought:
            message["thinking"] = turn.thought
        if turn.tool_calls:
            names |= {call.id: call.function.name for call in turn.tool_calls}
            calls = [write_call(index, call.id, call.function) for index, call in enumerate(turn.tool_calls)]
            message["tool_calls"] = msgspec.to_builtins(calls)
        if turn.role == "tool":
            message["tool_name"] = names.get(turn.tool_call_id or "", turn.name or "")
            message["tool_call_id"] = turn.tool_call_id or ""
        messages.append(message)
    return messages
