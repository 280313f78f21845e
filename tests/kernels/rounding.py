"""The tolerance of an op that computes in float32 and rounds once."""

import torch
from torch import Tensor
from torch.testing import assert_close


def assert_rounded_once(actual: Tensor, exact: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """`actual` is `exact` (float64) up to float32 error `rtol`, `atol` and, in a narrower dtype, half a last place.

    A second rounding on the way, or a narrow intermediate, is at least another half place off somewhere.
    """
    half_place = 0.0 if actual.dtype == torch.float32 else torch.finfo(actual.dtype).eps / 2
    assert_close(actual.double(), exact.double(), rtol=rtol + half_place, atol=atol)
