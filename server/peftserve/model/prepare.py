"""What `--model` names -> a checkpoint folder that is ready to serve.

Importing this is cheap: torch and transformers come in only when something has to be converted, so that the front end
can look for what is there (`find_prepared`) and leave conversions to a child process (`prepare`).
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from peftserve.errors import ConfigurationError
from peftserve.model.config_reader import read_spec
from peftserve.model.publish import publish_folder
from peftserve.model.stop_tokens import TOKENIZER_FILE

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The embedded default, by name."""

Progress = Callable[[str, int, int], None]
"""(what is being done, units done, units in all); units are bytes or tensors."""

_OLD_TOKENIZERS = ("tokenizer.model", "vocab.json", "tokenizer_config.json")
_CONVERSION = 1  # raise it when conversions come out differently, so that old ones are made anew


def models_dir(data_dir: Path) -> Path:
    """Where converted checkpoints are kept."""
    return data_dir.expanduser() / "models"


def default_folder(data_dir: Path) -> Path:
    """Where the embedded default is kept."""
    return models_dir(data_dir) / f"{DEFAULT_MODEL}.nf4-v{_CONVERSION}"


def find_prepared(model: str, data_dir: Path) -> Path | None:
    """The folder `prepare` would return, if nothing has to be made first; None otherwise.

    Raises `ConfigurationError` when `model` names nothing that exists.
    """
    target = _target(model, data_dir)
    return target if target.is_dir() else None


def prepare(model: str, data_dir: Path, progress: Progress | None = None) -> Path:
    """A folder with config.json, safetensors weights and tokenizer.json for `model`.

    The embedded default by name is fetched when it is absent; a GGUF file is converted once and kept under `data_dir`;
    a Hugging Face folder is used as it is (full precision is quantised at load), or through a folder of links beside a
    tokenizer.json made from older tokenizer files. Raises `ConfigurationError`, `UnsupportedModelError`.
    """
    target = _target(model, data_dir)
    if target.is_dir():
        return target
    if model == DEFAULT_MODEL:
        from peftserve.model.pull import pull

        return pull(data_dir, progress)
    source = Path(model).expanduser()
    if source.is_dir():
        return publish_folder(target, lambda folder: _link_with_tokenizer(source, folder))

    from peftserve.model.convert import convert_gguf

    return publish_folder(target, lambda folder: convert_gguf(source, folder, progress or _silent))


def _silent(what: str, done: int, total: int) -> None:
    """Progress for nobody."""


def _target(model: str, data_dir: Path) -> Path:
    """The folder to serve `model` from, whether it exists yet or not."""
    if model == DEFAULT_MODEL:
        return default_folder(data_dir)
    source = Path(model).expanduser()
    if source.is_dir():
        read_spec(source)
        if (source / TOKENIZER_FILE).is_file():
            return source
        if not any((source / name).is_file() for name in _OLD_TOKENIZERS):
            raise ConfigurationError(f"{source} has no {TOKENIZER_FILE} and no other tokenizer to make one from")
        return models_dir(data_dir) / _key(source, source / "config.json")
    if source.is_file():
        if source.suffix != ".gguf":
            raise ConfigurationError(f"{source} is not a model: give a folder, or a .gguf file")
        return models_dir(data_dir) / f"{_key(source, source)}.nf4-v{_CONVERSION}"
    raise ConfigurationError(
        f"no model {model!r}: give {DEFAULT_MODEL!r}, a folder in Hugging Face format, or a .gguf file", field="model"
    )


def _key(source: Path, stamped: Path) -> str:
    """A folder name for `source`: readable, and another one when the file `stamped` is replaced."""
    status = stamped.stat()
    identity = f"{source.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    readable = re.sub(r"[^a-z0-9.]+", "-", source.stem.lower()).strip("-.")[:40]
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _link_with_tokenizer(source: Path, folder: Path) -> None:
    from peftserve.model.tokenizer_files import write_from_folder

    write_from_folder(source, folder)
    for path in source.resolve().iterdir():
        if path.is_file() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
