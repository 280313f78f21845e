"""GGUF files: against transformers' reader, and against the checkpoint they were written from."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftserve.errors import ConfigurationError, UnsupportedModelError
from peftserve.model.config_reader import parse_config, read_spec
from peftserve.model.convert import convert_gguf
from peftserve.model.dense import dense_state
from peftserve.model.gguf_file import GgufFile
from peftserve.model.spec import ModelSpec
from peftserve.model.weights import load_weights
from tests.tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{_NAMES[rest]}.{kind}"
    return f"{_NAMES[module]}.{kind}"


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return values.reshape(shape).swapaxes(1, 2).reshape(values.shape)


def _state(variant: str) -> dict[str, torch.Tensor]:
    model = make_model(variant)
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_gguf(
    path: Path,
    variant: str = "llama",
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    drop: str = "",
    tokenizer: bool = True,
) -> Path:
    """The tiny model `variant` as llama.cpp's converter would write it."""
    config = make_model(variant).config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    if arch == "qwen3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if tokenizer:
        _add_tokenizer(writer)
    edit(writer)
    for name, tensor in _state(variant).items():
        if name == drop:
            continue
        values = tensor.numpy()
        if arch in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = _permute(values, heads)
        plain = values.ndim == 1 or quantization == gguf.GGMLQuantizationType.F32
        if plain:
            writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
        else:
            writer.add_tensor(_gguf_name(name), gguf.quantize(values, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = make_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if number < 3 else 1 for number in range(len(vocabulary))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _silent(what: str, done: int, total: int) -> None:
    """Progress for nobody."""


def _spec(path: Path) -> ModelSpec:
    return parse_config(GgufFile(path).config)


@pytest.mark.parametrize("variant", ["llama", "llama_tied", "llama_bias", "smollm3", "qwen2", "qwen3"])
def test_a_file_holds_what_it_was_written_from(variant: str, tmp_path: Path) -> None:
    file = GgufFile(write_gguf(tmp_path / "m.gguf", variant))
    state = _state(variant)
    assert file.names.keys() == state.keys()
    for name, tensor in state.items():
        read = file.read(name)
        exact = name not in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(read, tensor if exact else tensor.to(torch.bfloat16)), name
        assert file.shapes[name] == tuple(tensor.shape)
    config = make_model(variant).config
    expected = parse_config(config.to_dict())
    assert parse_config(file.config) == expected


@pytest.mark.parametrize("quantization", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("variant", ["llama_tied", "qwen2"])
def test_a_converted_file_equals_what_transformers_reads(
    variant: str, quantization: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", variant, quantization)
    file = GgufFile(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    for name in file.names:
        wanted = theirs[name]
        read = file.read(name)
        assert torch.equal(read, wanted.to(read.dtype)), name

    folder = tmp_path / "nf4"
    folder.mkdir()
    convert_gguf(path, folder, _silent)
    dense = dense_state(folder)
    weights = load_weights(folder, read_spec(folder), torch.float32, torch.device("cpu"))
    assert torch.equal(weights.embedding, theirs["model.embed_tokens.weight"].bfloat16().float())
    for name, tensor in dense.items():
        if name.endswith("_proj.weight"):
            error = (tensor - theirs[name]).norm() / theirs[name].norm()
            assert 0.02 < error < 0.13, name
        else:
            assert torch.allclose(tensor, theirs[name], rtol=2**-8), name


def test_the_tokenizer_and_the_stop_tokens_come_along(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    folder = tmp_path / "nf4"
    folder.mkdir()
    convert_gguf(path, folder, _silent)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = make_tokenizer()
    text = "The adapter names é🙂 one request,\n\tand answers."
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    spec = read_spec(folder)
    assert spec.stop_token_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert spec.bos_token_id == 1


def test_smollm_splits_digits_before_it_merges(tmp_path: Path) -> None:
    folder = tmp_path / "nf4"
    folder.mkdir()
    convert_gguf(write_gguf(tmp_path / "m.gguf"), folder, _silent)
    split = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("x  12")] == ["x", "ĠĠ", "1", "2"]


def test_mistral_keeps_its_window(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "mistral", edit=lambda writer: writer.add_sliding_window(8))
    spec = _spec(path)
    assert (spec.name, spec.sliding_window, spec.sliding_layers) == ("mistral", 8, ())


def _llama3_factors(factor: float, head_dim: int) -> np.ndarray:
    """`rope_freqs` as LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py computes them."""
    low, high, original = 1.0, 4.0, 8192
    factors = []
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * np.pi * 10_000.0 ** (exponent / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(factor: float, tmp_path: Path) -> None:
    factors = _llama3_factors(factor, 16)
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    scaling = _spec(path).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == ("llama3", factor, 8192)


def test_linear_scaling(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    scaling = _spec(write_gguf(tmp_path / "m.gguf", edit=edit)).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


_REFUSED: Mapping[str, tuple[Callable[[gguf.GGUFWriter], Any], str]] = {
    "experts": (lambda writer: writer.add_expert_count(8), "llama.expert_count is not implemented"),
    "scale": (lambda writer: writer.add_attention_scale(0.5), "llama.attention.scale is not implemented"),
    "values": (lambda writer: writer.add_value_length(32), "value_length differs"),
    "rotary": (lambda writer: writer.add_key_length(32), "rope.dimension_count 16 is not the head size 32"),
    "yarn": (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "'yarn'"),
    "factors": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
        "rope_freqs.weight is not a llama3 scaling",
    ),
    "tensor": (
        lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 2), dtype=np.float32)),
        "tensor blk.0.ffn_gate_exps.weight is not implemented",
    ),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case: str, tmp_path: Path) -> None:
    edit, fault = _REFUSED[case]
    path = write_gguf(tmp_path / "m.gguf", edit=edit, tokenizer=False)
    with pytest.raises(UnsupportedModelError, match=fault):
        _spec(path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'gemma3' is not implemented"):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_gguf_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot be read as GGUF"):
        GgufFile(tmp_path / "m.gguf")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", drop="model.layers.2.mlp.up_proj.weight")
    (tmp_path / "nf4").mkdir()
    with pytest.raises(ConfigurationError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: missing"):
        convert_gguf(path, tmp_path / "nf4", _silent)
