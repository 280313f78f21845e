import bitsandbytes.functional
import pytest
import torch

from peftserve_kernels import NF4_CODE, Nf4Layout, Nf4Weight, dequantize_nf4
from tests.kernels.nf4_oracle import quantize


def test_the_table_is_bitsandbytes() -> None:
    oracle = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")  # type: ignore[no-untyped-call]
    assert torch.equal(torch.tensor(NF4_CODE), oracle)


@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (7, 192), (33, 576), (5, 1536), (256, 128)])
def test_bit_equal_to_bitsandbytes(shape: tuple[int, int]) -> None:
    weight, oracle = quantize(torch.randn(shape) * 0.05)
    assert weight.shape == shape
    assert torch.equal(dequantize_nf4(weight), oracle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_to_a_narrow_dtype(dtype: torch.dtype) -> None:
    weight, oracle = quantize(torch.randn(9, 128))
    assert torch.equal(dequantize_nf4(weight, dtype), oracle.to(dtype))


def test_zero_blocks_and_large_scales() -> None:
    dense = torch.randn(2, 128)
    dense[0, :64] = 0.0
    dense[1, 64:] *= 1e4
    weight, oracle = quantize(dense)
    assert torch.equal(dequantize_nf4(weight), oracle)


def test_stacking_tensors_with_statistics_of_their_own_is_lossless() -> None:
    parts = [quantize(torch.randn(rows, 192) * scale) for rows, scale in ((5, 1.0), (3, 0.01), (1, 30.0))]
    stacked = Nf4Weight.cat([weight for weight, _ in parts])
    assert stacked.shape == (9, 192)
    assert stacked.nbytes == 9 * 96 + 9 * 3 * 4
    assert torch.equal(dequantize_nf4(stacked), torch.cat([oracle for _, oracle in parts]))
    assert torch.equal(dequantize_nf4(stacked.rows(5, 8)), parts[1][1])


def test_faults() -> None:
    packed, absmax = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="K must be a multiple of 64, got 80"):
        Nf4Weight(torch.zeros(2, 40, dtype=torch.uint8), absmax)
    with pytest.raises(ValueError, match="packed: must be uint8"):
        Nf4Weight(packed.int(), absmax)
    with pytest.raises(ValueError, match=r"absmax: must be float32 \[2, 1\]"):
        Nf4Weight(packed, absmax.double())
    with pytest.raises(ValueError, match=r"absmax: must be float32 \[2, 1\]"):
        Nf4Weight(packed, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="same K"):
        Nf4Weight.cat([Nf4Weight(packed, absmax), Nf4Weight(torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2))])
    with pytest.raises(ValueError, match="same K"):
        Nf4Weight.cat([])


@pytest.mark.parametrize("shape", [(16, 64), (48, 192)])
def test_tiles_hold_the_same_weight(shape: tuple[int, int]) -> None:
    weight, oracle = quantize(torch.randn(shape))
    tiled = weight.tiled()
    assert tiled.layout is Nf4Layout.TILES
    assert (tiled.shape, tiled.nbytes) == (weight.shape, weight.nbytes)
    assert torch.equal(dequantize_nf4(tiled), oracle)
    assert torch.equal(tiled.row_major().packed, weight.packed)
    assert torch.equal(dequantize_nf4(Nf4Weight.cat([tiled, tiled])), torch.cat([oracle, oracle]))
    assert torch.equal(dequantize_nf4(tiled.rows(0, 16)), oracle[:16])


def test_the_order_of_bytes_in_a_tile() -> None:
    weight, _ = quantize(torch.randn(32, 64))
    words = weight.tiled().packed.view(torch.int32).view(2, 8, 16)
    rows = weight.packed.view(torch.int32)
    assert words[1, 3, 5] == rows[21, 3]


def test_faults_of_tiles() -> None:
    weight, _ = quantize(torch.randn(24, 64))
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        weight.tiled()
    tiled = quantize(torch.randn(32, 64))[0].tiled()
    with pytest.raises(ValueError, match="starts at a multiple of 16, got 8"):
        tiled.rows(8, 24)
    with pytest.raises(ValueError, match="same K and layout"):
        Nf4Weight.cat([tiled, weight])


@pytest.mark.parametrize("rows", [1, 24, 31])
def test_padding_is_no_part_of_the_weight(rows: int) -> None:
    weight, oracle = quantize(torch.randn(rows, 128))
    padded = weight.padded()
    assert padded.padding == -rows % 16
    for stored in (padded, padded.tiled(), padded.blocked(), padded.tiled().blocked(), padded.blocked().tiled()):
        assert stored.shape == weight.shape
        assert stored.packed.shape[0] == rows + padded.padding
        assert not stored.row_major().padding
        assert torch.equal(dequantize_nf4(stored), oracle)
        with pytest.raises(ValueError, match="has no views"):
            stored.rows(0, 16)
        with pytest.raises(ValueError, match="before they are padded"):
            Nf4Weight.cat([stored, stored])
    with pytest.raises(ValueError, match="padding: must be fewer rows than a tile's 16, got 16"):
        Nf4Weight(padded.packed, padded.absmax, padding=16)
