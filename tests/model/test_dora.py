"""DoRA's row scales: against the definition on the dense weights of the base, and through the adapter memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from peftserve.adapters.formats.parsed import LoraModule
from peftserve.adapters.safetensors import TensorView
from peftserve.errors import AdapterLoadError
from peftserve.model.config_reader import read_spec
from peftserve.model.dense import dense_state
from peftserve.model.dora import RowScales
from peftserve.model.layout import has_bias, module_name
from peftserve.model.spec import targets
from peftserve.model.weights import load_weights
from peftserve.types import AdapterKind
from tests import tiny_models
from tests.model import oracle
from tests.model.driver import Driver, Job

# PEFT 0.21 reads a property that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CPU = torch.device("cpu")


def floats(*shape: int) -> TensorView:
    return TensorView.from_array(np.random.default_rng(sum(shape)).standard_normal(shape, np.float32))


# Rows of several products are merged; 20 rows of keys are no whole tiles of 16, and 320 are more than a piece.
@pytest.mark.parametrize(
    "sizes",
    [{}, {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 20}, {"intermediate_size": 320}],
)
def test_the_definition(sizes: dict[str, int], tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("qwen3_bias", tmp_path, seed=3, **sizes)
    spec, dense = read_spec(folder), dense_state(folder)
    scales = RowScales(load_weights(folder, spec, torch.float32, CPU), spec)
    for layer in (0, spec.num_layers - 1):
        for target in targets(spec):
            a, b = floats(3, target.in_features), floats(target.out_features, 3)
            module = LoraModule(rank=3, scale=0.25, a=a, b=b, magnitude=floats(target.out_features))
            assert module.magnitude is not None
            got = scales.of(layer, target.index, module, module.magnitude)
            name = module_name(layer, target.name)
            weight = dense[f"{name}.weight"].double().numpy()
            norms = np.linalg.norm(weight + 0.25 * b.float32().astype(np.float64) @ a.float32(), axis=1)
            excess = module.magnitude.float32() / norms - 1
            bias = dense[f"{name}.bias"].numpy() if has_bias(spec, target.name) else np.zeros(len(excess))
            expected = np.concatenate([excess, -excess * bias])
            assert got.shape == expected.shape
            np.testing.assert_allclose(got.float32(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def driver(folder: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(folder, page_size=8, store=tmp_path / "store", dtype=torch.bfloat16)
    yield driver
    driver.close()


def test_a_row_that_becomes_zero_is_an_error(folder: Path, base: Any, driver: Driver, tmp_path: Path) -> None:
    saved = oracle.save_lora(base, tmp_path / "zero", rank=64, targets="qv", seed=1, dora=True)
    arrays = load_file(saved / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.2.self_attn.v_proj"
    arrays[f"{stem}.lora_A.weight"] = np.eye(64, dtype=np.float32)
    arrays[f"{stem}.lora_B.weight"][5] = -dense_state(folder)["model.layers.2.self_attn.v_proj.weight"][5] / 2
    save_file(arrays, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterLoadError, match=r"scales row 5 of model\.layers\.2\.self_attn\.v_proj, which is zero"):
        driver.add(saved)


def test_it_matters_and_survives_eviction(base: Any, driver: Driver, tmp_path: Path) -> None:
    saved = oracle.save_lora(base, tmp_path / "dora", rank=4, targets="all", seed=4, dora=True)
    placed = driver.add(saved)
    prompt = [5, 9, 40, 7]
    first = Job(prompt, 6, adapter=placed)
    driver.run(first)
    host = driver.memory.take_back(driver.memory.lend(placed.host), placed.placement)
    assert (
        placed.placement.device_bytes
        > sum(
            module.nbytes for name, module in load_file(saved / "adapter_model.safetensors").items() if "lora_" in name
        )
        // 2
    ), "of 16 bits a weight, the row scales too"
    driver.memory.release(placed.placement, AdapterKind.LORA)
    slots = driver.memory.lora.row_scale
    assert (slots == -1).all()
    # In another slot, behind somebody else's weights.
    other = driver.add(oracle.save_lora(base, tmp_path / "other", rank=8, targets="qv", seed=5))
    again = Job(prompt, 6, adapter=driver.place(host))
    bare = Job(prompt, 6, adapter=other)
    driver.run(again, bare)
    assert [pick.logprobs for pick in again.sampled] == [pick.logprobs for pick in first.sampled]
    # Without its magnitudes, a LoRA, it says something else.
    arrays = load_file(saved / "adapter_model.safetensors")
    save_file({k: v for k, v in arrays.items() if "magnitude" not in k}, saved / "adapter_model.safetensors")
    config = (saved / "adapter_config.json").read_text()
    (saved / "adapter_config.json").write_text(config.replace('"use_dora": true', '"use_dora": false'))
    lora = Job(prompt, 6, adapter=driver.add(saved))
    driver.run(lora)
    assert lora.sampled[0].logprobs != first.sampled[0].logprobs
