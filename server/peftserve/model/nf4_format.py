"""NF4 tensors as bitsandbytes serialises them (`Params4bit` in a state dict, what `load_in_4bit` models save).

A weight `W.weight` [N, K] is stored as

    W.weight                                 uint8 [N K / 2, 1], two codes a byte, the even element in the high nibble
    W.weight.quant_map                       float32 [16], the NF4 code book
    W.weight.absmax                          float32 [N K / 64], or uint8 codes of it when double-quantised
    W.weight.nested_absmax, .nested_quant_map   float32 [ceil(N K / 64 / 256)], [256]: double quantisation only
    W.weight.quant_state.bitsandbytes__nf4   uint8: JSON with quant_type, blocksize, shape, nested_offset, ...

Format: `QuantState.as_dict` in bitsandbytes/functional.py. Double quantisation: QLoRA (Dettmers et al. 2023), sec. 3.
"""

import logging
import math
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import msgspec
import torch

from peftserve.errors import ConfigurationError
from peftserve_kernels.nf4 import NF4_BLOCK, NF4_CODE, Nf4Weight

NESTED_BLOCK = 256
"""Absmax values that share one absmax of their own."""

STATE_SUFFIX = "quant_state.bitsandbytes__nf4"
FP4_SUFFIX = "quant_state.bitsandbytes__fp4"
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_SUFFIX)

_CHUNK_ELEMENTS = 1 << 18  # the quantiser takes about 16 bytes of scratch an element: 4 MiB, reused, stay in the cache


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`weight` [N, K], K a multiple of 64, quantised by bitsandbytes: NF4, blocks of 64, double-quantised absmax.

    Returns the packed codes under "" and the rest under `SUFFIXES`. Equal, bit for bit, to
    `quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)`, but in bounded scratch memory:
    blocks are independent, so rows go through in chunks, and only the absmax is quantised as a whole.
    Raises `ConfigurationError` when `weight` is not finite.
    """
    functional = _bitsandbytes()
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    # The results' places come first: kept one by one between the scratch memory of chunks, they would leave the
    # allocator with holes that the next chunk's does not fit in.
    packed = torch.empty((weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty((weight.shape[0], weight.shape[1] // NF4_BLOCK), device=weight.device)
    for into, scales, chunk in zip(*(torch.split(x, rows) for x in (packed, absmax, weight)), strict=True):
        codes, state = functional.quantize_4bit(chunk.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        into.copy_(codes.view_as(into))
        scales.copy_(state.absmax.view_as(scales))
    flat = absmax.flatten()
    if not torch.isfinite(flat).all():
        raise ConfigurationError("NaN or infinity")
    offset = flat.mean()
    nested, nested_state = functional.quantize_blockwise(flat - offset, blocksize=NESTED_BLOCK)
    full_state = functional.QuantState(
        absmax=nested,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=NF4_BLOCK,
        code=state.code,
        quant_type="nf4",
        offset=offset,
        state2=nested_state,
    )
    return {"": packed.view(-1, 1), **full_state.as_dict(packed=True)}


def _bitsandbytes() -> Any:
    """bitsandbytes' functions, imported when something has to be quantised: the import takes seconds."""
    # On CPUs with AVX512_BF16 it warns at import that a matmul kernel of another package is absent; only its quantiser
    # is used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Its ops bring in torch's compiler, and that needs what the engine process spares the import of torch.
    import_module("torch._meta_registrations")
    from bitsandbytes import functional

    return functional


class QuantState(msgspec.Struct):
    """The JSON in a `quant_state` tensor. `shape` [N, K]; `nested_*` with double quantisation only."""

    quant_type: str
    blocksize: Annotated[int, msgspec.Meta(gt=0, multiple_of=NF4_BLOCK)]
    shape: tuple[Annotated[int, msgspec.Meta(gt=0)], Annotated[int, msgspec.Meta(gt=0, multiple_of=NF4_BLOCK)]]
    nested_blocksize: Annotated[int, msgspec.Meta(gt=0)] = NESTED_BLOCK
    nested_offset: float = 0.0


def read_state(raw: torch.Tensor) -> QuantState:
    """What a `quant_state` tensor (uint8, host) says. Raises `ConfigurationError` when it is faulty or unsupported."""
    try:
        state = msgspec.json.decode(raw.numpy().tobytes(), type=QuantState)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"quantisation state: {error}") from error
    if state.quant_type != "nf4":
        raise ConfigurationError(f"quantisation state: quant_type {state.quant_type!r}; only nf4 is supported")
    return state


def unpack(parts: Mapping[str, torch.Tensor]) -> Nf4Weight:
    """The weight that `parts` (keys as in `quantize`) describes, its absmax flattened to float32.

    The absmax is computed as bitsandbytes does it, code[q] * nested_absmax + offset in float32. Blocks of a larger
    multiple of 64 (bitsandbytes' default on some GPUs) become blocks of 64 without loss, by repeating their absmax.
    Any `bnb_4bit_quant_storage` is read: it is only another view of the same bytes.
    Raises `ConfigurationError` when the parts do not fit together.
    """
    state = read_state(parts[STATE_SUFFIX].cpu())
    if not torch.equal(parts["quant_map"].float().cpu(), torch.tensor(NF4_CODE)):
        raise ConfigurationError("quant_map is not the NF4 code book")
    rows, columns = state.shape
    packed = parts[""].contiguous().flatten().view(torch.uint8)
    absmax = _absmax(parts, state)
    if packed.numel() * 2 != rows * columns or absmax.numel() != math.ceil(rows * columns / state.blocksize):
        raise ConfigurationError(
            f"{packed.numel()} bytes of codes and {absmax.numel()} absmax values are no {rows} x {columns} matrix"
        )
    if not torch.isfinite(absmax).all():
        raise ConfigurationError("NaN or infinity")
    absmax = absmax.repeat_interleave(state.blocksize // NF4_BLOCK)[: rows * columns // NF4_BLOCK]
    return Nf4Weight(packed.view(rows, columns // 2), absmax.view(rows, columns // NF4_BLOCK))


def _absmax(parts: Mapping[str, torch.Tensor], state: QuantState) -> torch.Tensor:
    stored = parts["absmax"].flatten()
    if "nested_absmax" not in parts:
        return stored.float()
    values = parts["nested_quant_map"].float()[stored.long()]
    scales = parts["nested_absmax"].float().repeat_interleave(state.nested_blocksize)[: values.numel()]
    if scales.numel() != values.numel():
        raise ConfigurationError(f"nested_absmax covers {scales.numel()} of {values.numel()} absmax values")
    return values * scales + state.nested_offset
