"""`nf4_linear` and what it is measured against: its reference, bitsandbytes' Linear4bit, a dense bf16 product."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from machine import dense_dtype, last_level_cache_bytes
from measure import Call, rotating
from peftserve_kernels import NF4_BLOCK, Nf4Weight, nf4_linear, prepare_nf4
from peftserve_kernels.nf4_linear import nf4_linear_reference, why_no_int8_inputs

# bitsandbytes warns at import that a kernel of another package is absent; its own is what a plain install runs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise  # noqa: E402
from bitsandbytes.nn.modules import Linear4bit, Params4bit  # noqa: E402

# A model's layers push one another out of the cache: copies of a weight take turns that together have so many times its
# size.
_COLD_FACTOR = 4

_TOLERANCE = 0.02  # relative, in norm; bitsandbytes' kernel rounds the absmax to bf16


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one size. `variants` holds `ours`, `reference`, the op's rivals, and `int8` where inputs may be that.

    `nbytes` is the least an implementation must read and write in memory, `flops` what it must compute.
    """

    op: str
    shape: str
    tokens: int
    variants: dict[str, Call]
    nbytes: int
    flops: int


def copies_for(nbytes: int, *, quick: bool) -> int:
    """How many operands of `nbytes` keep one another out of the cache."""
    return 2 if quick else max(2, -(-_COLD_FACTOR * last_level_cache_bytes() // nbytes))


class Layer:
    """A random linear layer [N, K], quantised once by bitsandbytes, in the forms that the rivals compute with."""

    def __init__(self, name: str, rows: int, columns: int, *, quick: bool) -> None:
        self.name = name
        self.rows, self.columns = rows, columns
        layer: Any = Linear4bit(  # type: ignore[no-untyped-call]
            columns, rows, bias=False, compute_dtype=dense_dtype(), quant_type="nf4"
        )
        values = torch.randn(rows, columns) * columns**-0.5
        layer.weight = Params4bit(values.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer = layer.to("cpu").eval()
        weight = _flatten(layer)
        dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dense_dtype())
        count = copies_for(weight.nbytes, quick=quick)
        copies = [Nf4Weight(weight.packed.clone(), weight.absmax.clone()) for _ in range(count)]
        self.nf4 = [prepare_nf4(each) for each in copies]  # as the engine does at load
        self.nf4_rows = copies
        # Linear4bit has two ways on the CPU. In evaluation mode on AVX512_BF16 its first call repacks the weight for a
        # kernel of its own; everywhere else it dequantises the whole weight in every call.
        self.packed4bit = [copy.deepcopy(layer) for _ in range(count)]
        self.unpacked4bit = [copy.deepcopy(layer).train() for _ in range(count)]
        self.dense_t = [dense.clone().t() for _ in range(copies_for(dense.nbytes, quick=quick))]
        warm = torch.zeros(1, columns, dtype=dense_dtype())
        for each in self.packed4bit:
            each(warm)

    def case(self, tokens: int) -> Case:
        """The layer on [M, K] activations."""
        x = torch.randn(tokens, self.columns).bfloat16()
        rival_x = x.to(dense_dtype())
        variants: dict[str, Call] = {
            "ours": rotating(self.nf4, lambda weight: nf4_linear(x, weight)),
            "reference": rotating(self.nf4_rows, lambda weight: nf4_linear_reference(x, weight)),
            "bnb": rotating(self.packed4bit, lambda layer: layer(rival_x)),
            "bnb_unpacked": rotating(self.unpacked4bit, lambda layer: layer(rival_x)),
            "dense": rotating(self.dense_t, lambda weight: torch.mm(rival_x, weight)),
        }
        if why_no_int8_inputs(x.device, x.dtype) is None:
            variants["int8"] = rotating(self.nf4, lambda weight: nf4_linear(x, weight, int8_inputs=True))
        self._check(x, variants)
        return Case(
            op="nf4_linear",
            shape=self.name,
            tokens=tokens,
            variants=variants,
            nbytes=self.nf4[0].nbytes + x.nbytes + 2 * tokens * self.rows,
            flops=2 * tokens * self.rows * self.columns,
        )

    def _check(self, x: Tensor, variants: Mapping[str, Call]) -> None:
        """Raises RuntimeError when a variant computes something else: its time would mean nothing."""
        expected = x.float() @ self.dense_t[0].float()
        for name, call in variants.items():
            output = call()
            if not isinstance(output, Tensor) or (output - expected).norm() > _TOLERANCE * expected.norm():
                raise RuntimeError(f"{name} computes a wrong {self.name} at M = {len(x)}")


def layer_shapes(hidden: int, intermediate: int, q_size: int, kv_size: int) -> Sequence[tuple[str, int, int]]:
    """The merged projections of a decoder layer as (name, N, K)."""
    return (
        ("qkv", q_size + 2 * kv_size, hidden),
        ("o", hidden, q_size),
        ("gate_up", 2 * intermediate, hidden),
        ("down", hidden, intermediate),
    )


def _flatten(layer: Any) -> Nf4Weight:
    """The same weight as the engine holds it: the absmax is no longer quantised itself."""
    state = layer.weight.quant_state
    rows, columns = state.shape
    absmax: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return Nf4Weight(layer.weight.data.view(rows, columns // 2), absmax.float().view(rows, columns // NF4_BLOCK))
