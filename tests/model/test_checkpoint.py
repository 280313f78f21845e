"""Finding and opening the weight files of a folder."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peftserve.errors import ConfigurationError
from peftserve.model import checkpoint as checkpoint_module
from peftserve.model.checkpoint import Checkpoint, weight_files


def _save(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors or {"a": torch.zeros(1)}, path)


def test_the_index_decides(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors", "model.safetensors"):
        _save(tmp_path / name)
    index = {"weight_map": {"a": "y.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in weight_files(tmp_path)] == ["x.safetensors", "y.safetensors"]


def test_without_an_index_one_file_is_enough(tmp_path: Path) -> None:
    _save(tmp_path / "weights.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["weights.safetensors"]
    _save(tmp_path / "more.safetensors")
    with pytest.raises(ConfigurationError, match=r"2 safetensors files but no model\.safetensors\.index\.json"):
        weight_files(tmp_path)
    _save(tmp_path / "model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match="no index of weight files"):
        weight_files(tmp_path)


def test_missing_shards_and_paths_in_the_index_are_all_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "1.safetensors", "b": "../2.safetensors", "c": "3.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError) as caught:
        weight_files(tmp_path)
    assert caught.value.faults == [
        "'../2.safetensors' is not the name of a file in the folder",
        "1.safetensors is missing",
        "3.safetensors is missing",
    ]


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match=r"pickled weights \(pytorch_model\.bin\)"):
        weight_files(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no safetensors weights"):
        weight_files(tmp_path)


def test_a_pickle_named_safetensors_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        Checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=torch.zeros(64, 64))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        Checkpoint(tmp_path)


def test_tensors_do_not_depend_on_the_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_UNMAP_BYTES", 0)
    wanted = {name: torch.randn(8, 8) for name in "abc"}
    _save(tmp_path / "model.safetensors", **wanted)
    checkpoint = Checkpoint(tmp_path)
    read = {name: checkpoint.dense(name) for name in "abcba"}
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert checkpoint.folder == tmp_path


def test_dense_converts(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=torch.tensor([1.00390625, 3.0]))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.dense("a").dtype == torch.float32
    assert torch.equal(checkpoint.dense("a", torch.bfloat16), torch.tensor([1.0, 3.0], dtype=torch.bfloat16))
