"""The calls of OpenAI's API that work becomes. No I/O.

Only what the request sets is sent, so that everything else keeps the server's own values. A seed of headrace's own is
not sent either: `mlx_lm.server` runs a request with a seed apart from all others.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatMessage, ChatRequest, EmbeddingRequest

# The samplers of some servers take a seed of 32 bits, and the largest one draws one.
_SEED_MODULUS = 2**31
_AS_THEY_ARE = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "parallel_tool_calls",
    "verbosity",
)


def answer_body(work: Work, *, default_max_tokens: int, context_tokens: int = 0) -> dict[str, Any]:
    """The body of `POST /v1/chat/completions` for work; of `POST /v1/completions`, with a `prompt`, for a raw one.

    vLLM refuses a limit that is larger than the model's context, so it is reduced to `context_tokens`; 0 for unknown.

    Raises:
        HeadraceError: `unsupported_parameter` for what only MLX or only Ollama can do.
    """
    request = work.request
    _refuse(request)
    limit = request.token_limit or default_max_tokens  # without a limit, a number that no context has
    body: dict[str, Any] = {
        "model": work.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": min(limit, context_tokens or limit),
    }
    body |= {name: value for name in _AS_THEY_ARE if (value := getattr(request, name)) is not None}
    body |= request.of_others
    if request.repetition_penalty is not None:
        body["repeat_penalty"] = request.repetition_penalty  # llama.cpp's name
    if request.seed is not None:
        body["seed"] = request.seed % _SEED_MODULUS
    if request.stops:
        body["stop"] = request.stops
    if request.logit_bias:
        body["logit_bias"] = request.logit_bias
    if (form := request.response_format) is not None and form.type != "text":
        body["response_format"] = msgspec.to_builtins(form)
    if request.structured_outputs is not None:
        body["structured_outputs"] = msgspec.to_builtins(request.structured_outputs)
    alternatives = request.alternatives
    if request.is_raw:
        return body | {"prompt": request.chat[0].text()} | ({} if alternatives is None else {"logprobs": alternatives})
    body["messages"] = [_message(turn) for turn in request.chat]
    if alternatives is not None:
        body |= {"logprobs": True} | ({"top_logprobs": alternatives} if alternatives else {})
    return body | _tools(request) | _thinking(request)


def _refuse(request: ChatRequest) -> None:
    only_mlx = "exact" if request.exact else ""
    only_ollama = "" if request.needs_ollama == "images" else request.needs_ollama
    only_ollama = only_ollama or (request.ollama.needed if request.ollama is not None else "")
    if name := only_mlx or only_ollama:
        message = f"A server of OpenAI's API does not support `{name}`. Leave it out, or choose another model."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)


def _message(turn: ChatMessage) -> dict[str, Any]:
    message: dict[str, Any] = {
        # Many templates know no developer.
        "role": "system" if turn.role == "developer" else turn.role,
        "content": _parts(turn) if turn.shows else turn.text(),
    }
    if turn.role == "assistant" and turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.name is not None:
        message["name"] = turn.name
    if turn.tool_calls:
        message["tool_calls"] = msgspec.to_builtins(turn.tool_calls)
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _parts(turn: ChatMessage) -> list[dict[str, Any]]:
    """Texts and images, with the address of an image in an object, as OpenAI has it."""
    parts: list[dict[str, Any]] = msgspec.to_builtins(turn.content)
    return [_image(part) if part["type"] == "image_url" else _text(part) for part in parts]


def _image(part: dict[str, Any]) -> dict[str, Any]:
    url = part["image_url"]
    return {"type": "image_url", "image_url": {"url": url} if isinstance(url, str) else url}


def _text(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part.get("text") or part.get("refusal", "")}


def _tools(request: ChatRequest) -> dict[str, Any]:
    if not request.tools or request.tool_choice == "none":
        return {}
    tools: dict[str, Any] = {"tools": msgspec.to_builtins(request.tools)}
    if request.tool_choice is not None:
        tools["tool_choice"] = msgspec.to_builtins(request.tool_choice)
    return tools


def _thinking(request: ChatRequest) -> dict[str, Any]:
    """Whether the model thinks, as an argument of its template; how much, as OpenAI's parameter.

    An effort alone stays alone, except `none`: templates with a switch know no efforts.
    """
    template = dict(request.chat_template_kwargs or {})
    effort = request.reasoning_effort if request.thinking_param == "reasoning_effort" else None
    if request.thinking is not None and (effort is None or request.thinking == "none"):
        template.setdefault("enable_thinking", request.thinking != "none")
    fields: dict[str, Any] = {"chat_template_kwargs": template} if template else {}
    if request.worded_thinking:
        fields["reasoning_effort"] = effort or request.thinking
    return fields


def notes_on(request: ChatRequest) -> list[str]:
    """A note for each of Ollama's own parameters, which OpenAI's API has no field for."""
    if request.ollama is None:
        return []
    names = [f"options.{name}" for name, value in request.ollama.options.items() if value is not None]
    names += ["keep_alive"] if request.ollama.keep_alive is not None else []
    return [f"`{name}` has no effect at a server of OpenAI's API." for name in names]


def vectors_body(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    """The body of `POST /v1/embeddings` for a request."""
    body: dict[str, Any] = {"model": model, "input": request.texts, "encoding_format": "float"}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    return body
