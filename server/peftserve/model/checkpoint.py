"""Reading a checkpoint folder tensor by tensor: safetensors, in one file or several, full precision or NF4."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peftserve.errors import ConfigurationError
from peftserve.model import nf4_format
from peftserve.model.layout import expected_tensors, raise_faults, shape_faults
from peftserve.model.spec import ModelSpec
from peftserve_kernels.nf4 import Nf4Weight, dequantize_nf4

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F32", "F16", "BF16"}
_UNMAP_BYTES = 4 << 20


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: those its index names, else model.safetensors, else the only one there is.

    Raises `ConfigurationError` when there are none or some are missing; pickled weights are refused by name.
    """
    if (folder / INDEX_FILE).is_file():
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"{folder / INDEX_FILE} is no index of weight files: {error!r}") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        absent = [name for name in names if name not in outside and not (folder / name).is_file()]
        faults = [f"{name!r} is not the name of a file in the folder" for name in outside]
        faults += [f"{name} is missing" for name in absent]
        if faults:
            raise ConfigurationError(f"{folder / INDEX_FILE}: " + "; ".join(faults), faults=faults)
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise ConfigurationError(f"{folder} holds {len(found)} safetensors files but no {INDEX_FILE}")
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickled:
        raise ConfigurationError(
            f"{folder} holds pickled weights ({', '.join(pickled[:3])}), which can run code when loaded; "
            "convert them to safetensors first (save_pretrained(..., safe_serialization=True))"
        )
    raise ConfigurationError(f"{folder} holds no safetensors weights")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{path} cannot be read as safetensors: {error}") from error


class _Window:
    """The one safetensors file that is mapped at the moment.

    Pages of a mapping count as this process's memory once read, until it is unmapped. So there is one mapping at a
    time, given up after every `_UNMAP_BYTES`: reading a checkpoint never holds much more of it than one tensor.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._handle: Any = None
        self._read_bytes = 0

    @contextmanager
    def tensor(self, path: Path, name: str) -> Iterator[torch.Tensor]:
        """The tensor in the mapping, for a block: what is to stay has to be copied."""
        if path != self._path or self._handle is None:
            self._handle = None
            self._handle, self._path, self._read_bytes = _open(path), path, 0
        tensor: torch.Tensor = self._handle.get_tensor(name)
        self._read_bytes += tensor.nbytes
        yield tensor
        if self._read_bytes > _UNMAP_BYTES:
            self._handle = None


class Checkpoint:
    """The tensors of a folder by name. What it returns is in memory of its own, on `device`, never a mapping."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.folder = folder
        self.device = device or torch.device("cpu")
        self._window = _Window()
        self._files: dict[str, Path] = {}
        self._infos: dict[str, tuple[str, tuple[int, ...]]] = {}  # dtype as in the header, shape
        for path in weight_files(folder):
            handle = _open(path)
            for name in handle.offset_keys():
                header = handle.get_slice(name)
                self._files[name] = path
                self._infos[name] = (header.get_dtype(), tuple(header.get_shape()))

    def check(self, spec: ModelSpec) -> None:
        """Compare with what `spec` needs. Raises one `ConfigurationError` that names every tensor at fault."""
        expected = expected_tensors(spec)
        shapes, faults = {}, []
        for name in self._infos:
            base, _, suffix = name.partition(".weight.")
            if suffix in (*nf4_format.SUFFIXES, nf4_format.FP4_SUFFIX) and f"{base}.weight" in self._infos:
                continue
            fault = self._storage_fault(name) if name in expected else None
            if fault is not None:
                faults.append(f"{name}: {fault}")
            # one fault a tensor: of one that cannot be read, the shape is not held against it as well
            shapes[name] = self._shape(name) if fault is None else expected[name].shape
        raise_faults(str(self.folder), faults + shape_faults(spec, shapes))
        dense = [name for name, info in expected.items() if info.quantized and not self.is_quantized(name)]
        if dense and any(self.is_quantized(name) for name in expected):
            logger.warning(
                "%s leaves %d projections unquantised (%s, ...); they are quantised to NF4 like the others",
                *(self.folder, len(dense), dense[0]),
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape before quantisation."""
        return self._state(name).shape if self.is_quantized(name) else self._infos[name][1]

    def _state(self, name: str) -> nf4_format.QuantState:
        key = f"{name}.{nf4_format.STATE_SUFFIX}"
        with self._window.tensor(self._files[key], key) as mapped:
            return nf4_format.read_state(mapped)

    def _storage_fault(self, name: str) -> str | None:
        if f"{name}.{nf4_format.FP4_SUFFIX}" in self._infos:
            return "quantised as fp4; only nf4 is supported"
        if self.is_quantized(name):
            needed = ["absmax", "quant_map"]
            if self._infos.get(f"{name}.absmax", ("", ()))[0] == "U8":
                needed += ["nested_absmax", "nested_quant_map"]
            absent = [part for part in needed if f"{name}.{part}" not in self._infos]
            try:
                self._state(name)
            except ConfigurationError as error:
                return error.message
            return f"{' and '.join(absent)} missing" if absent else None
        dtype = self._infos[name][0]
        if dtype not in _FLOATS:
            return f"dtype {dtype} without an NF4 quantisation state; supported are {', '.join(sorted(_FLOATS))}"
        return None

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor is stored in NF4."""
        return f"{name}.{nf4_format.STATE_SUFFIX}" in self._infos

    def dense(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor as it is stored, or converted to `dtype`; one stored in NF4 is dequantised."""
        if self.is_quantized(name):
            return dequantize_nf4(self.nf4(name), dtype or torch.float32)
        return self._stored(name, dtype)

    def nf4(self, name: str) -> Nf4Weight:
        """A matrix in NF4: as stored, or quantised now. Raises `ConfigurationError` that names the tensor."""
        try:
            if not self.is_quantized(name):
                with self._window.tensor(self._files[name], name) as mapped:
                    parts = nf4_format.quantize(mapped.to(self.device))
                return nf4_format.unpack(parts)
            keys = {suffix: f"{name}.{suffix}" for suffix in nf4_format.SUFFIXES if f"{name}.{suffix}" in self._infos}
            return nf4_format.unpack({part: self._stored(key) for part, key in {"": name, **keys}.items()})
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.folder}: {name}: {error.message}", faults=error.faults) from error

    def _stored(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        with self._window.tensor(self._files[name], name) as mapped:
            return mapped.to(device=self.device, dtype=dtype, copy=True)
