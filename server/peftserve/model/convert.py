"""GGUF -> a folder that is ready to serve: NF4 safetensors, config.json and the tokenizer's files."""

from functools import partial
from pathlib import Path

from peftserve.model.checkpoint import Checkpoint
from peftserve.model.checkpoint_writer import write_nf4_checkpoint
from peftserve.model.config_reader import parse_config, read_spec
from peftserve.model.gguf_file import GgufFile
from peftserve.model.layout import expected_tensors, raise_faults, shape_faults
from peftserve.model.prepare import Progress
from peftserve.model.tokenizer_files import write_from_gguf


def convert_gguf(path: Path, folder: Path, progress: Progress) -> None:
    """Write the model in `path` into the empty `folder`, and read it back.

    Peak memory is the NF4 checkpoint (or a shard of 2 GiB of it) plus one float32 tensor. Raises `ConfigurationError`
    with every tensor at fault, `UnsupportedModelError` for a model that the decoder does not implement.
    """
    progress(f"reading {path.name}", 0, 1)
    file = GgufFile(path)
    progress(f"reading {path.name}", 1, 1)
    spec = parse_config(file.config, where=str(path))
    raise_faults(str(path), shape_faults(spec, file.shapes))
    progress("making the tokenizer", 0, 1)
    write_from_gguf(file, folder)
    progress("making the tokenizer", 1, 1)
    write_nf4_checkpoint(file, spec, file.config, folder, on_tensor=partial(progress, "quantising to NF4"))
    _verify(folder)


def _verify(folder: Path) -> None:
    """Every tensor is there, well-formed and finite, as the loader will see it. Raises `ConfigurationError`."""
    spec = read_spec(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(spec)
    for name, info in expected_tensors(spec).items():
        if info.quantized:
            checkpoint.nf4(name)
        elif not checkpoint.dense(name).isfinite().all():
            raise_faults(str(folder), [f"{name}: NaN or infinity"])
