import pytest
import torch
from torch.testing import assert_close
from transformers.activations import ACT2FN

from peftserve_kernels import Activation
from peftserve_kernels.activation import activate

X = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-8, 100.0, -100.0])])

# where transformers' name is not the enum's in lower case
TRANSFORMERS_NAMES = {Activation.GELU_TANH: "gelu_new"}


@pytest.mark.parametrize("kind", Activation)
def test_against_transformers(kind: Activation) -> None:
    oracle = ACT2FN[TRANSFORMERS_NAMES.get(kind, kind.name.lower())]
    assert_close(activate(kind, X), oracle(X), rtol=1e-5, atol=1e-6)


def test_the_numbers_are_stored_in_device_tables_and_must_not_move() -> None:
    assert [kind.value for kind in Activation] == list(range(14))
    assert (Activation.LINEAR, Activation.SILU, Activation.LAPLACE) == (0, 6, 13)
