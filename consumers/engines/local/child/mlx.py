"""MLX as a backend, in the child process: the model, its tokenizer, and sampling. `batch.py` drives the model.

Sampling parameters that a request omits come from the model's `generation_config.json` (`do_sample: false` is greedy).
Parameters that are not there either have OpenAI's defaults (temperature 1, no truncation).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from consumers.engines.local.child import float32
from consumers.engines.local.child.alone import LoneSequences
from consumers.engines.local.child.backend import LoadError, Note, Prepared
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.cache_options import CacheOptions
from consumers.engines.local.child.caches import tried_reuse
from consumers.engines.local.child.calls.model import ModelCalls
from consumers.engines.local.child.checks import (
    answer_limit,
    check_bias,
    notes_of,
    offers_tools,
    refuse_unsupported,
    template_messages,
)
from consumers.engines.local.child.context import context_tokens
from consumers.engines.local.child.draft import Draft
from consumers.engines.local.child.guided import Gate, Grammars
from consumers.engines.local.child.importing import read_models_once
from consumers.engines.local.child.loading import loaded_draft, loaded_model
from consumers.engines.local.child.memory import free_bytes, measured_size
from consumers.engines.local.child.prompt_files import PromptFiles
from consumers.engines.local.child.prompts import (
    Prompt,
    Render,
    heads,
    plain_prompt,
    raw_prompt,
    templated,
)
from consumers.engines.local.child.reasoning import Reasoning
from consumers.engines.local.child.rehearsal import Way, rehearse
from consumers.engines.local.child.scores import ScoringSampler, TokenTexts
from consumers.engines.local.child.seeds import key_bits
from consumers.engines.local.child.selftest import identity_of, tested
from consumers.engines.local.child.speed import gflops, on_cpu, on_cuda
from consumers.engines.local.child.transcript import Transcript, shown_of
from consumers.engines.local.protocol import Facts
from pipeline.config import Config, Sampling
from pipeline.core.batch_plan import EXACT_PIECE_TOKENS
from pipeline.core.prefixes import common_tokens
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

if TYPE_CHECKING:
    from consumers.engines.local.child.lora import Adapters

log = logging.getLogger(__name__)

_GREEDY_BELOW: Final = 1e-4
"""Temperatures below this are greedy: division by them overflows, and only the likeliest token is ever sampled."""

_AHEAD: Final = "a"
"""Stands for the text ahead of an answer, in a detokenizer."""

_REPETITION_WINDOW_TOKENS: Final = 20
"""How many tokens `repetition_penalty` looks back: the default of mlx_lm."""


_STORED_AS: Final = "prompts 1"
"""How prompts are stored. Another way has another name."""

_REHEARSED: Final = (
    ChatRequest(temperature=0.0),
    ChatRequest(temperature=0.8, top_p=0.9, top_k=40, min_p=0.05),
    ChatRequest(temperature=0.8, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
)
"""Requests that differ in how their answers are sampled."""


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

    Args:
        config, model_path, note: as in `open_backend`.
        blas: the BLAS library that was loaded for MLX; empty for its own.

    Raises:
        LoadError: MLX is not installed, or the model cannot be loaded.
    """

    def __init__(self, config: Config, model_path: str, note: Note, *, blas: str = "") -> None:
        self._config = config
        self._blas = blas
        note("importing MLX")
        try:
            import mlx.core as mx

            read_models_once()
            import mlx_lm  # noqa: F401 - that it is there
        except ImportError as error:
            raise LoadError(f"MLX is not installed ({error}). Run: pip install mlx-lm") from None
        self._mx = mx
        self.on_cpu: bool = on_cpu()
        if self.on_cpu:
            # Compiling for the CPU runs a C++ compiler, which may be absent, and takes seconds during a request.
            mx.disable_compile()
        note("loading the model")
        self._loaded = loaded_model(config, model_path)
        self._model, self._tokenizer, self._folder = self._loaded.model, self._loaded.tokenizer, self._loaded.folder
        self._defaults = _sampling_defaults(self._folder, config.sampling, model_path)
        if on_cpu() and config.float32_weights:
            note("converting the weights to float32")
            float32.convert(self._model)
        self._caches = CacheOptions.of(config)
        self._caches.check(self._model)
        self._adapters = self._load_adapters(note)
        note("warming up")
        self._read_tokenizer()
        own_context = context_tokens(self._loaded.config, self._model, self._tokenizer)
        self.facts = self._warm_up(min(own_context, config.context_tokens or own_context))
        self._grammars = Grammars(self._preparing, vocabulary=self.facts.vocabulary, end_tokens=list(self._end_tokens))
        context, limit = self.facts.context_tokens, config.kv_bytes_limit or self.facts.free_bytes
        self._room_tokens = self.facts.kv.longest(limit, context) if limit else context
        self._draft = self._load_draft(note)
        self.files = self._open_files()
        self.batch = self._new_batch()
        if on_cuda():
            note("compiling kernels for this GPU, which takes minutes at the first start")
            self._rehearse()

    def _rehearse(self) -> None:
        ways = [partial(self._way, request) for request in _REHEARSED]
        try:
            rehearse(self.batch, self.facts.vocabulary, self.facts.context_tokens, ways)
        except Exception:
            log.warning("The rehearsal failed. Kernels are compiled as requests need them.", exc_info=True)
            self.reset()
        self._mx.clear_cache()

    def _way(self, request: ChatRequest) -> Way:
        return self._sampler(request, seed=0, position=0), self._penalties(request, prompt_tokens=0)

    def _load_draft(self, note: Note) -> Draft | None:
        if self._config.draft_model:
            note("loading the draft model")
        if self._config.draft_model and self.facts.alone:
            raise LoadError(f"A draft model needs a model that is computed in batches ({self.facts.alone}).")
        return loaded_draft(self._config, self._loaded, self.facts.vocabulary, on_cpu=self.on_cpu)

    def _load_adapters(self, note: Note) -> Adapters:
        from consumers.engines.local.child.lora import Adapters

        if self._config.adapters:
            note("loading the adapters")
        return Adapters(self._model, self._config.adapters, on_cpu=self.on_cpu)

    def _read_tokenizer(self) -> None:
        """Learn what the model's tokens mean."""
        # A copy for `prepare`, because two threads must not use one tokenizer.
        self._preparing = copy.deepcopy(self._tokenizer)
        self._reasoning = Reasoning(self._preparing, self._tokenizer.eos_token_ids)
        self._end_tokens = self._reasoning.end_tokens
        self._silent_tokens = _special_tokens(self._tokenizer)
        self._calls = ModelCalls(self._preparing, alone=self._config.plain_tool_calls)
        self._ahead = list(self._preparing.encode(_AHEAD, add_special_tokens=False))
        self._texts = TokenTexts(self._tokenizer)

    def _warm_up(self, context_tokens: int) -> Facts:
        """Run the model. This compiles its kernels, tests batches, and measures what configurations do not state."""
        logits = self._model(self._mx.array([[0]]))
        self._mx.eval(logits)
        vocabulary = int(logits.shape[-1])
        size = measured_size(self._model, self._caches)
        alone = self._caches.alone or tested(
            self._model, vocabulary, identity_of(self._folder, float32.kind_of(self._model)), on_cpu=self.on_cpu
        )
        return Facts(
            context_tokens=context_tokens,
            vocabulary=vocabulary,
            calls_tools=self._calls.supported,
            thinks=self._reasoning.thinks,
            gflops=gflops() if on_cpu() else 0.0,
            weights=float32.kind_of(self._model) if on_cpu() else "",
            kv_bytes_per_token=size.per_token,
            kv_bytes_fixed=size.fixed,
            kv_windows=size.windows,
            free_bytes=free_bytes(on_cpu=self.on_cpu),
            slots=1 if alone else 0,
            alone=alone,
            reuse="" if alone else tried_reuse(self._model),
        )

    def _open_files(self) -> PromptFiles | None:
        """Where the caches of prompts are stored, if they are. Another model, library or adapter computes others."""
        config = self._config
        if not (config.prompt_disk_bytes and config.prompt_cache and self.facts.reuse):
            return None
        adapters = [config.adapter_path, *config.adapters.values()]
        what = [
            *(_STORED_AS, float32.kind_of(self._model), str(self._mx.default_device()), self._blas),
            *config.adapters,
            *(identity_of(Path(folder)) for folder in adapters if folder),
        ]
        return PromptFiles.open(self._folder, identity_of(self._folder, *what))

    def _new_batch(self) -> MlxBatch | LoneSequences:
        if self.facts.alone:
            return LoneSequences(self._model, self._caches, self._adapters.of_rows)
        return MlxBatch(
            self._model,
            on_cpu=self.on_cpu,
            reuse=self.facts.reuse,
            of_rows=self._adapters.of_rows,
            draft=self._draft,
            files=self.files,
        )

    # ---- on the reading thread ---------------------------------------------------------------------------------------

    def prepare(self, key: int, work: Work) -> Prepared:
        """As `Backend.prepare`."""
        request = work.request
        written = self._prompt(request)
        prompt = self._tokens(written)
        check_bias(request, self.facts.vocabulary)
        resumed = self._resumed(work, prompt)
        transcript = self._transcript(work, written, prompt, resumed)
        return Prepared(
            key,
            prompt + resumed,
            len(resumed),
            transcript,
            work,
            guide=self._grammars.guide(request, resumed, self._gate(request, prompt)),
            exact=bool(request.exact),
            tenant=work.tenant,
            adapter=self._adapters.number(work.model),
            marks=self._marks(request, written, prompt),
        )

    def _transcript(self, work: Work, written: Prompt, prompt: list[int], resumed: list[int]) -> Transcript:
        request, reasoning = work.request, self._reasoning
        limit = answer_limit(
            request.token_limit,
            prompt_tokens=len(prompt),
            room_tokens=self._room_tokens,
            default=self._config.default_max_tokens,
        )
        calls = self._calls.of_answer(request, work.id)
        had_reasoning, had = self._shown(work, written, prompt, resumed)
        return Transcript(
            len(prompt),
            limit,
            _Detokenizer(self._tokenizer.detokenizer, self._ahead if written.goes_on else ()),
            end_tokens=self._end_tokens,
            silent_tokens=self._silent(with_tools=calls is not None),
            separator=None if request.is_raw else reasoning.separator(prompt, calls=calls is not None),
            stops=[*request.stops, *written.stops],
            calls=calls,
            resume_chars=had,
            resume_reasoning_chars=had_reasoning,
            one_call=request.parallel_tool_calls is False,
            notes=[*notes_of(request), *written.notes, *reasoning.plan(request).notes],
        )

    def _shown(self, work: Work, written: Prompt, prompt: list[int], resumed: list[int]) -> tuple[int, int]:
        """How many characters of the reasoning and of the answer the reader has, as a transcript counts them."""
        if work.resume_tokens or not resumed:
            return len(work.resume_reasoning), len(work.resume_text)
        detokenizer = _Detokenizer(self._preparing.detokenizer, self._ahead if written.goes_on else ())
        request, calls = work.request, offers_tools(work.request)
        silent = self._silent(with_tools=calls)
        text = "".join(detokenizer.push(token) for token in resumed if token not in silent) + detokenizer.flush()
        return shown_of(text, None if request.is_raw else self._reasoning.separator(prompt, calls=calls))

    def _resumed(self, work: Work, prompt: list[int]) -> list[int]:
        """The tokens of the answer so far."""
        before = self._reasoning.written(work.resume_reasoning, work.resume_text, prompt)
        resumed = work.resume_tokens or list(self._preparing.encode(before, add_special_tokens=False))
        if any(not 0 <= token < self.facts.vocabulary for token in resumed):
            raise HeadraceError(ErrorCode.INVALID_REQUEST, "The answer to resume has tokens of another model.")
        return resumed

    def _marks(self, request: ChatRequest, written: Prompt, prompt: list[int]) -> list[int]:
        """Where a cache that cannot be cut is kept: as `Prepared.marks`."""
        if self.facts.reuse != "snapshots" or not self._config.prompt_cache:
            return []
        marks = set()
        for head in heads(written.turns, self._render(request)):
            mark = common_tokens(self._tokens(Prompt(head)), prompt)
            marks.add(mark - mark % EXACT_PIECE_TOKENS if request.exact else mark)
        return sorted(mark for mark in marks if 0 < mark < len(prompt))

    def _silent(self, *, with_tools: bool) -> frozenset[int]:
        """The tokens that have no text. Those of marks have some, though they may be special ones."""
        marks = self._reasoning.marks.tokens if self._reasoning.marks else frozenset()
        return self._silent_tokens - marks - (self._calls.tokens if with_tools else frozenset())

    def _gate(self, request: ChatRequest, prompt: list[int]) -> Gate | None:
        """Where the form of an answer begins; None for a model without reasoning."""
        reasoning = self._reasoning
        if request.is_raw or (separator := reasoning.separator(prompt, calls=offers_tools(request))) is None:
            return None
        detokenizer, silent = _Detokenizer(self._preparing.detokenizer), self._silent(with_tools=True)
        marks = reasoning.marks
        opening = marks.opening if marks and request.thinking != "none" else None
        blanks = marks.blanks if marks else ()
        return Gate(separator, lambda token: "" if token in silent else detokenizer.push(token), opening, blanks)

    def count_tokens(self, request: ChatRequest) -> int:
        """As `Backend.count_tokens`."""
        return len(self._tokens(self._prompt(request)))

    def _prompt(self, request: ChatRequest) -> Prompt:
        refuse_unsupported(request, calls_tools=self.facts.calls_tools)
        messages = template_messages(request.chat)
        if request.is_raw:
            return raw_prompt(messages[0]["content"])
        if not self._preparing.has_chat_template:
            return plain_prompt(messages)
        return templated(self._calls.history.rewritten(messages), self._render(request))

    def _render(self, request: ChatRequest) -> Render:
        """The model's chat template, with the arguments of a request."""
        return partial(
            self._preparing.apply_chat_template,
            **(
                self._config.template_arguments
                | self._reasoning.plan(request).arguments
                | (request.chat_template_kwargs or {})
            ),
            tools=self._calls.shown(request),
            tokenize=False,
        )

    def _tokens(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt. One without any text begins with the token that begins or ends all texts."""
        tokens = list(self._preparing.encode(prompt.text, add_special_tokens=prompt.special))
        return tokens or [_first(self._preparing.bos_token_id, *sorted(self._end_tokens), 0)]

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
            adapter=sequence.adapter,
            most=sequence.longest_tokens,
        )

    def drafted(self) -> tuple[int, int]:
        """As `Backend.drafted`."""
        return (self._draft.policy.drafted, self._draft.policy.accepted) if self._draft else (0, 0)

    def reset(self, *, alone: str = "") -> None:
        """As `Backend.reset`."""
        self.batch.close()
        if alone and not self.facts.alone:
            log.warning("Steps of this model fail in batches (%s). It computes one request at a time.", alone)
            self.facts = msgspec.structs.replace(self.facts, slots=1, alone=alone, reuse="")
        self.batch = self._new_batch()
        self._mx.clear_cache()

    def close(self) -> None:
        """As `Backend.close`. In another order, the process sometimes aborts at its end."""
        self.batch.close()
        del self.batch, self._model, self._loaded, self._draft
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
    """mlx_lm's streaming detokenizer as a `Detokenizer`.

    Args:
        inner: of mlx_lm. It leaves out a space at the beginning of a text.
        ahead: the tokens of `_AHEAD`, for an answer that goes on in the midst of a text.
    """

    def __init__(self, inner: Any, ahead: Sequence[int] = ()) -> None:
        self._inner = inner
        self._left_out = len(_AHEAD) if ahead else 0
        for token in ahead:
            inner.add_token(token)

    def push(self, token: int) -> str:
        """As `Detokenizer.push`."""
        self._inner.add_token(token)
        return self._segment()

    def flush(self) -> str:
        """As `Detokenizer.flush`."""
        self._inner.finalize()
        return self._segment()

    def _segment(self) -> str:
        segment = str(self._inner.last_segment)
        self._left_out, left_out = max(0, self._left_out - len(segment)), self._left_out
        return segment[left_out:]


_T = TypeVar("_T")


def _first(*values: _T | None) -> _T:
    return next(value for value in values if value is not None)


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    """Tokens for structure, not for text: those with a role in the tokenizer, and those only marked as special."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, what in added.items() if what.special}


def _sampling_defaults(folder: Path, configured: Sampling, model_path: str) -> SamplingDefaults:
    """How tokens are drawn where a request does not say: by the settings, else by the model's own file."""
    try:
        return _read_sampling(folder, configured)
    except Exception as error:
        raise LoadError(f"The model {model_path} cannot be loaded ({type(error).__name__}: {error}).") from error


def _read_sampling(folder: Path, configured: Sampling) -> SamplingDefaults:
    file = folder / "generation_config.json"
    stated = json.loads(file.read_text()) if file.exists() else {}
    stated |= msgspec.to_builtins(configured)
    if configured.temperature is not None:
        stated["do_sample"] = True  # a temperature of 0 is greedy all the same
    known = {name: value for name, value in stated.items() if value is not None}
    return msgspec.convert(known, SamplingDefaults, strict=False)
