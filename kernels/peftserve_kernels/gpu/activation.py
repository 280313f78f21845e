"""The activations of bottleneck adapters inside a kernel."""

import math

import triton
import triton.language as tl

from peftserve_kernels.activation import Activation

_RELU = tl.constexpr(Activation.RELU.value)
_GELU = tl.constexpr(Activation.GELU.value)
_GELU_TANH = tl.constexpr(Activation.GELU_TANH.value)
_GELU_10 = tl.constexpr(Activation.GELU_10.value)
_QUICK_GELU = tl.constexpr(Activation.QUICK_GELU.value)
_SILU = tl.constexpr(Activation.SILU.value)
_LEAKY_RELU = tl.constexpr(Activation.LEAKY_RELU.value)
_RELU2 = tl.constexpr(Activation.RELU2.value)
_RELU6 = tl.constexpr(Activation.RELU6.value)
_SIGMOID = tl.constexpr(Activation.SIGMOID.value)
_TANH = tl.constexpr(Activation.TANH.value)
_MISH = tl.constexpr(Activation.MISH.value)
_LAPLACE = tl.constexpr(Activation.LAPLACE.value)

# The constants of `peftserve_kernels.activation`.
_LAPLACE_MU = tl.constexpr(0.707107)
_LAPLACE_SLOPE = tl.constexpr(1 / (0.282095 * math.sqrt(2)))


@triton.jit
def activate(kind, x):  # type: ignore[no-untyped-def]
    """f(x) for float32 x; kind: an `Activation`, the same for the whole program, so that the branch is uniform."""
    y = x
    if kind == _RELU:
        y = tl.where(x < 0.0, 0.0, x)
    elif kind == _GELU:
        y = _gelu(x)
    elif kind == _GELU_10:
        # never below -0.17
        y = _gelu(x)
        y = tl.where(y > 10.0, 10.0, y)
    elif kind == _GELU_TANH:
        # x (1 + tanh u) / 2 = x sigmoid(2 u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif kind == _QUICK_GELU:
        y = x * _sigmoid(1.702 * x)
    elif kind == _SILU:
        y = x * _sigmoid(x)
    elif kind == _LEAKY_RELU:
        y = tl.where(x < 0.0, 0.01 * x, x)
    elif kind == _RELU2:
        y = tl.where(x < 0.0, 0.0, x * x)
    elif kind == _RELU6:
        y = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif kind == _SIGMOID:
        y = _sigmoid(x)
    elif kind == _TANH:
        y = _tanh(x)
    elif kind == _MISH:
        # tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2), which is 1 in float32 long before e = exp(20)
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        y = x * (n / (n + 2.0))
    elif kind == _LAPLACE:
        y = 0.5 * (1.0 + tl.erf((x - _LAPLACE_MU) * _LAPLACE_SLOPE))
    return y


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """By an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Of |x| by its exponential, by its series near 0, where that would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    y = tl.where(size < 0.15, near, far)
    return tl.where(x < 0.0, -y, y)
