"""The weights of a decoder as it computes with them: NF4 projections, merged where they share an input."""

from dataclasses import dataclass
from pathlib import Path

import torch

from peftserve.model.checkpoint import Checkpoint
from peftserve.model.layout import EMBEDDING, FINAL_NORM, LM_HEAD, has_bias, module_name
from peftserve.model.memory_plan import weight_bytes
from peftserve.model.spec import ModelSpec, targets
from peftserve.model.weight_memory import WeightMemory
from peftserve_kernels.nf4 import TILE_ROWS, Nf4Weight
from peftserve_kernels.nf4_linear import prepare_nf4


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. D hidden, I intermediate, H query heads, KV key/value heads, hd head_dim.

    Norms and biases are float32 whatever the activations are: they are small, and rounding them gains nothing.
    """

    input_norm: torch.Tensor  # [D]
    qkv: Nf4Weight  # [(H + 2 KV) hd, D], rows q, then k, then v
    qkv_bias: torch.Tensor | None  # [(H + 2 KV) hd]
    o: Nf4Weight  # [D, H hd]
    o_bias: torch.Tensor | None  # [D]
    post_norm: torch.Tensor  # [D], before the feed-forward block
    gate_up: Nf4Weight  # [2 I, D], rows gate, then up
    gate_up_bias: torch.Tensor | None  # [2 I]
    down: Nf4Weight  # [D, I]
    down_bias: torch.Tensor | None  # [D]
    q_norm: torch.Tensor | None  # [hd], RMS norm of each query head before RoPE
    k_norm: torch.Tensor | None  # [hd]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole decoder. `embedding` and `lm_head` have the activations' dtype; `lm_head` is None when it is tied."""

    embedding: torch.Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [D], float32
    lm_head: torch.Tensor | None  # [V, D]

    @property
    def head(self) -> torch.Tensor:
        """The output projection [V, D]: `lm_head`, or the embedding when it is tied."""
        return self.embedding if self.lm_head is None else self.lm_head


def load_weights(folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """The weights in `folder` on `device`; projections that are not NF4 yet are quantised, one tensor at a time.

    `dtype` is that of the activations. Peak host memory is the result plus one full-precision tensor. Raises one
    `ConfigurationError` that names every missing, unexpected, mis-shaped or unreadable tensor.
    """
    checkpoint = Checkpoint(folder, device)
    checkpoint.check(spec)
    memory = WeightMemory(weight_bytes(spec, dtype.itemsize))
    return ModelWeights(
        embedding=memory.keep(checkpoint.dense(EMBEDDING, dtype)),
        layers=tuple(_layer(checkpoint, spec, layer, memory) for layer in range(spec.num_layers)),
        norm=memory.keep(checkpoint.dense(FINAL_NORM, torch.float32)),
        lm_head=None if spec.tie_word_embeddings else memory.keep(checkpoint.dense(LM_HEAD, dtype)),
    )


def _layer(checkpoint: Checkpoint, spec: ModelSpec, layer: int, memory: WeightMemory) -> LayerWeights:
    rows = {target.name: target.out_features for target in targets(spec)}

    def vector(name: str) -> torch.Tensor:
        return memory.keep(checkpoint.dense(f"model.layers.{layer}.{name}.weight", torch.float32))

    def matrix(*projections: str) -> Nf4Weight:
        names = [f"{module_name(layer, projection)}.weight" for projection in projections]
        if any(rows[projection] % TILE_ROWS for projection in projections):
            # No tile would hold rows of two of them, so they are stacked before they are laid out in tiles.
            return memory.keep_nf4([prepare_nf4(Nf4Weight.cat([checkpoint.nf4(name) for name in names]))])
        return memory.keep_nf4([prepare_nf4(checkpoint.nf4(name)) for name in names])

    def bias(*projections: str) -> torch.Tensor | None:
        if not has_bias(spec, projections[0]):
            return None
        return memory.keep(*(checkpoint.dense(f"{module_name(layer, p)}.bias", torch.float32) for p in projections))

    return LayerWeights(
        input_norm=vector("input_layernorm"),
        qkv=matrix("q_proj", "k_proj", "v_proj"),
        qkv_bias=bias("q_proj", "k_proj", "v_proj"),
        o=matrix("o_proj"),
        o_bias=bias("o_proj"),
        post_norm=vector("post_attention_layernorm"),
        gate_up=matrix("gate_proj", "up_proj"),
        gate_up_bias=bias("gate_proj", "up_proj"),
        down=matrix("down_proj"),
        down_bias=bias("down_proj"),
        q_norm=vector("self_attn.q_norm") if spec.qk_norm else None,
        k_norm=vector("self_attn.k_norm") if spec.qk_norm else None,
    )
