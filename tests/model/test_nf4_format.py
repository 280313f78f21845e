"""NF4 tensors against bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch

from peftserve.errors import ConfigurationError
from peftserve.model import nf4_format
from peftserve.model.nf4_format import STATE_SUFFIX, quantize, unpack
from peftserve_kernels.nf4 import dequantize_nf4


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (300, 128)])
def test_quantize_equals_bitsandbytes_in_one_piece(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4_format, "_CHUNK_ELEMENTS", 1024)  # several chunks
    weight = _weight(*shape, dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    wanted = {"": packed, **state.as_dict(packed=True)}
    parts = quantize(weight)
    assert set(parts) == set(wanted)
    for name, part in parts.items():
        assert torch.equal(part, wanted[name]), name


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [64, 128])
def test_unpack_equals_bitsandbytes_dequantiser(nested: bool, storage: torch.dtype, block: int) -> None:
    weight = _weight(96, 256)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    loaded = unpack({"": packed, **state.as_dict(packed=True)})
    assert loaded.shape == (96, 256)
    assert torch.equal(dequantize_nf4(loaded), bnb.dequantize_4bit(packed, state))


def test_blocks_that_cross_rows_keep_their_absmax() -> None:
    # 3 rows of 192 in blocks of 128: the second block lies half in row 0, half in row 1, the last is a half.
    # (bitsandbytes' own CPU dequantiser is wrong for these, so the oracle is its flat quantiser.)
    weight = _weight(3, 192)
    packed, state = bnb.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    flat, flat_state = bnb.quantize_4bit(weight.reshape(1, -1), blocksize=128, quant_type="nf4")
    loaded = unpack({"": packed, **state.as_dict(packed=True)})
    blocks = torch.nn.functional.pad(weight.flatten(), (0, 64)).view(-1, 128)
    assert torch.equal(loaded.absmax.flatten(), blocks.abs().amax(1).repeat_interleave(2)[:9])
    assert torch.equal(packed, flat)
    assert torch.equal(state.absmax, flat_state.absmax)


def test_the_error_of_nf4_is_that_of_the_format() -> None:
    weight = _weight(256, 256)
    error = (dequantize_nf4(unpack(quantize(weight))) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12  # QLoRA's figure for normal weights is near 0.095


def test_codes_that_are_not_nf4_are_refused() -> None:
    packed, state = bnb.quantize_4bit(_weight(4, 64), quant_type="fp4")
    parts = {"": packed, **state.as_dict(packed=True)}
    parts[STATE_SUFFIX] = parts.pop("quant_state.bitsandbytes__fp4")
    with pytest.raises(ConfigurationError, match="quant_type 'fp4'"):
        unpack(parts)


@pytest.mark.parametrize(
    ("name", "part", "fault"),
    [
        ("quant_map", torch.zeros(16), "code book"),
        ("quant_map", torch.zeros(3), "code book"),
        ("", torch.zeros(5, 1, dtype=torch.uint8), "5 bytes of codes"),
        ("absmax", torch.zeros(3, dtype=torch.uint8), "3 absmax values"),
        ("nested_absmax", torch.zeros(0), "nested_absmax covers 0 of 4"),
        ("nested_absmax", torch.full((1,), float("nan")), "NaN or infinity"),
        (STATE_SUFFIX, torch.tensor(list(b"{"), dtype=torch.uint8), "quantisation state"),
        (STATE_SUFFIX, torch.tensor(list(b"[]"), dtype=torch.uint8), "quantisation state"),
        (
            STATE_SUFFIX,
            torch.tensor(list(b'{"quant_type":"nf4","blocksize":32,"shape":[4,64]}'), dtype=torch.uint8),
            "blocksize",
        ),
        (
            STATE_SUFFIX,
            torch.tensor(list(b'{"quant_type":"nf4","blocksize":64,"shape":[4,60]}'), dtype=torch.uint8),
            "shape",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, part: torch.Tensor, fault: str) -> None:
    parts = quantize(_weight(4, 64))
    parts[name] = part
    with pytest.raises(ConfigurationError, match=fault):
        unpack(parts)
