import pytest
import torch
from torch.testing import assert_close
from transformers.activations import ACT2FN

from peftserve_kernels import ACTIVATION_NAMES, Activation
from peftserve_kernels.activation import activate

X = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-8, 100.0, -100.0])])


# AdapterHub resolves its own spellings before it asks transformers
ADAPTERHUB_SPELLINGS = {"leakyrelu": "leaky_relu", "gelu_accurate": "gelu_accurate"}


@pytest.mark.parametrize("name", sorted(ACTIVATION_NAMES))
def test_against_transformers(name: str) -> None:
    oracle = ACT2FN[ADAPTERHUB_SPELLINGS.get(name, name)]
    assert_close(activate(Activation.from_name(name), X), oracle(X), rtol=1e-5, atol=1e-6)


def test_every_activation_has_a_name() -> None:
    assert {Activation.from_name(name) for name in ACTIVATION_NAMES} == set(Activation)


def test_names_in_any_case() -> None:
    assert Activation.from_name("ReLU") is Activation.RELU


@pytest.mark.parametrize("name", ["prelu", "", "softmax"])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"non_linearity: {name!r} is not one of gelu, .*tanh"):
        Activation.from_name(name)
