"""From GGUF files to MLX folders: the weights, the shape, the tokenizer, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from consumers.engines.local.process import EngineProcess
from consumers.models.convert.__main__ import convert
from consumers.models.convert.shape import ModelShape
from consumers.models.store import ModelError
from pipeline.config import Config
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import ask, until_ready
from tests.consumers.models.ggufs import HEAD, SPECIALS, tokens, written

mx = pytest.importorskip("mlx.core")


@pytest.fixture(autouse=True)
def _stream():
    """An engine of an earlier test in this process may have removed the default stream when it was closed."""
    mx.set_default_stream(mx.new_stream(mx.default_device()))


EXACT = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
ROUNDED = [Kind.Q4_K, Kind.Q5_K]
BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q5_0: 5, Kind.Q5_1: 5, Kind.Q8_0: 8, Kind.Q4_K: 4, Kind.Q5_K: 5}


def converted(file: Path, folder: Path, **sampling: float) -> dict:
    convert(file, folder, sampling)
    return json.loads((folder / "config.json").read_text())


def stated(file: Path) -> dict[str, np.ndarray]:
    """The weights in a GGUF file as float32, by GGUF's names."""
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}


def loaded(folder: Path, config: dict) -> dict[str, np.ndarray]:
    """The weights in an MLX folder as float32, as MLX computes them from levels, scales and biases."""
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        arrays |= load_file(file)
    found = {}
    for name, array in arrays.items():
        module = name.rpartition(".")[0]
        if name.endswith((".scales", ".biases")):
            continue
        if not name.endswith(".weight") or f"{module}.scales" not in arrays:
            found[name] = array.astype(np.float32)
            continue
        how = config["quantization"].get(module, config["quantization"])
        scales, biases = (mx.array(arrays[f"{module}.{part}"].astype(np.float32)) for part in ("scales", "biases"))
        whole = mx.dequantize(mx.array(array), scales, biases, group_size=how["group_size"], bits=how["bits"])
        found[name] = np.array(whole)
    return found


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_quantised_weights_stay_as_they_are(architecture: str, kind: Kind, tmp_path: Path):
    file = written(tmp_path / "m.gguf", architecture, kind=kind, untied=True)
    config = converted(file, tmp_path / "mlx")
    assert config["quantization"] == {"group_size": 32, "bits": BITS[kind]}
    names = ModelShape({"general.architecture": architecture, f"{architecture}.block_count": 2}).names()
    ours = loaded(tmp_path / "mlx", config)
    theirs = stated(file)
    assert set(ours) == {names[name] for name in theirs}
    for name, weights in theirs.items():
        expected = weights if weights.ndim == 2 else weights.astype(np.float16)
        assert np.array_equal(ours[names[name]], expected), name


@pytest.mark.parametrize("kind", ROUNDED, ids=lambda kind: kind.name)
def test_k_quants_lose_no_more_than_float16_does(kind: Kind, tmp_path: Path):
    file = written(tmp_path / "m.gguf", "qwen2", kind=kind)
    config = converted(file, tmp_path / "mlx")
    assert config["quantization"]["bits"] == BITS[kind]
    ours = loaded(tmp_path / "mlx", config)["model.layers.0.mlp.gate_proj.weight"]
    theirs = stated(file)["blk.0.ffn_gate.weight"]
    arrays = load_file(tmp_path / "mlx" / "model-00001.safetensors")
    scales, biases = (arrays[f"model.layers.0.mlp.gate_proj.{part}"].astype(float) for part in ("scales", "biases"))
    # Half of float16's last place, of the largest product in each group and of its bias.
    highest = 2 ** BITS[kind] - 1
    lost = np.abs(ours - theirs).reshape(*scales.shape, 32).max(axis=2)
    assert (lost <= (highest * scales + np.abs(biases)) * 2.0**-11 + highest * 2.0**-25).all()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q6_K], ids=lambda kind: kind.name)
def test_other_weights_become_float16(kind: Kind, tmp_path: Path):
    file = written(tmp_path / "m.gguf", kind=kind)
    config = converted(file, tmp_path / "mlx")
    assert "quantization" not in config
    ours = loaded(tmp_path / "mlx", config)["model.layers.1.self_attn.k_proj.weight"]
    assert np.array_equal(ours, stated(file)["blk.1.attn_k.weight"].astype(np.float16))


def test_layers_of_another_kind_are_listed(tmp_path: Path):
    kinds = {"token_embd.weight": Kind.Q8_0, "blk.0.ffn_down.weight": Kind.F16}
    file = written(tmp_path / "m.gguf", kind=lambda name: kinds.get(name, Kind.Q4_1))
    config = converted(file, tmp_path / "mlx")
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    weights = loaded(tmp_path / "mlx", config)
    assert np.array_equal(weights["model.embed_tokens.weight"], stated(file)["token_embd.weight"])
    assert config["tie_word_embeddings"]


def test_scales_that_float16_cannot_hold_make_float16_weights(tmp_path: Path):
    file = written(tmp_path / "m.gguf", kind=Kind.Q8_0)
    data = bytearray(file.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.0.attn_q.weight")
    data[tensor.data_offset : tensor.data_offset + 2] = np.float16(600).tobytes()
    data[tensor.data_offset + 2 : tensor.data_offset + 34] = bytes(32)
    file.write_bytes(data)
    config = converted(file, tmp_path / "mlx")
    arrays = load_file(tmp_path / "mlx" / "model-00001.safetensors")
    assert "model.layers.0.self_attn.q_proj.scales" not in arrays
    assert arrays["model.layers.0.self_attn.q_proj.weight"].dtype == np.float16
    assert config["quantization"]["bits"] == 8


def test_the_tokenizer_is_that_of_the_file(tmp_path: Path):
    converted(written(tmp_path / "m.gguf"), tmp_path / "mlx")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mlx")
    vocabulary = tokens()
    assert tokenizer.encode("hello", add_special_tokens=False) == [vocabulary.index("hello")]
    assert tokenizer.encode("<|im_start|>hell<tool>", add_special_tokens=False) == [
        vocabulary.index(token) for token in ("<|im_start|>", "hell", "<tool>")
    ]
    text = "naïve Привет 12 \n\t ok 🙂"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    added = tokenizer.added_tokens_decoder
    assert {added[number].content for number in added if added[number].special} == set(SPECIALS)
    assert tokenizer.model_max_length == 512


def test_every_token_that_ends_an_answer_is_stated(tmp_path: Path):
    config = converted(written(tmp_path / "m.gguf"), tmp_path / "mlx", temperature=0.2)
    generation = json.loads((tmp_path / "mlx" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 0], "bos_token_id": 1, "pad_token_id": 0, "temperature": 0.2}
    assert config["eos_token_id"] == [2, 0]


def test_sampling_that_the_file_recommends_is_kept(tmp_path: Path):
    def recommend(writer):
        writer.add_float32("general.sampling.temp", 0.5)
        writer.add_int32("general.sampling.top_k", 20)

    convert(written(tmp_path / "m.gguf", change=recommend), tmp_path / "mlx", {})
    generation = json.loads((tmp_path / "mlx" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["top_k"]) == (0.5, 20)


@pytest.mark.parametrize(
    ("pre", "parts"),
    [
        ("smollm", ["1", "2", "3"]),
        ("qwen2", ["1", "2", "3"]),
        ("llama-bpe", ["123"]),
        ("gpt-2", ["123"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, parts: list[str], tmp_path: Path):
    convert(written(tmp_path / "m.gguf", pre=pre), tmp_path / "mlx", {})
    splitter = Tokenizer.from_file(str(tmp_path / "mlx" / "tokenizer.json")).pre_tokenizer
    assert [part for part, _ in splitter.pre_tokenize_str("123")] == parts


def llama3_factors(factor: float) -> np.ndarray:
    """As llama.cpp's converter computes them from the model's configuration."""
    factors = []
    for pair in range(HEAD // 2):
        wavelength = 2 * math.pi * 10_000.0 ** (2 * pair / HEAD)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_the_rope_of_llama_3_is_recognised(tmp_path: Path):
    file = written(
        tmp_path / "m.gguf", change=lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors(32.0))
    )
    config = converted(file, tmp_path / "mlx")
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "gemma3"}, 'The architecture "gemma3" is not supported'),
        ({"tokenizer": "llama"}, "The tokenizer is SentencePiece, which is not supported"),
        ({"pre": "tekken"}, 'The pre-tokenizer "tekken" is not supported'),
        ({"change": lambda writer: writer.add_expert_count(8)}, "mixture of experts"),
        ({"change": lambda writer: writer.add_rope_dimension_count(32)}, "rotated only in part"),
        ({"change": lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")}, 'rope scaling "yarn"'),
        (
            {"change": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(HEAD // 2, np.float32) * 3)},
            "rope factors",
        ),
        (
            {"change": lambda writer: writer.add_tensor("blk.0.odd.weight", np.ones((2, 2), np.float32))},
            'The tensor "blk.0.odd.weight"',
        ),
        ({"leave_out": ("token_embd.weight",)}, "token_embd.weight"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, "blk.1.ffn_up.weight"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict, said: str, tmp_path: Path):
    with pytest.raises(ModelError, match=said.replace("(", r"\(")):
        convert(written(tmp_path / "m.gguf", **options), tmp_path / "mlx", {})


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model", b"\0" * 100])
def test_a_file_that_is_no_gguf_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"is not a GGUF file, or is damaged"):
        convert(tmp_path / "m.gguf", tmp_path / "mlx", {})


def test_a_file_that_ends_too_early_is_refused(tmp_path: Path):
    file = written(tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"is not a GGUF file, or is damaged"):
        convert(file, tmp_path / "mlx", {})


def test_the_process_imports_no_mlx(tmp_path: Path):
    file = written(tmp_path / "m.gguf")
    code = (
        "import sys; from consumers.models.convert.__main__ import main; code = main();"
        "sys.exit(code or any(name.partition('.')[0] in ('mlx', 'mlx_lm', 'torch') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path / "mlx")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in done.stdout.split()]
    assert numbers == sorted(numbers)
    assert (tmp_path / "mlx" / "config.json").is_file()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
async def test_the_engine_runs_the_folder(architecture: str, tmp_path: Path):
    convert(written(tmp_path / "m.gguf", architecture, kind=Kind.Q8_0), tmp_path / "mlx", {})
    request = ChatRequest(prompt="hello", max_tokens=4, temperature=0)
    async with EngineProcess(Config(), model_path=str(tmp_path / "mlx"), served_name="tiny") as engine:
        await until_ready(engine)
        answer, again = await ask(engine, request), await ask(engine, request)
        assert answer.token_ids == again.token_ids
        # The second one may find the prompt in the cache.
        counts = [(one.usage.prompt_tokens, one.usage.completion_tokens) for one in (answer, again)]
        assert counts[0] == counts[1]
