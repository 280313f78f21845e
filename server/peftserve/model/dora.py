"""DoRA's row scales on the base that is served.

DoRA (Liu et al. 2024, arXiv:2402.09353): y = g (W x + s B A x) + b, g = m / ||W + s B A||, row by row. Nothing in g
depends on x, so it is computed once, when the adapter is loaded, and a DoRA costs a step hardly more than a LoRA.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from peftserve.adapters.formats.parsed import LoraModule
from peftserve.adapters.safetensors import TensorView
from peftserve.errors import AdapterLoadError
from peftserve.model.decoder import lora_slices
from peftserve.model.layout import module_name
from peftserve.model.spec import TARGET_NAMES, ModelSpec
from peftserve.model.weights import ModelWeights
from peftserve_kernels.lora import LoraSlice
from peftserve_kernels.nf4 import TILE_ROWS, Nf4Weight, dequantize_nf4

# Rows of W in full precision at a time, whole tiles.
_ROWS = 16 * TILE_ROWS


@dataclass(frozen=True, slots=True)
class RowScale:
    """What `LoraWeights.row_scale` points to for one module: g - 1, then (1 - g) b, [2 out_features]."""

    merged: Nf4Weight
    merged_bias: torch.Tensor | None
    piece: LoraSlice  # of them
    module: LoraModule
    magnitude: TensorView
    name: str

    @property
    def shape(self) -> tuple[int]:
        return (2 * self.magnitude.shape[0],)

    @torch.inference_mode()
    def float32(self) -> npt.NDArray[np.float32]:
        """A new array. Raises `AdapterLoadError` where a row of W + s B A is zero."""
        first, last = self.piece.out_offset, self.piece.out_offset + self.piece.out_features
        base = self.merged
        if base.padding or first % TILE_ROWS or last % TILE_ROWS:
            base = base.row_major()
        base = base.rows(first, last)
        device = base.packed.device
        a, b, m = (
            torch.from_numpy(stored.float32()).to(device) for stored in (self.module.a, self.module.b, self.magnitude)
        )
        norms = torch.empty_like(m)
        for start in range(0, len(m), _ROWS):
            end = min(start + _ROWS, len(m))
            rows = dequantize_nf4(base.rows(start, end)).addmm_(b[start:end], a, alpha=self.module.scale)
            torch.linalg.vector_norm(rows, dim=1, out=norms[start:end])
        if not bool(norms.all()):
            row = int((norms == 0).nonzero()[0])
            raise AdapterLoadError(f"DoRA scales row {row} of {self.name}, which is zero with this adapter")
        excess = m / norms - 1
        shift = torch.zeros_like(m) if self.merged_bias is None else -excess * self.merged_bias[first:last]
        array: npt.NDArray[np.float32] = torch.cat([excess, shift]).cpu().numpy()
        return array


class RowScales:
    """Those of adapters on `weights`, a model of `spec`."""

    def __init__(self, weights: ModelWeights, spec: ModelSpec) -> None:
        self._weights = weights
        merged = zip(("qkv", "o", "gate_up", "down"), lora_slices(spec), strict=True)
        self._places = {piece.target: (name, piece) for name, pieces in merged for piece in pieces}

    def of(self, layer: int, target: int, module: LoraModule, magnitude: TensorView) -> RowScale:
        """That of a module of a DoRA."""
        merged, piece = self._places[target]
        weights = self._weights.layers[layer]
        return RowScale(
            getattr(weights, merged),
            getattr(weights, f"{merged}_bias"),
            piece,
            module,
            magnitude,
            module_name(layer, TARGET_NAMES[target]),
        )
