"""The tokenizer in a GGUF file, as the three files that transformers reads. Only byte-level BPE is supported."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from consumers.models.store import ModelError


class _TokenKind(IntEnum):
    """The kinds of tokens that GGUF tells apart, as far as they matter here."""

    CONTROL = 3
    ADDED = 4


# What ends an answer, beside the token that the file states: base models of a chat model often state another one.
_END_TOKENS: Final = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")

_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTION: Final = "(?i:" + "|".join(f"'{ending}" for ending in ("s", "t", "re", "ve", "m", "ll", "d")) + ")"
_SIGNS: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE: Final = (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
# The numbers that stay together, for each way to split text that works like Llama 3's.
_DIGITS: Final = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}", "deepseek-r1-qwen": r"\p{N}"}


def _pre_tokenizer(pre: str) -> Any:
    """How text is split before the merges."""
    if pre in _DIGITS:
        pattern = "|".join((_CONTRACTION, _WORD, _DIGITS[pre], _SIGNS, *_SPACE))
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("gpt-2", "gpt2"):
        return gpt2
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    raise ModelError(f'The pre-tokenizer "{pre}" is not supported. Supported are gpt-2, smollm, {", ".join(_DIGITS)}.')


class Vocabulary:
    """The tokenizer that the metadata of a GGUF file describes.

    Raises:
        ModelError: it is not byte-level BPE, or splits text in a way that is not supported.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        kind = self._get("model", "none")
        if kind != "gpt2":
            known = {"llama": "SentencePiece", "t5": "SentencePiece", "bert": "WordPiece"}
            raise ModelError(
                f"The tokenizer is {known.get(kind, kind)}, which is not supported in a GGUF file: only byte-level BPE "
                "is. Name a repository or a folder in MLX's format instead."
            )
        self.pre = str(self._get("pre", "gpt-2"))
        self._splitter = _pre_tokenizer(self.pre)
        self.tokens: list[str] = self._get("tokens", [])
        self._kinds: list[int] = self._get("token_type", [])

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"tokenizer.ggml.{key}", default)

    def _token(self, role: str) -> str | None:
        number = self._get(f"{role}_token_id")
        return self.tokens[number] if number is not None and number < len(self.tokens) else None

    def ids(self) -> dict[str, Any]:
        """The ids of tokens with a role, for `config.json` and `generation_config.json`."""
        numbers = {token: number for number, token in enumerate(self.tokens)}
        stated = [self._get(f"{role}_token_id") for role in ("eos", "eot", "eom")]
        usual = [numbers[token] for token in _END_TOKENS if self._is_control(numbers.get(token))]
        ends = dict.fromkeys(number for number in (*stated, *usual) if number is not None)
        found = {"bos_token_id": self._get("bos_token_id"), "pad_token_id": self._get("padding_token_id")}
        return {"eos_token_id": list(ends), **{role: number for role, number in found.items() if number is not None}}

    def _is_control(self, number: int | None) -> bool:
        return number is not None and number < len(self._kinds) and self._kinds[number] == _TokenKind.CONTROL

    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself, for `tokenizer.json`."""
        merges = [tuple(merge.split(" ", 1)) for merge in self._get("merges", [])]
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        # Llama 3's vocabulary has whole words that no sequence of merges makes.
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=self.pre == "llama-bpe")
        tokenizer = Tokenizer(bpe)
        if "qwen" in self.pre:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self._splitter
        tokenizer.decoder = decoders.ByteLevel()
        added = [
            AddedToken(token, special=kind == _TokenKind.CONTROL, normalized=False)
            for token, kind in zip(self.tokens, self._kinds, strict=False)
            if kind in (_TokenKind.CONTROL, _TokenKind.ADDED)
        ]
        tokenizer.add_tokens(added)
        return tokenizer

    def settings(self, context: int) -> dict[str, Any]:
        """The content of `tokenizer_config.json`."""
        roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": self._fields.get("tokenizer.chat_template"),
            **{name: self._token(role) for name, role in roles.items()},
        }
        return {name: value for name, value in settings.items() if value is not None}
