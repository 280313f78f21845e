from pathlib import Path

import pytest

from peftserve.text.tokenizer import Tokenizer
from tests.text import folders


@pytest.fixture(scope="package")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.byte_level(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="package")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer(byte_level_folder)


@pytest.fixture(scope="package")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(folders.sentencepiece(tmp_path_factory.mktemp("sentencepiece")))
