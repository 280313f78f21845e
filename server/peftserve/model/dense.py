"""The base model as plain float32 tensors, exactly as it is served: for oracles in tests, and for training."""

from pathlib import Path

import torch

from peftserve.model.checkpoint import Checkpoint
from peftserve.model.config_reader import read_spec
from peftserve.model.layout import expected_tensors
from peftserve_kernels.nf4 import dequantize_nf4


def dense_state(folder: Path) -> dict[str, torch.Tensor]:
    """Hugging Face state dict of the checkpoint in `folder`, float32 on the host, no `lm_head` when it is tied.

    Projections are their NF4 values, code * absmax; a full-precision checkpoint goes through NF4 as it would at load.
    """
    spec = read_spec(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(spec)
    state = {}
    for name, info in expected_tensors(spec).items():
        dense = dequantize_nf4(checkpoint.nf4(name)) if info.quantized else checkpoint.dense(name, torch.float32)
        state[name] = dense
    return state
