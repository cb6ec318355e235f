"""MLX as a backend, in the child process: the model, its tokenizer, and sampling. `batch.py` drives the model.

Sampling parameters that a request omits come from the model's `generation_config.json` (`do_sample: false` is greedy).
Parameters that are not there either have OpenAI's defaults (temperature 1, no truncation).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from consumers.engines.local.child import float32
from consumers.engines.local.child.backend import LoadError, Note, Prepared
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.caches import measure_cache
from consumers.engines.local.child.checks import (
    answer_limit,
    check_bias,
    notes_of,
    offers_tools,
    refuse_unsupported,
    room_tokens,
    template_messages,
)
from consumers.engines.local.child.guided import Grammars
from consumers.engines.local.child.scores import ScoringSampler, TokenTexts
from consumers.engines.local.child.seeds import key_bits
from consumers.engines.local.child.speed import gflops, on_cpu
from consumers.engines.local.child.transcript import ToolSyntax, Transcript
from consumers.engines.local.protocol import Facts
from pipeline.config import Config
from pipeline.core.batch_plan import EXACT_PIECE_TOKENS
from pipeline.core.prefixes import common_tokens
from pipeline.engine import Work
from pipeline.machine import memory_available
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

_GREEDY_BELOW: Final = 1e-4
"""Temperatures below this are greedy: division by them overflows, and only the likeliest token is ever sampled."""

_FREE_SHARE: Final = 0.5
"""The part of the free memory that the caches of the sequences that run may fill. Batches are copied as they grow."""

_REPETITION_WINDOW_TOKENS: Final = 20
"""How many tokens `repetition_penalty` looks back: the default of mlx_lm."""


class SamplingDefaults(msgspec.Struct):
    """The part of `generation_config.json` about sampling."""

    do_sample: bool = True
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class MlxBackend:
    """A model, its tokenizer, and the batch that it decodes.

    Raises:
        LoadError: MLX is not installed, or the model cannot be loaded.
    """

    def __init__(self, config: Config, model_path: str, note: Note) -> None:
        self._config = config
        note("importing MLX")
        try:
            import mlx.core as mx
            import mlx_lm
        except ImportError as error:
            raise LoadError(f"MLX is not installed ({error}). Run: pip install mlx-lm") from None
        self._mx = mx
        self.on_cpu: bool = on_cpu()
        if self.on_cpu:
            # Compiling for the CPU runs a C++ compiler, which may be absent, and takes seconds during a request.
            mx.disable_compile()
        note("loading the model")
        if Path(model_path).is_absolute() and not Path(model_path).is_dir():
            raise LoadError(f"No model folder {model_path}. Set --model to a folder or a Hugging Face repository.")
        try:
            # No progress bars: the standard error of this process is a log.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            self._model, self._tokenizer, model_config = mlx_lm.load(model_path, return_config=True)
            self._defaults = _sampling_defaults(model_path)
        except Exception as error:
            raise LoadError(f"The model {model_path} cannot be loaded ({type(error).__name__}: {error}).") from error
        if on_cpu() and config.float32_weights:
            note("converting the weights to float32")
            float32.convert(self._model)
        # A copy for `prepare`, because two threads must not use one tokenizer.
        self._preparing = copy.deepcopy(self._tokenizer)
        note("warming up")
        self._end_tokens = frozenset(self._tokenizer.eos_token_ids)
        self._silent_tokens = _special_tokens(self._tokenizer)
        self._tool_tokens = _tool_tokens(self._tokenizer)
        self._texts = TokenTexts(self._tokenizer)
        self.facts = self._warm_up(_context_tokens(model_config, self._tokenizer))
        self._grammars = Grammars(self._preparing, vocabulary=self.facts.vocabulary, end_tokens=list(self._end_tokens))
        self._room_tokens = room_tokens(
            self.facts.context_tokens,
            kv_bytes_per_token=self.facts.kv_bytes_per_token,
            kv_bytes_limit=config.kv_bytes_limit,
        )
        self.batch = self._new_batch()

    def _warm_up(self, context_tokens: int) -> Facts:
        """Run the model on one token. This compiles its kernels, and measures what some configurations do not state."""
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        logits = self._model(self._mx.array([[0]]), cache=cache)
        self._mx.eval(logits)
        reuse, kv_bytes_per_token, kv_bytes_fixed = measure_cache(self._model)
        return Facts(
            context_tokens=context_tokens,
            vocabulary=int(logits.shape[-1]),
            calls_tools=bool(self._tokenizer.has_tool_calling),
            gflops=gflops() if on_cpu() else 0.0,
            weights=float32.kind_of(self._model) if on_cpu() else "",
            kv_bytes_per_token=kv_bytes_per_token,
            kv_bytes_fixed=kv_bytes_fixed,
            suspends=bool(reuse),
            free_bytes=self._free_bytes(),
            reuse=reuse,
        )

    def _free_bytes(self) -> int:
        """Memory for KV caches: what the system or the GPU has left, without a reserve; 0 if not known."""
        if self.on_cpu:
            return int((memory_available() or 0) * _FREE_SHARE)
        known = self._mx.device_info()
        most = int(known.get("max_recommended_working_set_size") or known.get("memory_size") or 0)
        return max(0, int((most - self._mx.get_active_memory()) * _FREE_SHARE))

    def _new_batch(self) -> MlxBatch:
        return MlxBatch(self._model, on_cpu=self.on_cpu, reuse=self.facts.reuse)

    # ---- on the reading thread ---------------------------------------------------------------------------------------

    def prepare(self, key: int, work: Work) -> Prepared:
        """As `Backend.prepare`."""
        request = work.request
        prompt = self._prompt(request)
        check_bias(request, self.facts.vocabulary)
        limit = answer_limit(
            request.token_limit,
            prompt_tokens=len(prompt),
            room_tokens=self._room_tokens,
            default=self._config.default_max_tokens,
        )
        resumed = work.resume_tokens or self._preparing.encode(work.resume_text, add_special_tokens=False)
        if any(not 0 <= token < self.facts.vocabulary for token in resumed):
            raise HeadraceError(ErrorCode.INVALID_REQUEST, "The answer to resume has tokens of another model.")
        with_tools = offers_tools(request)
        transcript = Transcript(
            work.id,
            len(prompt),
            limit,
            _Detokenizer(self._tokenizer.detokenizer),
            end_tokens=self._end_tokens,
            silent_tokens=self._silent_tokens - self._tool_tokens if with_tools else self._silent_tokens,
            stops=request.stops,
            tools=self._tool_syntax(request) if with_tools else None,
            resume_chars=len(work.resume_text),
            one_call=request.parallel_tool_calls is False,
            notes=notes_of(request),
        )
        return Prepared(
            key,
            prompt + resumed,
            len(resumed),
            transcript,
            work,
            guide=self._grammars.guide(request, resumed),
            exact=bool(request.exact),
            tenant=work.tenant,
            marks=self._marks(request, prompt),
        )

    def count_tokens(self, request: ChatRequest) -> int:
        """As `Backend.count_tokens`."""
        return len(self._prompt(request))

    def _prompt(self, request: ChatRequest) -> list[int]:
        refuse_unsupported(request, calls_tools=self.facts.calls_tools)
        return self._tokenise(request)

    def _tokenise(self, request: ChatRequest) -> list[int]:
        messages = template_messages(request.chat)
        if not self._preparing.has_chat_template:
            return list(self._preparing.encode("\n".join(message["content"] for message in messages)))
        try:
            return self._templated(request, messages, add_generation_prompt=True)
        except Exception as error:  # a template is a program by the model's author, and may raise anything
            raise HeadraceError(
                ErrorCode.INVALID_REQUEST,
                f"The model's chat template rejects this conversation: {error}",
                param="messages",
            ) from None

    def _templated(self, request: ChatRequest, messages: list[Any], *, add_generation_prompt: bool) -> list[int]:
        text = self._preparing.apply_chat_template(
            messages,
            **(request.chat_template_kwargs or {}),
            tools=msgspec.to_builtins(request.tools) if offers_tools(request) else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return list(self._preparing.encode(text, add_special_tokens=False))

    def _marks(self, request: ChatRequest, prompt: list[int]) -> list[int]:
        """Where a cache that cannot be cut is kept: as `Prepared.marks`."""
        if self.facts.reuse != "snapshots" or not (self._config.prompt_cache and self._preparing.has_chat_template):
            return []
        messages = template_messages(request.chat)
        heads = [messages] + ([messages[:1]] if messages[0]["role"] == "system" and len(messages) > 1 else [])
        marks = set()
        for head in heads:
            with contextlib.suppress(Exception):  # a template can refuse a system prompt alone
                mark = common_tokens(self._templated(request, head, add_generation_prompt=False), prompt)
                marks.add(mark - mark % EXACT_PIECE_TOKENS if request.exact else mark)
        return sorted(mark for mark in marks if 0 < mark < len(prompt))

    def _tool_syntax(self, request: ChatRequest) -> ToolSyntax:
        tools = msgspec.to_builtins(request.tools)
        parser = self._tokenizer.tool_parser
        return ToolSyntax(
            self._tokenizer.tool_call_start,
            self._tokenizer.tool_call_end or "",
            lambda text: parser(text, tools),
        )

    # ---- on the main thread ------------------------------------------------------------------------------------------

    def insert(self, sequence: Prepared) -> None:
        """As `Backend.insert`."""
        work: Work = sequence.detail
        sampler = self._sampler(work.request, work.seed, sequence.position)
        if (alternatives := work.request.alternatives) is not None:
            sampler = scoring = ScoringSampler(sampler, alternatives, self._texts)
            sequence.transcript.score = scoring.take
        self.batch.add(
            sequence.key,
            sequence.prompt,
            sampler,
            self._penalties(work.request, len(sequence.prompt) - sequence.position),
            sequence.guide,
            exact=sequence.exact,
        )

    def reset(self) -> None:
        """As `Backend.reset`."""
        self.batch.close()
        self.batch = self._new_batch()
        self._mx.clear_cache()

    def close(self) -> None:
        """As `Backend.close`. In another order, the process sometimes aborts at its end."""
        self.batch.close()
        del self.batch, self._model
        self._mx.clear_streams()

    # ---- sampling ----------------------------------------------------------------------------------------------------

    def _sampler(self, request: ChatRequest, seed: int, position: int) -> Callable[[Any], Any]:
        """A function from the log-probabilities of a sequence to its next token, sampled by seed and position."""
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler

        defaults = self._defaults
        temperature = _first(request.temperature, defaults.temperature if defaults.do_sample else 0.0, 1.0)
        if temperature < _GREEDY_BELOW:
            return greedy_sampler  # the same object for all sequences, so that they are sampled in one call
        top_p = _first(request.top_p, defaults.top_p, 1.0)
        min_p = _first(request.min_p, defaults.min_p, 0.0)
        top_k = _first(request.top_k, defaults.top_k, 0)
        mx, vocabulary = self._mx, self.facts.vocabulary
        at = position

        def sample(logprobs: Any) -> Any:
            nonlocal at
            key = mx.random.key(key_bits(seed, at))
            at += 1
            if top_p < 1:
                logprobs = apply_top_p(logprobs, top_p)
            if min_p > 0:
                logprobs = apply_min_p(logprobs, min_p)
            if 0 < top_k < vocabulary:  # a larger top_k keeps all tokens
                logprobs = apply_top_k(logprobs, top_k)
            return mx.random.categorical(logprobs * (1 / temperature), key=key)

        return sample

    def _penalties(self, request: ChatRequest, prompt_tokens: int) -> list[Callable[[Any, Any], Any]]:
        """The penalties of one sequence.

        `repetition_penalty` looks at the latest tokens, including those of the prompt. The other two look at the whole
        answer and not at the prompt, as OpenAI defines them.
        """
        from mlx_lm.sample_utils import make_logits_processors

        repetition = _first(request.repetition_penalty, self._defaults.repetition_penalty, 1.0)
        processors = make_logits_processors(logit_bias=check_bias(request, self.facts.vocabulary))
        if repetition != 1:
            processors += make_logits_processors(
                repetition_penalty=repetition, repetition_context_size=_REPETITION_WINDOW_TOKENS
            )
        of_answer = make_logits_processors(
            presence_penalty=request.presence_penalty,
            presence_context_size=self.facts.context_tokens,
            frequency_penalty=request.frequency_penalty,
            frequency_context_size=self.facts.context_tokens,
        )
        return processors + [_on_answer(processor, prompt_tokens) for processor in of_answer]


def _on_answer(processor: Callable[[Any, Any], Any], prompt_tokens: int) -> Callable[[Any, Any], Any]:
    return lambda tokens, logits: processor(tokens[prompt_tokens:], logits)


class _Detokenizer:
    """mlx_lm's streaming detokenizer as a `Detokenizer`."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def push(self, token: int) -> str:
        """As `Detokenizer.push`."""
        self._inner.add_token(token)
        return str(self._inner.last_segment)

    def flush(self) -> str:
        """As `Detokenizer.flush`."""
        self._inner.finalize()
        return str(self._inner.last_segment)


_T = TypeVar("_T")


def _first(*values: _T | None) -> _T:
    return next(value for value in values if value is not None)


def _context_tokens(model_config: dict[str, Any], tokenizer: Any) -> int:
    """The context length of the model, or of the tokenizer if that is shorter."""
    inner = model_config.get("text_config") or model_config
    stated = [inner.get("max_position_embeddings"), model_config.get("max_position_embeddings")]
    stated.append(getattr(tokenizer, "model_max_length", None))
    # A tokenizer without a limit states a huge number.
    sane = [int(length) for length in stated if isinstance(length, int | float) and 0 < length < 1e9]
    return min(sane, default=4096)


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens for structure, not for text: those with a role in the tokenizer, and those only marked as special."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, what in added.items() if what.special}


def _tool_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens of the markers around a tool call. In some models they are special tokens, which would have no text."""
    markers = [tokenizer.tool_call_start_tokens, tokenizer.tool_call_end_tokens]
    return frozenset(token for tokens in markers for token in tokens or ())


def _sampling_defaults(model_path: str) -> SamplingDefaults:
    from mlx_lm.utils import hf_repo_to_path

    folder = Path(model_path) if Path(model_path).exists() else hf_repo_to_path(model_path)
    file = folder / "generation_config.json"
    if not file.exists():
        return SamplingDefaults()
    stated = {name: value for name, value in json.loads(file.read_text()).items() if value is not None}
    return msgspec.convert(stated, SamplingDefaults, strict=False)
