"""Fixtures that more than one package of tests uses."""

import os
from pathlib import Path

import pytest

# Tests compute tiny things, several processes at once: more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run under its interpreter, on CPU tensors; read when their module is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer, as a Hugging Face folder that the engine quantises at load."""
    from tests.tiny_models import make_checkpoint

    return make_checkpoint("llama", tmp_path_factory.mktemp("tiny") / "llama")
