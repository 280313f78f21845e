"""What `--model` may name, and what comes out."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from peftserve.errors import ConfigurationError, UnsupportedModelError
from peftserve.model.config_reader import read_spec
from peftserve.model.prepare import DEFAULT_MODEL, default_folder, find_prepared, prepare
from peftserve.model.weights import load_weights
from tests.model.test_gguf import write_gguf
from tests.tiny_models import make_checkpoint, make_tokenizer


def test_a_hugging_face_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    data = tmp_path / "data"
    assert find_prepared(str(folder), data) == folder
    assert prepare(str(folder), data) == folder
    assert not data.exists()


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "My Model.Q8.gguf")
    data = tmp_path / "data"
    assert find_prepared(str(path), data) is None
    progress: list[tuple[str, int, int]] = []
    folder = prepare(str(path), data, lambda *step: progress.append(step))
    assert folder.parent == data / "models"
    assert folder.name.startswith("my-model.q8-")
    assert {what for what, _, _ in progress} == {
        "reading My Model.Q8.gguf",
        "making the tokenizer",
        "quantising to NF4",
    }
    assert progress[-1][1] == progress[-1][2]
    assert (folder / "tokenizer.json").is_file()
    load_weights(folder, read_spec(folder), torch.float32, torch.device("cpu"))

    assert find_prepared(str(path), data) == folder
    inode = folder.stat().st_ino
    assert prepare(str(path), data) == folder
    assert folder.stat().st_ino == inode

    os.utime(path, ns=(1, 1))  # another file now
    assert find_prepared(str(path), data) is None


def test_a_gguf_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", drop="model.norm.weight")
    with pytest.raises(ConfigurationError, match=r"model\.norm\.weight: missing"):
        prepare(str(path), tmp_path / "data")
    assert [found for found in (tmp_path / "data" / "models").iterdir() if found.is_dir()] == []


def test_older_tokenizer_files_become_a_tokenizer_json_beside_links(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model.save(str(source))  # vocab.json and merges.txt
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}')
    data = tmp_path / "data"
    assert find_prepared(str(source), data) is None
    folder = prepare(str(source), data)
    assert folder.parent == data / "models"
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "model.safetensors").is_symlink()
    load_weights(folder, read_spec(folder), torch.float32, torch.device("cpu"))
    assert find_prepared(str(source), data) == folder

    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert made.encode("and one batch").ids == tokenizer.encode("and one batch")


def test_a_folder_without_any_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigurationError, match=r"no tokenizer\.json and no other tokenizer"):
        prepare(str(folder), tmp_path / "data")


def test_an_unsupported_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"silu"', '"gelu"')
    (folder / "config.json").write_text(config)
    with pytest.raises(UnsupportedModelError, match="gelu"):
        find_prepared(str(folder), tmp_path / "data")


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=DEFAULT_MODEL):
        prepare("meta-llama/Llama-3.1-8B", tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(ConfigurationError, match=r"a folder, or a \.gguf file"):
        prepare(str(tmp_path / "x.bin"), tmp_path)
    with pytest.raises(ConfigurationError, match=r"config\.json cannot be read"):
        prepare(str(tmp_path), tmp_path)


def test_the_default_is_used_when_it_is_there(tmp_path: Path) -> None:
    assert find_prepared(DEFAULT_MODEL, tmp_path) is None
    shutil.copytree(make_checkpoint("llama", tmp_path / "model"), default_folder(tmp_path))
    assert find_prepared(DEFAULT_MODEL, tmp_path) == default_folder(tmp_path)
    assert prepare(DEFAULT_MODEL, tmp_path) == default_folder(tmp_path)
