"""The two files of an adapter on this side, and reading them for an upload with progress."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peftserve_client.errors import AdapterFilesError

CONFIG_NAME = "adapter_config.json"
# PEFT's name, AdapterHub's name.
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter.safetensors")

Progress = Callable[[int, int], None]  # bytes sent so far, bytes in all; starts again at 0 when the upload is retried


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """`adapter_config.json` as bytes, and the safetensors file, opened anew by each attempt to send it."""

    config: bytes
    weights: bytes | Path
    weights_size: int

    @classmethod
    def read(cls, source: str | Path | tuple[bytes, bytes]) -> "AdapterFiles":
        """From a folder as PEFT or AdapterHub save it, or from (config, weights) in memory.

        Raises `AdapterFilesError` when a file is missing or more than one could be meant.
        """
        if isinstance(source, tuple):
            config, weights = source
            return cls(config, weights, len(weights))
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise AdapterFilesError(f"{folder}: no such folder")
        path = _weights_in(folder)
        try:
            return cls((folder / CONFIG_NAME).read_bytes(), path, path.stat().st_size)
        except OSError as error:
            raise AdapterFilesError(f"{error.filename}: {error.strerror}") from None

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return len(self.config) + self.weights_size

    def open(self, progress: Progress | None = None) -> "ProgressReader":
        """The weights from their beginning; `progress` is told as they are read. Close it after use."""
        try:
            raw = io.BytesIO(self.weights) if isinstance(self.weights, bytes) else self.weights.open("rb")
        except OSError as error:
            raise AdapterFilesError(f"{error.filename}: {error.strerror}") from None
        return ProgressReader(raw, self.size, len(self.config), progress)


class ProgressReader(io.BufferedIOBase):
    """A file that reports how much of it was read."""

    def __init__(self, raw: io.BufferedIOBase, total: int, already: int, progress: Progress | None) -> None:
        self._raw = raw
        self._total = total
        self._already = already
        self._progress = progress or (lambda done, total: None)

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._raw.read(size)
        self._progress(self._already + self._raw.tell(), self._total)
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """The rest of the file in pieces of at most `size` bytes."""
        while data := self.read(size):
            yield data

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()
        super().close()


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    # AdapterHub writes the base model's own head beside the adapter.
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("model_head"))
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterFilesError(f"{folder}: which file is meant? {', '.join(path.name for path in found)}")
    binary = next((path for path in sorted(folder.glob("*.bin"))), None)
    hint = f"; {binary.name} is a pickle, convert it to safetensors first" if binary else ""
    raise AdapterFilesError(f"{folder}: no {WEIGHT_NAMES[0]}{hint}")
