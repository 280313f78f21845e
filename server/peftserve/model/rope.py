"""Rotary position embedding tables (Su et al. 2021, rotate-half convention) with linear and Llama 3.1 scaling."""

import math

import torch

from peftserve.errors import UnsupportedModelError
from peftserve.model.spec import ModelSpec, RopeScaling


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """theta^(-2i / head_dim) for i in 0 .. head_dim / 2, scaled as the model asks: float32 [head_dim / 2], host.

    Raises `UnsupportedModelError` for a scaling that is not `linear` or `llama3`.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    raise UnsupportedModelError(f"RoPE scaling {scaling.kind!r} is not supported; supported are linear and llama3")


def rope_table(spec: ModelSpec, num_positions: int, device: torch.device) -> torch.Tensor:
    """cos | sin of position x frequency: float32 [num_positions, head_dim], the halves head_dim / 2 wide each."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(spec))
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended linearly."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # `turns` is how often a wave turns within the original context: below `low` it is long, above `high` short.
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - blend) * frequencies / scaling.factor + blend * frequencies
