"""Which tensors a checkpoint of a given shape holds, by their Hugging Face names. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from peftserve.errors import ConfigurationError
from peftserve.model.spec import ModelSpec, targets

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` as in the full-precision checkpoint; `quantized`: kept in NF4."""

    shape: tuple[int, ...]
    quantized: bool = False


def module_name(layer: int, projection: str) -> str:
    """`model.layers.3.self_attn.q_proj`."""
    block = "self_attn" if projection in _ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{projection}"


def has_bias(spec: ModelSpec, projection: str) -> bool:
    """Whether the linear layer `projection` adds a bias in this model."""
    if projection == "o_proj":
        return spec.attention_out_bias
    return spec.attention_bias if projection in _ATTENTION else spec.mlp_bias


def expected_tensors(spec: ModelSpec) -> dict[str, TensorInfo]:
    """Every tensor that the decoder needs, in the order in which it needs them. `lm_head` only when it is not tied."""
    hidden = (spec.hidden_size,)
    tensors = {EMBEDDING: TensorInfo((spec.vocab_size, spec.hidden_size))}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = TensorInfo(hidden)
        for target in targets(spec):
            name = module_name(layer, target.name)
            tensors[f"{name}.weight"] = TensorInfo((target.out_features, target.in_features), quantized=True)
            if has_bias(spec, target.name):
                tensors[f"{name}.bias"] = TensorInfo((target.out_features,))
        if spec.qk_norm:
            tensors[f"{prefix}.self_attn.q_norm.weight"] = TensorInfo((spec.head_dim,))
            tensors[f"{prefix}.self_attn.k_norm.weight"] = TensorInfo((spec.head_dim,))
        tensors[f"{prefix}.post_attention_layernorm.weight"] = TensorInfo(hidden)
    tensors[FINAL_NORM] = TensorInfo(hidden)
    if not spec.tie_word_embeddings:
        tensors[LM_HEAD] = TensorInfo((spec.vocab_size, spec.hidden_size))
    return tensors


def is_ignorable(name: str, spec: ModelSpec) -> bool:
    """Tensors that transformers ignores too: stored RoPE tables of old exports, a copy of a tied output head."""
    return name.endswith(".rotary_emb.inv_freq") or (name == LM_HEAD and spec.tie_word_embeddings)


def shape_faults(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, unexpected or mis-shaped among the tensors `shapes`, each by name."""
    expected = expected_tensors(spec)
    faults = [f"{name}: missing" for name in expected if name not in shapes]
    faults += [
        f"{name}: shape {list(shapes[name])}, expected {list(info.shape)}"
        for name, info in expected.items()
        if name in shapes and shapes[name] != info.shape
    ]
    faults += [f"{name}: unexpected" for name in shapes if name not in expected and not is_ignorable(name, spec)]
    return faults


def raise_faults(where: str, faults: list[str]) -> None:
    """One `ConfigurationError` with all `faults` of the weights in `where`; nothing when there are none."""
    if faults:
        shown = "; ".join(faults[:20]) + (f"; and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise ConfigurationError(f"the weights in {where} do not fit the configuration: {shown}", faults=faults)
