import pytest
import torch

from peftserve_kernels import copy_pages


def caches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(4, 2, 16, 8), torch.randn(4, 2, 16, 8)) for _ in range(3)]


@pytest.mark.parametrize("tokens", [0, 1, 5, 16])
def test_the_beginning_of_the_page_in_every_layer_and_nothing_else(tokens: int) -> None:
    layers = caches()
    before = [(k.clone(), v.clone()) for k, v in layers]
    copy_pages(layers, src=3, dst=1, num_tokens=tokens)
    for pair, old_pair in zip(layers, before, strict=True):
        for cache, old in zip(pair, old_pair, strict=True):
            assert torch.equal(cache[1, :, :tokens], old[3, :, :tokens])
            assert torch.equal(cache[1, :, tokens:], old[1, :, tokens:])
            assert torch.equal(cache[[0, 2, 3]], old[[0, 2, 3]])


@pytest.mark.parametrize(("src", "dst", "tokens"), [(4, 0, 1), (0, -1, 1), (0, 1, 17)])
def test_faults(src: int, dst: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="outside 4 pages of 16"):
        copy_pages(caches(), src, dst, tokens)
