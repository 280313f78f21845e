import pytest
import torch

from peftserve_kernels import Segments


def test_host_and_device_agree() -> None:
    segments = Segments.build([2, 5, 5, 9], [4, 1, 0])
    assert segments.start.tolist() == [2, 5, 5, 9]
    assert segments.slot.tolist() == [4, 1, 0]
    assert segments.start.dtype == segments.slot.dtype == torch.int32
    assert segments.bounds == ((2, 5, 4), (5, 5, 1), (5, 9, 0))
    assert len(segments) == 3


def test_a_batch_without_adapters_is_false() -> None:
    segments = Segments.build([0], [])
    assert not segments
    assert segments.slot.shape == (0,)


@pytest.mark.parametrize(
    ("start", "slot", "message"),
    [([], [], "need 1 starts"), ([0, 1], [], "need 1 starts"), ([0, 3, 2], [0, 1], "not decrease"),
     ([-1, 2], [0], ">= 0"), ([0, 2], [-1], "slots must be >= 0")],
)  # fmt: skip
def test_faults(start: list[int], slot: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.build(start, slot)
