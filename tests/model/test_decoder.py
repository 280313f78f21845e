"""What the decoder derives from a spec: rotary tables, attention windows, and where LoRA outputs lie."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peftserve.errors import UnsupportedModelError
from peftserve.model.config_reader import read_spec
from peftserve.model.decoder import attention_windows, lora_slices
from peftserve.model.rope import inverse_frequencies, rope_table
from peftserve.model.spec import RopeScaling, targets
from tests import tiny_models
from tests.adapters.files import SPEC

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["llama", "llama_llama3_rope", "llama_linear_rope", "qwen3"])
def test_rope_is_transformers(variant: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(variant, tmp_path)
    spec = read_spec(folder)
    positions = torch.arange(300)
    rotary: Any = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1), positions[None])
    half = spec.head_dim // 2
    table = rope_table(spec, 300, CPU)
    assert table.shape == (300, spec.head_dim)
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=2e-5)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=2e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=8192)
    spec = msgspec.structs.replace(SPEC, head_dim=128, rope_theta=5e5)
    plain = inverse_frequencies(spec)
    scaled = inverse_frequencies(msgspec.structs.replace(spec, rope_scaling=scaling))
    ratio = plain / scaled
    torch.testing.assert_close(ratio[:20], torch.ones(20))
    torch.testing.assert_close(ratio[-20:], torch.full((20,), 8.0))
    assert bool((ratio.diff() >= -1e-5).all())


def test_unknown_scaling_is_refused() -> None:
    spec = msgspec.structs.replace(SPEC, rope_scaling=RopeScaling(kind="yarn", factor=2.0))
    with pytest.raises(UnsupportedModelError, match="'yarn' is not supported"):
        inverse_frequencies(spec)


def test_windows() -> None:
    assert attention_windows(SPEC) == (None, None, None)
    every = msgspec.structs.replace(SPEC, sliding_window=8)
    assert attention_windows(every) == (8, 8, 8)
    some = msgspec.structs.replace(SPEC, sliding_window=8, sliding_layers=(False, True, False))
    assert attention_windows(some) == (None, 8, None)


def test_lora_slices_tile_the_merged_projections() -> None:
    merged = lora_slices(SPEC)
    assert [piece.target for group in merged for piece in group] == [target.index for target in targets(SPEC)]
    for group in merged:
        end = 0
        for piece in group:
            target = targets(SPEC)[piece.target]
            assert (piece.out_offset, piece.in_features) == (end, target.in_features)
            end += piece.out_features
            assert piece.out_features == target.out_features
