"""Fixtures that more than one package of tests uses."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, as a Hugging Face folder that the engine quantises at load."""
    from tests.tiny_models import make_checkpoint

    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny") / "llama")
