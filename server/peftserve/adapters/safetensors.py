"""Reader of untrusted safetensors bytes.

Format (github.com/huggingface/safetensors, "Format"): 8 bytes header size N, unsigned little-endian; N bytes of UTF-8
JSON `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`; then the data, which the
offsets cover without holes or overlaps. Every claim of the header is checked against a cap or against the file before
it is used, and nothing is copied: tensors are views.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from peftserve.adapters import strict_json
from peftserve.adapters.faults import FaultList, quote, refusal

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_NAME_CHARS = 512
MAX_DIMS = 8
MAX_METADATA_ENTRIES = 1_000

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The dtypes that are read, by their safetensors names."""

_FINITE_CHUNK = 1 << 20
# The exponent bits of each dtype: all ones mean NaN or infinity (IEEE 754; BF16 is the upper half of F32).
_EXPONENT: dict[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}

_NO_PICKLE = (
    "pickles can run code and are never read; save the adapter as safetensors "
    "(PEFT: save_pretrained(..., safe_serialization=True), AdapterHub: save_adapter(..., use_safetensors=True))"
)
_OTHER_FILES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"the weights are a PyTorch checkpoint (a zip with a pickle in it), not safetensors: {_NO_PICKLE}"),
    (b"\x80", f"the weights are a pickle, not safetensors: {_NO_PICKLE}"),
    (b"GGUF", "the weights are a GGUF file; adapters are read as safetensors only"),
    (b"version https://git-lfs", "the weights are a Git LFS pointer, not the file itself; run `git lfs pull` first"),
)

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, eq=False)
class TensorView:
    """A tensor in somebody else's memory. `raw` holds its elements, row-major, little-endian, perhaps unaligned."""

    dtype: str
    shape: tuple[int, ...]
    raw: memoryview

    @classmethod
    def from_array(cls, array: npt.NDArray[np.float32]) -> Self:
        """A view of a float32 array."""
        flat = np.ascontiguousarray(array, dtype="<f4")
        return cls("F32", array.shape, flat.reshape(-1).view(np.uint8).data)

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as a new, aligned, writable float32 array of `shape`; exact for every dtype that is read."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.raw, "<u2").astype(np.uint32)
            bits <<= 16
            return bits.view(np.float32).reshape(self.shape)
        stored = np.frombuffer(self.raw, "<f4" if self.dtype == "F32" else "<f2")
        return stored.astype(np.float32).reshape(self.shape)

    def num_not_finite(self) -> int:
        """How many values are NaN or infinite. Works in chunks: at most 8 MiB are taken beside the data."""
        kind, exponent = _EXPONENT[self.dtype]
        bits = np.frombuffer(self.raw, kind)
        count = 0
        for begin in range(0, bits.size, _FINITE_CHUNK):
            chunk = bits[begin : begin + _FINITE_CHUNK] & exponent
            count += int(np.count_nonzero(chunk == exponent))
        return count


def read(data: Buffer) -> dict[str, TensorView]:
    """The tensors in `data`, by name; views, so `data` lives as long as they do.

    Raises `InvalidAdapterError` with all faults found.
    """
    view = memoryview(data).cast("B")
    header_bytes = _header_bytes(view)
    body = view[8 + header_bytes :]
    try:
        header = strict_json.parse_object(bytes(view[8 : 8 + header_bytes]))
    except ValueError as error:
        raise refusal(f"the safetensors header is broken: {error}") from None

    faults = FaultList()
    _check_metadata(header.pop("__metadata__", {}), faults)
    if len(header) > MAX_TENSORS:
        raise refusal(f"the safetensors file holds {len(header)} tensors, the limit is {MAX_TENSORS}")
    entries = dict(_entries(header, faults))
    if faults:
        raise faults.error()
    _check_layout(entries, body.nbytes)
    return {name: TensorView(dtype, shape, body[begin:end]) for name, (dtype, shape, begin, end) in entries.items()}


def _header_bytes(view: memoryview) -> int:
    if view.nbytes == 0:
        raise refusal("the weights file is empty")
    size = int.from_bytes(view[:8], "little")
    looks_right = view.nbytes >= 8 and size <= MAX_HEADER_BYTES and bytes(view[8:9]) == b"{"
    if not looks_right:
        start = bytes(view[:32])
        for magic, text in _OTHER_FILES:
            if start.startswith(magic):
                raise refusal(text)
    if view.nbytes < 8:
        raise refusal(f"the weights are not safetensors: {view.nbytes} bytes, shorter than any header")
    if size > MAX_HEADER_BYTES:
        raise refusal(
            f"the weights are not safetensors: a header of {size} bytes is announced, the limit is {MAX_HEADER_BYTES}"
        )
    if size > view.nbytes - 8:
        raise refusal(
            f"the weights file ends within its header: {size} bytes are announced, {view.nbytes - 8} are there"
        )
    return size


def _check_metadata(value: Any, faults: FaultList) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        faults.add("the safetensors header's __metadata__ must map strings to strings")
    elif len(value) > MAX_METADATA_ENTRIES:
        faults.add(f"the safetensors header's __metadata__ has {len(value)} entries, limit {MAX_METADATA_ENTRIES}")


_Entry: TypeAlias = tuple[str, tuple[int, ...], int, int]


def _entries(header: Mapping[str, Any], faults: FaultList) -> Iterator[tuple[str, _Entry]]:
    for name, value in header.items():
        where = f"tensor {quote(name)}"
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
            faults.add(f"{where}: the name must have 1 to {MAX_NAME_CHARS} printable characters")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            faults.add(f"{where}: the safetensors header must give dtype, shape and data_offsets, and nothing else")
            continue
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            faults.add(f"{where}: dtype {quote(str(dtype))} is not supported; save it as F32, F16 or BF16")
        elif not _sizes(shape, MAX_DIMS):
            faults.add(f"{where}: the shape must be a list of at most {MAX_DIMS} sizes")
        elif not _sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
            faults.add(f"{where}: data_offsets must be [begin, end] with begin <= end")
        elif (need := math.prod(shape) * ITEM_BYTES[dtype]) != offsets[1] - offsets[0]:
            faults.add(
                f"{where}: {dtype} of shape {shape} takes {need} bytes, but data_offsets give {offsets[1] - offsets[0]}"
            )
        else:
            yield name, (dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any, max_length: int) -> bool:
    """Whether it is a short list of sizes. 2^48 bounds what a product can cost; no file is larger."""
    return (
        isinstance(value, list)
        and len(value) <= max_length
        and all(type(item) is int and 0 <= item <= 1 << 48 for item in value)
    )


def _check_layout(entries: Mapping[str, _Entry], body_bytes: int) -> None:
    """The tensors follow each other from the first byte of the data to the last."""
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < position:
            raise refusal(f"tensor {quote(name)}: its data overlap another tensor's (bytes {begin} to {position})")
        if begin > position:
            raise refusal(f"tensor {quote(name)}: bytes {position} to {begin} before it belong to no tensor")
        position = end
    if position > body_bytes:
        raise refusal(
            f"the weights file is cut off: its header describes {position} bytes of tensors, {body_bytes} are there"
        )
    if position < body_bytes:
        raise refusal(f"the weights file has {body_bytes - position} bytes after its last tensor")
