"""Checkpoints -> ModelWeights, against transformers and bitsandbytes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftserve.errors import ConfigurationError
from peftserve.model.checkpoint_writer import write_nf4_checkpoint
from peftserve.model.config_reader import read_json, read_spec
from peftserve.model.dense import dense_state
from peftserve.model.layout import expected_tensors
from peftserve.model.weights import ModelWeights, load_weights
from peftserve_kernels.nf4 import Nf4Weight, dequantize_nf4
from tests.tiny_models import CONFIGS, make_checkpoint, make_model

CPU = torch.device("cpu")


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, read_spec(folder), dtype, CPU)


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    dequantized: torch.Tensor = bnb.dequantize_4bit(packed, state)
    return dequantized.float()


def _is_projection(name: str) -> bool:
    return name.endswith("_proj.weight")


def _same(left: ModelWeights, right: ModelWeights) -> None:
    """Bit for bit."""

    def flat(weights: ModelWeights) -> list[torch.Tensor]:
        tensors = [weights.embedding, weights.norm, weights.head]
        for layer in weights.layers:
            for name in layer.__slots__:
                value = getattr(layer, name)
                tensors += [value.packed, value.absmax] if isinstance(value, Nf4Weight) else [value]
        return [tensor for tensor in tensors if tensor is not None]

    pairs = list(zip(flat(left), flat(right), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("variant", CONFIGS)
def test_every_family_loads_as_bitsandbytes_quantises_it(variant: str, tmp_path: Path) -> None:
    model = make_model(variant)
    state = {name: _through_nf4(t) if _is_projection(name) else t for name, t in model.state_dict().items()}
    spec = read_spec(make_checkpoint(variant, tmp_path))
    weights = load_weights(tmp_path, spec, torch.float32, CPU)

    assert torch.equal(weights.embedding, state["model.embed_tokens.weight"])
    assert torch.equal(weights.norm, state["model.norm.weight"])
    assert (weights.lm_head is None) == spec.tie_word_embeddings
    assert torch.equal(weights.head, state["lm_head.weight"])
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}."

        def merged(*names: str, kind: str = "weight", prefix: str = prefix) -> torch.Tensor | None:
            found = [state[f"{prefix}{name}.{kind}"] for name in names if f"{prefix}{name}.{kind}" in state]
            return torch.cat(found) if found else None

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        gate_up = ("mlp.gate_proj", "mlp.up_proj")
        for got, wanted in (
            (dequantize_nf4(layer.qkv), merged(*qkv)),
            (dequantize_nf4(layer.o), merged("self_attn.o_proj")),
            (dequantize_nf4(layer.gate_up), merged(*gate_up)),
            (dequantize_nf4(layer.down), merged("mlp.down_proj")),
            (layer.qkv_bias, merged(*qkv, kind="bias")),
            (layer.o_bias, merged("self_attn.o_proj", kind="bias")),
            (layer.gate_up_bias, merged(*gate_up, kind="bias")),
            (layer.down_bias, merged("mlp.down_proj", kind="bias")),
            (layer.input_norm, merged("input_layernorm")),
            (layer.post_norm, merged("post_attention_layernorm")),
            (layer.q_norm, merged("self_attn.q_norm")),
            (layer.k_norm, merged("self_attn.k_norm")),
        ):
            assert (got is None) == (wanted is None)
            assert got is None or wanted is None or torch.equal(got, wanted)


def test_dense_state_is_what_is_served(tmp_path: Path) -> None:
    model = make_model("qwen3_bias")
    make_checkpoint("qwen3_bias", tmp_path)
    state = dense_state(tmp_path)
    wanted = {name: _through_nf4(t) if _is_projection(name) else t for name, t in model.state_dict().items()}
    del wanted["lm_head.weight"]  # tied
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    weights = _load(tmp_path, dtype)
    assert torch.equal(weights.embedding, stored["model.embed_tokens.weight"])
    assert torch.equal(weights.norm, stored["model.norm.weight"].float())
    packed, state = bnb.quantize_4bit(
        stored["model.layers.1.mlp.down_proj.weight"], blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(weights.layers[1].down.row_major().packed.flatten(), packed.flatten())
    assert state.dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_quant_storage": torch.bfloat16},
    ],
)
def test_what_transformers_saves_in_4_bit_loads_to_the_same_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    source = make_checkpoint("llama_bias", tmp_path / "source")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "saved")
    state = dense_state(tmp_path / "saved")
    parameters = dict(model.named_parameters())
    assert state.keys() == parameters.keys()
    for name, parameter in parameters.items():
        quantized = hasattr(parameter, "quant_state")
        wanted = bnb.dequantize_4bit(parameter.data, parameter.quant_state) if quantized else parameter.data
        assert quantized == _is_projection(name)
        assert torch.equal(state[name], wanted.float()), name
    if options.get("bnb_4bit_use_double_quant"):
        _same(_load(tmp_path / "saved"), _load(source))


class _Model:
    """A model as a source of tensors."""

    def __init__(self, variant: str) -> None:
        self._state = make_model(variant).state_dict()

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].clone()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_a_written_checkpoint_loads_like_its_source_here_and_in_transformers(shard_bytes: int, tmp_path: Path) -> None:
    source = make_checkpoint("smollm3", tmp_path / "source")
    target = tmp_path / "nf4"
    target.mkdir()
    progress: list[tuple[int, int]] = []
    write_nf4_checkpoint(
        _Model("smollm3"),
        read_spec(source),
        read_json(source / "config.json"),
        target,
        on_tensor=lambda done, total: progress.append((done, total)),
        shard_bytes=shard_bytes,
    )
    assert len(list(target.glob("*.safetensors"))) == (1 if shard_bytes == 1 << 30 else 8)
    total = len(expected_tensors(read_spec(source)))
    assert progress == [(done, total) for done in range(1, total + 1)]
    _same(_load(target), _load(source))

    theirs = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
    for name, tensor in dense_state(target).items():
        parameter = theirs[name]
        quantized = hasattr(parameter, "quant_state")
        dense = bnb.dequantize_4bit(parameter.data, parameter.quant_state) if quantized else parameter.data
        assert torch.equal(dense.float(), tensor), name


def test_a_sharded_full_precision_checkpoint(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "one")
    make_model("llama").save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    _same(_load(tmp_path / "many"), _load(tmp_path / "one"))


def _change(folder: Path, drop: tuple[str, ...] = (), **add: torch.Tensor) -> Path:
    state = load_file(folder / "model.safetensors")
    for name in drop:
        del state[name]
    save_file(
        {**state, **{name.replace("__", "."): tensor for name, tensor in add.items()}}, folder / "model.safetensors"
    )
    return folder


def test_all_tensors_at_fault_are_named_in_one_error(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    _change(
        folder,
        drop=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"),
        model__layers__0__self_attn__q_proj__weight=torch.zeros(64, 32),
        model__layers__0__mlp__down_proj__weight=torch.zeros(64, 128, dtype=torch.int8),
        model__layers__9__mlp__gate_proj__weight=torch.zeros(1),
    )
    with pytest.raises(ConfigurationError) as caught:
        _load(folder)
    assert sorted(caught.value.faults) == [
        "model.layers.0.mlp.down_proj.weight: dtype I8 without an NF4 quantisation state; supported are BF16, F16, F32",
        "model.layers.0.self_attn.q_proj.weight: shape [64, 32], expected [64, 64]",
        "model.layers.1.mlp.up_proj.weight: missing",
        "model.layers.9.mlp.gate_proj.weight: unexpected",
        "model.norm.weight: missing",
    ]
    assert all(fault in caught.value.message for fault in caught.value.faults)


def test_tensors_that_transformers_ignores_too(tmp_path: Path) -> None:
    folder = make_checkpoint("llama_tied", tmp_path)
    before = _load(folder)
    _change(
        folder,
        lm_head__weight=torch.zeros(320, 64),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8),
    )
    _same(_load(folder), before)


def test_nan_in_a_projection_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path)
    bad = torch.zeros(64, 128)
    bad[3, 5] = float("nan")
    _change(folder, model__layers__2__mlp__down_proj__weight=bad)
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.mlp\.down_proj\.weight: NaN"):
        _load(folder)


def test_a_quantised_checkpoint_that_skipped_some_modules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_checkpoint("llama", tmp_path / "source")
    skip = ["lm_head", "model.layers.1.mlp.down_proj"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skip
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "saved")
    _same(_load(tmp_path / "saved"), _load(source))
    assert "leaves 1 projections unquantised (model.layers.1.mlp.down_proj.weight" in caplog.text


def test_fp4_and_torn_nf4_tensors_are_refused_by_name(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path)
    state = load_file(source / "model.safetensors")
    changed: dict[str, torch.Tensor] = {}
    for number, kind in ((0, "fp4"), (1, "nf4")):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        packed, quant_state = bnb.quantize_4bit(state.pop(name), quant_type=kind, compress_statistics=True)
        changed[name] = packed
        changed.update({f"{name}.{key}": part for key, part in quant_state.as_dict(packed=True).items()})
    del changed["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file({**state, **changed}, source / "model.safetensors")
    with pytest.raises(ConfigurationError) as caught:
        _load(source)
    assert caught.value.faults == [
        "model.layers.0.mlp.up_proj.weight: quantised as fp4; only nf4 is supported",
        "model.layers.1.mlp.up_proj.weight: nested_absmax missing",
    ]


# VmHWM rather than ru_maxrss, which a child inherits from the process that forked it.
_CHILD = r"""
import re, sys
from pathlib import Path
import torch
from peftserve import memory
from peftserve.model import nf4_format
from peftserve.model.config_reader import read_spec
from peftserve.model.weights import load_weights
memory.share_one_heap()  # as the engine does
def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
nf4_format.unpack(nf4_format.quantize(torch.randn(64, 64)))  # imports and scratch buffers
nf4_format.quantize(torch.randn(1 << 16, 64))
before = peak_bytes()
weights = load_weights(Path(sys.argv[1]), read_spec(Path(sys.argv[1])), torch.bfloat16, torch.device("cpu"))
peak = peak_bytes() - before
kept = weights.embedding.nbytes + sum(
    w.nbytes for layer in weights.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)
)
print(peak, kept)
"""


def _make_wide_checkpoint(folder: Path, layers: int, hidden: int, intermediate: int) -> int:
    """A bf16 llama of random weights, a shard a layer; returns its bytes."""
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    total = 0
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, info in expected_tensors(read_spec(folder)).items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "top"
        weight_map[name] = f"model-{layer}.safetensors"
        tensor = torch.empty(info.shape, dtype=torch.bfloat16).uniform_(-1, 1)
        shards.setdefault(weight_map[name], {})[name] = tensor
        total += tensor.nbytes
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.parametrize(
    ("layers", "hidden", "intermediate"),
    [(3, 1024, 4096), pytest.param(12, 2048, 8192, marks=pytest.mark.slow)],
)
def test_quantising_at_load_needs_little_more_memory_than_the_result(
    layers: int, hidden: int, intermediate: int, tmp_path: Path
) -> None:
    stored = _make_wide_checkpoint(tmp_path, layers, hidden, intermediate)
    ran = subprocess.run([sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, kept = map(int, ran.stdout.split())
    largest = 2 * hidden * intermediate
    figures = f"checkpoint {stored >> 20} MiB, kept {kept >> 20} MiB, peak above imports {peak >> 20} MiB"
    # beside the largest tensor: its codes, scratch memory, and what is mapped of the file it is read from
    assert peak < kept + largest + (20 << 20), figures
