"""Trains the demo model on the curriculum, and writes its tokenizer, configuration and weights.

python -m bench.demo_model.make OUT --steps 6000
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import mlx.core as mx
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.demo_model import curriculum, lexicon, stories

PAD: Final = "<|endoftext|>"
START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
CONTEXT_TOKENS: Final = 4096
LONGEST_TRAINED_TOKENS: Final = 2048
BUCKETS: Final = (48, 96, 192, 384, 768, LONGEST_TRAINED_TOKENS)
TEMPLATE: Final = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


class Renderer:
    """Turns lessons into text with the model's own chat template, set up as the transformers library does it."""

    def __init__(self) -> None:
        environment = jinja2.Environment(  # noqa: S701 - it does not render HTML
            trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(TEMPLATE)

    def __call__(self, lesson: curriculum.Lesson) -> str:
        """The whole conversation, without the opening of another answer."""
        return self._template.render(messages=lesson.messages, tools=lesson.tools)


def corpus(render: Renderer, rng: random.Random) -> Iterator[str]:
    """The texts that train the tokenizer: lessons, and the names and numbers that should become one token each."""
    draw = curriculum.Draw(rng)
    for _ in range(6000):
        kind = rng.choice([kind for kind in curriculum.KINDS if kind not in ("off topic", "unknown capital")])
        yield render(curriculum.lesson(draw, kind))
    for country in lexicon.COUNTRIES:
        yield f" {' '.join(country)}\n" * 200
        yield f'"{country.capital}" "{country.capital_ru}"\n' * 100
        yield f" {country.name} {country.capital} {country.of_ru} {country.capital_ru}\n".lower() * 20
    for text in (*lexicon.WORDS, *lexicon.WORDS_RU, *stories.STORIES.values(), *stories.STORIES_RU.values()):
        yield f" {text}\n" * 30
    for text in (*lexicon.TOPICS, *lexicon.TOPICS_RU):
        yield f" {text}\n" * 5
    for number in range(curriculum.MAX_COUNT + 1):
        yield f"{number} {number}\n" * 400


def make_tokenizer(render: Renderer, vocabulary: int, seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer in which every number up to a hundred is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(render, random.Random(seed)), trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token, which must be in the vocabulary."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise LookupError(f"the tokenizer has no token {token}")
    return int(found)


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation as token ids, with the positions and the weights of the assistant's tokens."""

    ids: list[int]
    answered: dict[int, float]


class Rows:
    """Draws conversations and tokenizes them."""

    def __init__(self, tokenizer: Tokenizer, render: Renderer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._render = render
        self._draw = curriculum.Draw(random.Random(seed))
        self._end = token_id(tokenizer, END)
        self._opening = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False).ids

    def next(self) -> Row:
        """The next conversation. Each token of an answer of n tokens weighs 1/sqrt(n), so that no kind dominates."""
        lesson = curriculum.conversation(self._draw)
        text = self._render(lesson)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) > LONGEST_TRAINED_TOKENS:
            return self.next()
        answered: dict[int, float] = {}
        width = len(self._opening)
        for at in range(len(ids) - width):
            if ids[at : at + width] == self._opening:
                first, last = at + width, ids.index(self._end, at + width)
                answered |= dict.fromkeys(range(first, last + 1), (last + 1 - first) ** -0.5)
        if lesson.messages[-1].get("content") in stories.HONEST.values() and self._draw.rng.random() < 0.7:
            return self._begun(ids, answered)
        return Row(ids, answered)

    def _begun(self, ids: list[int], answered: dict[int, float]) -> Row:
        """The row with only the first words of its last answer, whose rest the model soon knows by heart."""
        last = max(at for at in range(len(ids)) if ids[at : at + len(self._opening)] == self._opening)
        end = last + len(self._opening) + 6
        return Row(ids[:end], {position: weight for position, weight in answered.items() if position < end})


class Bucket(NamedTuple):
    """Rows of similar length: padded (rows, tokens) ids, and the answers' tokens with what predicts them.

    ``before`` indexes the flattened ids, one for every answered token: the token after which it comes.
    """

    ids: mx.array
    before: mx.array
    targets: mx.array
    weights: mx.array


def bucketed(rows: list[Row]) -> Iterator[Bucket]:
    """The rows, grouped by similar length to reduce padding."""
    shortest = 0
    for longest in BUCKETS:
        members = [row for row in rows if shortest < len(row.ids) <= longest]
        shortest = longest
        if members:
            width = max(len(row.ids) for row in members)
            yield Bucket(
                mx.array([row.ids + [0] * (width - len(row.ids)) for row in members]),
                mx.array([at * width + position - 1 for at, row in enumerate(members) for position in row.answered]),
                mx.array([row.ids[position] for row in members for position in row.answered]),
                mx.array([weight for row in members for weight in row.answered.values()]),
            )


def learning_rate(peak: float, step: int, progress: float) -> float:
    """A linear warm-up of 100 steps, then a cosine from ``peak`` to 0 as ``progress`` goes from 0 to 1."""
    return peak * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))


def weighted_loss(model: Model, bucket: Bucket, total: float) -> mx.array:
    """The bucket's part of the step's mean cross entropy. ``total`` is the sum of weights in the step."""
    hidden = model.model(bucket.ids)
    predicting = hidden.reshape(-1, hidden.shape[-1])[bucket.before]
    logits = model.model.embed_tokens.as_linear(predicting)
    return (nn.losses.cross_entropy(logits, bucket.targets) * bucket.weights).sum() / total


def train(model: Model, rows: Rows, progress: Callable[[int], float], batch: int, peak: float) -> int:
    """Trains until ``progress(step)`` reaches 1. Returns the number of steps."""
    optimizer = optim.AdamW(learning_rate=peak, betas=[0.9, 0.98], weight_decay=0.01)
    value_and_grad = nn.value_and_grad(model, weighted_loss)
    began, step, tokens, smoothed = time.perf_counter(), 0, 0, 0.0
    while (done := progress(step)) < 1:
        drawn = [rows.next() for _ in range(batch)]
        total = sum(sum(row.answered.values()) for row in drawn)
        loss, gradients = 0.0, None
        for bucket in bucketed(drawn):
            part, part_gradients = value_and_grad(model, bucket, total)
            gradients = part_gradients if gradients is None else tree_map(mx.add, gradients, part_gradients)
            mx.eval(part, gradients)
            loss += part.item()
            tokens += bucket.ids.size
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.learning_rate = learning_rate(peak, step, done)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        step += 1
        smoothed = loss if step == 1 else 0.98 * smoothed + 0.02 * loss
        if step % 50 == 0:
            seconds = time.perf_counter() - began
            print(f"step {step} loss {smoothed:.4f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s", flush=True)
    return step


def configuration(vocabulary: int, end: int, options: argparse.Namespace) -> dict[str, Any]:
    """The model's config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "intermediate_size": options.feed_forward,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "head_dim": options.hidden // options.heads,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": end,
        "pad_token_id": 0,
    }


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes tokenizer.json, and tokenizer_config.json with the chat template."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "add_bos_token": False,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="number of training steps; the same seed gives the same model")
    length.add_argument("--seconds", type=float, help="duration of the training")
    parser.add_argument("--start", type=Path, help="folder of a model of the same shape to train further")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="conversations per step")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--vocabulary", type=int, default=2560, help="tokens in the vocabulary")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    """Trains and writes the model."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    render = Renderer()
    if options.start is None:
        tokenizer = make_tokenizer(render, options.vocabulary, options.seed)
    else:
        tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json"))
    write_tokenizer(tokenizer, options.out)
    end = token_id(tokenizer, END)
    config = configuration(options.vocabulary, end, options)
    (options.out / "config.json").write_text(json.dumps(config, indent=1))
    # Each question has one right answer, so the default is greedy decoding.
    generation = {"eos_token_id": end, "pad_token_id": 0, "do_sample": False}
    (options.out / "generation_config.json").write_text(json.dumps(generation, indent=1))
    mx.random.seed(options.seed)
    model = Model(ModelArgs.from_dict(config))
    if options.start is not None:
        model.load_weights(str(options.start / "model.safetensors"))
    mx.eval(model.parameters())
    began = time.perf_counter()

    def progress(step: int) -> float:
        if options.steps is not None:
            return step / options.steps
        return (time.perf_counter() - began) / float(options.seconds)

    steps = train(model, Rows(tokenizer, render, options.seed + 1), progress, options.batch, options.peak)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(options.out / "model.safetensors"), weights, metadata={"format": "mlx"})
    parameters = sum(value.size for value in weights.values())
    print(f"{parameters} parameters, {steps} steps in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
