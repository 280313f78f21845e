"""Adapters as the rest of the server sees them: validated against the base, independent of who wrote the file."""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import TARGET_NAMES
from peftserve.types import AdapterKind

# As in `peftserve_kernels.rank_pages`, which needs torch; a test compares what comes of it.
_PAGE_ROWS = 8
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_SCALES_BYTES = 8  # of a row of the first factor, with int8


def device_bytes(details: Mapping[str, Any], adapter_dtype: str) -> int | None:
    """What the weights of a LoRA or bottleneck adapter take on a device that keeps them in `adapter_dtype`.

    None for `details` of a version that was published before there was a count. Blocks begin at aligned places, which
    is not counted.
    """
    if "padded_weights" not in details:
        return None
    needed = int(details["padded_weights"]) * _ELEMENT_BYTES[adapter_dtype]
    if adapter_dtype == "int8":  # vectors are bfloat16
        needed += int(details.get("vector_weights", 0)) + _SCALES_BYTES * int(details.get("padded_rows", 0))
    return needed


@dataclass(frozen=True, slots=True)
class LoraModule:
    """y += scale * B (A x). `a` [rank, in_features], `b` [out_features, rank].

    With a `magnitude` m [out_features] a DoRA: then each row of W + scale * B A, W the base's weight, is scaled to the
    norm m. (Liu et al. 2024, arXiv:2402.09353; PEFT's m may have any sign.)
    """

    rank: int
    scale: float
    a: TensorView
    b: TensorView
    magnitude: TensorView | None = None

    @property
    def size(self) -> "_Size":
        """As it lies on the device."""
        row_scales = 0 if self.magnitude is None else 2 * self.magnitude.shape[0]
        return _Size.of(self.rank, self.a.shape[1] + self.b.shape[0], row_scales)


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`modules[layer, target_index]`, target indices as in `model.spec.targets`; never empty."""

    modules: Mapping[tuple[int, int], LoraModule]

    @property
    def kind(self) -> AdapterKind:
        return AdapterKind.LORA

    def details(self) -> dict[str, Any]:
        """What people want to know of it, for listings; JSON types only."""
        ranks = sorted({module.rank for module in self.modules.values()})
        used = {target for _, target in self.modules}
        return {
            "source_format": "peft",
            "rank": ranks[-1],
            "ranks": ranks,
            "scales": sorted({module.scale for module in self.modules.values()})[:16],
            "target_modules": [name for index, name in enumerate(TARGET_NAMES) if index in used],
            "layers": len({layer for layer, _ in self.modules}),
            "use_dora": any(module.magnitude is not None for module in self.modules.values()),
            **_sizes(module.size for module in self.modules.values()),
        }


@dataclass(frozen=True, slots=True)
class PrefixAdapter:
    """Virtual tokens' keys and values, put before the real ones. No RoPE; real positions start at `num_virtual_tokens`.

    `embeddings` [n, layers * 2 * kv_heads * head_dim] as in the file: per token and layer K, then V.
    """

    num_virtual_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    embeddings: TensorView

    @property
    def kind(self) -> AdapterKind:
        return AdapterKind.PREFIX

    @property
    def key(self) -> npt.NDArray[np.float32]:
        """Keys, float32 [layers, kv_heads, n, head_dim]; a new array each time."""
        return self._half(0)

    @property
    def value(self) -> npt.NDArray[np.float32]:
        """Values, float32 [layers, kv_heads, n, head_dim]; a new array each time."""
        return self._half(1)

    def _half(self, which: int) -> npt.NDArray[np.float32]:
        # peft_model.get_prompt: view(b, n, layers * 2, heads, head_dim).permute(2, 0, 3, 1, 4).split(2)
        shape = (self.num_virtual_tokens, self.num_layers, 2, self.num_kv_heads, self.head_dim)
        half = self.embeddings.float32().reshape(shape)[:, :, which]
        return np.ascontiguousarray(half.transpose(1, 2, 0, 3))

    def details(self) -> dict[str, Any]:
        """What people want to know of it, for listings; JSON types only."""
        return _virtual_token_details("PREFIX_TUNING", self.num_virtual_tokens, self.num_layers)


@dataclass(frozen=True, slots=True)
class PromptAdapter:
    """Input embeddings [n, hidden] of virtual tokens that come before the real ones.

    Attention is causal, so they are never changed by what follows: their keys and values in the base are a prefix.
    """

    num_virtual_tokens: int
    num_layers: int
    peft_type: str
    embeddings: TensorView

    @property
    def kind(self) -> AdapterKind:
        return AdapterKind.PREFIX

    def details(self) -> dict[str, Any]:
        """What people want to know of it, for listings; JSON types only."""
        return _virtual_token_details(self.peft_type, self.num_virtual_tokens, self.num_layers)


class BottleneckSite(enum.IntEnum):
    """Where in a decoder layer a bottleneck sits; the value is its index in the adapter tables."""

    ATTENTION = 0
    FFN = 1


class BottleneckInput(enum.StrEnum):
    """What the down-projection reads: h is the sublayer's output, r the residual stream at the sublayer's input."""

    HIDDEN = "hidden"
    HIDDEN_PLUS_RESIDUAL = "hidden_plus_residual"
    RESIDUAL = "residual"


class Activation(enum.StrEnum):
    """f of a bottleneck, named as in `peftserve_kernels.activation`. GELU is the erf form, GELU_TANH the tanh one."""

    RELU = "relu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    GELU_10 = "gelu_10"
    QUICK_GELU = "quick_gelu"
    SILU = "silu"
    LEAKY_RELU = "leaky_relu"
    RELU2 = "relu2"
    RELU6 = "relu6"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    MISH = "mish"
    LAPLACE = "laplace"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class BottleneckModule:
    """stream += scale * (W_up f(W_down z + down_bias) + up_bias).

    `down` [width, hidden], `down_bias` [width], `up` [hidden, width], `up_bias` [hidden]. A learned or per-channel
    scale is folded into `up` and `up_bias` already.
    """

    width: int
    scale: float
    down: TensorView
    down_bias: TensorView
    up: TensorView
    up_bias: TensorView

    @property
    def size(self) -> "_Size":
        """As it lies on the device."""
        hidden = self.down.shape[1]
        return _Size.of(self.width, 2 * hidden, hidden + self.width)


@dataclass(frozen=True, slots=True)
class BottleneckAdapter:
    """`sites[layer, site]`; never empty. `activation` and `input_mode` hold for all of them."""

    sites: Mapping[tuple[int, BottleneckSite], BottleneckModule]
    activation: Activation
    input_mode: BottleneckInput

    @property
    def kind(self) -> AdapterKind:
        return AdapterKind.BOTTLENECK

    def details(self) -> dict[str, Any]:
        """What people want to know of it, for listings; JSON types only."""
        widths = sorted({module.width for module in self.sites.values()})
        return {
            "source_format": "adapterhub",
            "width": widths[-1],
            "widths": widths,
            "sites": [site.name.lower() for site in BottleneckSite if any(s is site for _, s in self.sites)],
            "activation": self.activation.value,
            "input": self.input_mode.value,
            "layers": len({layer for layer, _ in self.sites}),
            **_sizes(module.size for module in self.sites.values()),
        }


def _virtual_token_details(peft_type: str, count: int, num_layers: int) -> dict[str, Any]:
    return {"source_format": "peft", "peft_type": peft_type, "num_virtual_tokens": count, "layers": num_layers}


@dataclass(frozen=True, slots=True)
class _Size:
    """A module on the device: `rows` of each factor, in pages of 8; all its `weights`; `vectors`: those in no rows."""

    rows: int
    weights: int
    vectors: int

    @classmethod
    def of(cls, rank: int, columns: int, vectors: int) -> "_Size":
        """`columns`: of both factors together."""
        rows = -(-rank // _PAGE_ROWS) * _PAGE_ROWS
        return cls(rows, rows * columns + vectors, vectors)


def _sizes(of: Iterable[_Size]) -> dict[str, int]:
    sizes = list(of)
    return {
        "padded_weights": sum(size.weights for size in sizes),
        "padded_rows": sum(size.rows for size in sizes),
        "vector_weights": sum(size.vectors for size in sizes),
    }


Adapter: TypeAlias = LoraAdapter | PrefixAdapter | PromptAdapter | BottleneckAdapter
