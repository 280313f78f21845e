"""Activations of bottleneck adapters: the parameter-free ones of transformers' table (`ACT2FN`)."""

import math
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional


class Activation(IntEnum):
    """f in a bottleneck adapter. The numbers are stored in device tables and compiled into kernels."""

    LINEAR = 0
    RELU = 1
    GELU = 2  # exact, with erf
    GELU_TANH = 3
    GELU_10 = 4  # GELU clipped to -10 .. 10
    QUICK_GELU = 5
    SILU = 6
    LEAKY_RELU = 7  # slope 0.01
    RELU2 = 8
    RELU6 = 9
    SIGMOID = 10
    TANH = 11
    MISH = 12
    LAPLACE = 13


# transformers' LaplaceActivation (Ma et al. 2022, arXiv:2209.10655): a shifted normal CDF
_LAPLACE_MU: Final = 0.707107
_LAPLACE_SIGMA: Final = 0.282095


def activate(kind: Activation, x: Tensor) -> Tensor:
    """f(x), elementwise, in x's dtype and shape."""
    match kind:
        case Activation.LINEAR:
            return x
        case Activation.RELU:
            return functional.relu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.GELU_10:
            return functional.gelu(x).clamp(-10.0, 10.0)
        case Activation.QUICK_GELU:
            return x * torch.sigmoid(1.702 * x)
        case Activation.SILU:
            return functional.silu(x)
        case Activation.LEAKY_RELU:
            return functional.leaky_relu(x, 0.01)
        case Activation.RELU2:
            return functional.relu(x).square()
        case Activation.RELU6:
            return functional.relu6(x)
        case Activation.SIGMOID:
            return torch.sigmoid(x)
        case Activation.TANH:
            return torch.tanh(x)
        case Activation.MISH:
            return functional.mish(x)
        case Activation.LAPLACE:
            return 0.5 * (1.0 + torch.erf((x - _LAPLACE_MU) / (_LAPLACE_SIGMA * math.sqrt(2.0))))
