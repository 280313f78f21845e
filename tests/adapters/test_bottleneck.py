import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftserve.adapters import manifest, safetensors
from peftserve.adapters.formats import (
    Activation,
    BottleneckAdapter,
    BottleneckInput,
    BottleneckSite,
    bottleneck_config,
    parse,
)
from peftserve.errors import InvalidAdapterError
from peftserve.model.config_reader import read_spec
from tests.adapters.files import SPEC, Arrays, bottleneck, check, faults
from tests.goldens.bottleneck.random_adapter import adapter_config

GOLDENS = Path(__file__).parents[1] / "goldens" / "bottleneck"
BASE = "the base (llama, 3 layers, hidden size 32, 4 heads, 2 KV heads of 8, FFN size 48)"


def parsed(files: tuple[dict[str, Any], Arrays], spec: Any = SPEC) -> BottleneckAdapter:
    adapter = check(files, spec=spec)
    assert isinstance(adapter, BottleneckAdapter)
    return adapter


def only(files: tuple[dict[str, Any], Arrays], *parts: str) -> tuple[dict[str, Any], Arrays]:
    """The files without the tensors that have one of `parts` in their names."""
    config, arrays = files
    return config, {name: array for name, array in arrays.items() if not any(part in name for part in parts)}


def read_golden(folder: Path) -> BottleneckAdapter:
    spec = read_spec(GOLDENS / "tiny" / "base")
    config = manifest.read_config((folder / "adapter_config.json").read_bytes())
    tensors = safetensors.read((folder / "adapter.safetensors").read_bytes())
    adapter = parse(config, tensors, spec, 128)
    assert isinstance(adapter, BottleneckAdapter)
    return adapter


@pytest.mark.parametrize(
    ("folder", "input_mode", "activation", "scale", "widths"),
    [
        ("pfeiffer", "HIDDEN_PLUS_RESIDUAL", "RELU", 1.0, {(layer, 1): 4 for layer in range(3)}),
        ("houlsby", "HIDDEN", "SILU", 1.0, {(layer, site): 4 for layer in range(3) for site in (0, 1)}),
        ("parallel", "RESIDUAL", "RELU", 4.0, {(layer, 1): 32 for layer in range(3)}),
        ("adapter_plus", "HIDDEN_PLUS_RESIDUAL", "GELU", 1.0, {(layer, 1): 4 for layer in range(3)}),
        ("pfeiffer_map", "HIDDEN_PLUS_RESIDUAL", "QUICK_GELU", 1.0, {(0, 1): 16, (1, 1): 4, (2, 1): 25}),
    ],
)
def test_reads_what_adapterhub_saved(
    folder: str, input_mode: str, activation: str, scale: float, widths: dict[tuple[int, int], int]
) -> None:
    adapter = read_golden(GOLDENS / "tiny" / folder)
    assert adapter.input_mode is BottleneckInput[input_mode]
    assert adapter.activation is Activation[activation]
    assert {where: module.width for where, module in adapter.sites.items()} == widths
    if folder != "adapter_plus":
        assert {module.scale for module in adapter.sites.values()} == {scale}


@pytest.mark.parametrize(
    "folder", sorted((GOLDENS / "tiny").glob("*/adapter_config.json")), ids=lambda p: p.parent.name
)
def test_every_golden_adapter_is_accepted(folder: Path) -> None:
    assert read_golden(folder.parent).sites


@pytest.mark.parametrize(("folder", "field"), json.loads((GOLDENS / "refused.json").read_text()).items())
def test_every_refused_variant_is_refused_by_name(folder: str, field: str) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        read_golden(GOLDENS / folder)
    assert any(fault.startswith("config field") and field in fault for fault in caught.value.faults)


def test_tensors_arrive_where_they_belong() -> None:
    files = bottleneck(width=8)
    adapter = parsed(files)
    module = adapter.sites[2, BottleneckSite.FFN]
    stem = "model.layers.2.output_adapters.adapters.demo"
    np.testing.assert_array_equal(module.down.float32(), files[1][f"{stem}.adapter_down.0.weight"])
    np.testing.assert_array_equal(module.up_bias.float32(), files[1][f"{stem}.adapter_up.bias"])
    assert adapter.details() == {
        "source_format": "adapterhub",
        "width": 8,
        "widths": [8],
        "sites": ["attention", "ffn"],
        "activation": "silu",
        "input": "hidden",
        "layers": 3,
        "padded_weights": 6 * (2 * 8 * 32 + 8 + 32),
        "padded_rows": 6 * 8,
        "vector_weights": 6 * (8 + 32),
    }


def test_the_bare_models_prefix_is_fine_too() -> None:
    config, arrays = bottleneck()
    assert len(parsed((config, {name.removeprefix("model."): array for name, array in arrays.items()})).sites) == 6


@pytest.mark.parametrize(("scaling", "shape"), [("learned", (1,)), ("channel", (32,))])
def test_a_learned_scale_is_folded_in(scaling: str, shape: tuple[int, ...]) -> None:
    config, arrays = bottleneck(scaling=scaling)
    rng = np.random.default_rng(3)
    for name in [name for name in arrays if name.endswith("up.bias")]:
        arrays[name.replace("adapter_up.bias", "scaling")] = rng.standard_normal(shape, np.float32)
    module = parsed((config, arrays)).sites[1, BottleneckSite.ATTENTION]
    stem = "model.layers.1.attention_adapters.adapters.demo"
    factor = arrays[f"{stem}.scaling"]
    assert module.scale == 1.0
    np.testing.assert_allclose(module.up.float32(), arrays[f"{stem}.adapter_up.weight"] * factor[:, None], rtol=1e-6)
    np.testing.assert_allclose(module.up_bias.float32(), arrays[f"{stem}.adapter_up.bias"] * factor, rtol=1e-6)


def test_a_learned_scale_may_not_overflow() -> None:
    config, arrays = bottleneck(scaling="learned")
    for name in [name for name in arrays if name.endswith("up.bias")]:
        arrays[name.replace("adapter_up.bias", "scaling")] = np.full(1, 3e38, np.float32)
    assert faults((config, arrays))[0].endswith(".scaling': scaling adapter_up by it overflows float32")


def test_one_place_and_left_out_layers() -> None:
    files = only(bottleneck(mh_adapter=False, leave_out=[1, 99]), "attention_adapters", "layers.1.")
    assert parsed(files).sites.keys() == {(0, BottleneckSite.FFN), (2, BottleneckSite.FFN)}


def test_widths_by_layer() -> None:
    """rank = max(1, hidden // factor); 32 // 1.5 is 21, 32 // 100 is 0 and so 1."""
    config, arrays = bottleneck(reduction_factor={"0": 1.5, "default": 100})
    for name, array in arrays.items():
        width = 21 if ".layers.0." in name else 1
        sizes = tuple(width if size == 8 else size for size in array.shape)
        arrays[name] = np.zeros(sizes, np.float32)
    adapter = check((config, arrays), max_rank=21)
    assert isinstance(adapter, BottleneckAdapter)
    assert [adapter.sites[layer, BottleneckSite.FFN].width for layer in range(3)] == [21, 1, 1]


@pytest.mark.parametrize(
    ("version", "name", "expected"),
    [
        ("adapters.1.3.0", "gelu", Activation.GELU),
        (None, "gelu", Activation.GELU_TANH),
        (None, "gelu_orig", Activation.GELU),
        (None, "ReLU", Activation.RELU),
    ],
)
def test_old_files_name_gelu_differently(version: str | None, name: str, expected: Activation) -> None:
    config, arrays = bottleneck(non_linearity=name)
    assert parsed((config | {"version": version}, arrays)).activation is expected


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, BottleneckInput.HIDDEN),
        ({"residual_before_ln": False}, BottleneckInput.HIDDEN),
        ({"original_ln_before": True}, BottleneckInput.HIDDEN_PLUS_RESIDUAL),
        (
            {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
            BottleneckInput.HIDDEN_PLUS_RESIDUAL,
        ),
        ({"is_parallel": True, "original_ln_before": True, "residual_before_ln": False}, BottleneckInput.RESIDUAL),
        ({"original_ln_before": True, "residual_before_ln": False}, "residual_before_ln"),
        ({"original_ln_before": True, "original_ln_after": False}, "original_ln_after"),
        ({"original_ln_after": False}, "original_ln_after"),
        ({"original_ln_after": False, "residual_before_ln": False}, "original_ln_after"),
        ({"is_parallel": True, "original_ln_after": False}, "original_ln_after"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln"),
    ],
)
def test_the_table_of_inputs(switches: dict[str, Any], expected: BottleneckInput | str) -> None:
    """MATHS.md, section 2, line by line."""
    files = bottleneck(**switches)
    if isinstance(expected, BottleneckInput):
        assert parsed(files).input_mode is expected
    else:
        found = faults(files)
        assert len(found) == 1
        assert found[0].startswith(f"config field {expected}")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_gating": True}, "config field use_gating (true): the gate is averaged over the whole sequence"),
        ({"phm_layer": True}, "config field phm_layer (true): Compacter (PHM) layers are not supported"),
        ({"inv_adapter": "nice"}, "config field inv_adapter ('nice'): invertible adapters (MAD-X) are not supported"),
        ({"invertible_adapter": {"x": 1}}, "config field invertible_adapter"),
        ({"ln_before": True}, "config field ln_before (true): a layer norm inside the adapter is not supported yet"),
        ({"ln_after": True}, "config field ln_after (true): a layer norm inside the adapter is not supported yet"),
        ({"non_linearity": "prelu"}, "config field non_linearity: 'prelu' is not supported; known are relu, gelu,"),
        ({"non_linearity": None}, "config field non_linearity: null is not supported"),
        ({"scaling": "loud"}, "config field scaling: must be a number, 'learned' or 'channel'; got 'loud'"),
        ({"leave_out": "all"}, "config field leave_out: must be a list of layer numbers; got 'all'"),
        ({"mh_adapter": "yes"}, "config field mh_adapter: must be true or false; got 'yes'"),
        ({"surprise": [1]}, "config field 'surprise' ([1]): not known here"),
        ({"reduction_factor": 0}, "config field reduction_factor: must be a number above 0; got 0"),
        (
            {"reduction_factor": {"0": 4}},
            "config field reduction_factor: gives nothing for layer 1 and has no 'default'",
        ),
        ({"reduction_factor": {"default": "4"}}, "config field reduction_factor['default']: must be a number above 0"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], expected: str) -> None:
    assert faults(bottleneck(**change))[0].startswith(expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": 768}, f"config field hidden_size: 768, expected 32 of {BASE}"),
        ({"model_type": "bert"}, "config field model_type: 'bert', expected 'llama', that of the base"),
        ({"name": "a.b"}, "config field name: must be the adapter's name, without a dot; got 'a.b'"),
    ],
)
def test_refuses_another_base(change: dict[str, Any], expected: str) -> None:
    config, arrays = bottleneck()
    assert faults((config | change, arrays))[0] == expected


def test_required_fields() -> None:
    config, arrays = bottleneck()
    for field in ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity"):
        broken = config | {"config": {key: value for key, value in config["config"].items() if key != field}}
        assert f"config field {field}: it is missing" in faults((broken, arrays))


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    config, _ = bottleneck(mh_adapter=False, output_adapter=False)
    assert faults((config, {})) == [
        "config fields mh_adapter and output_adapter: both are off, so the adapter would change nothing"
    ]
    config, _ = bottleneck(leave_out=[0, 1, 2])
    assert faults((config, {})) == [
        "config field leave_out: leaves out every layer, so the adapter would change nothing"
    ]


def test_missing_wrong_unexpected_and_not_finite() -> None:
    config, arrays = bottleneck()
    stem = "model.layers.0.attention_adapters.adapters.demo"
    del arrays[f"{stem}.adapter_up.bias"]
    arrays[f"{stem}.adapter_up.weight"] = np.zeros((32, 4), np.float32)
    arrays[f"{stem}.adapter_down.0.bias"][:2] = np.inf
    arrays["lm_head.weight"] = np.zeros((2, 2), np.float32)
    arrays["model.layers.0.attention_adapters.adapters.other.adapter_up.bias"] = np.zeros(2, np.float32)
    arrays["model.layers.3.attention_adapters.adapters.demo.adapter_up.bias"] = np.zeros(2, np.float32)
    why = f"(a bottleneck of 8 on {BASE})"
    assert faults((config, arrays)) == [
        f"tensor '{stem}.adapter_down.0.bias': 2 of its values are NaN or infinite",
        f"tensor '{stem}.adapter_up.weight': wrong shape, expected [32, 8] but got [32, 4] {why}",
        f"tensor '{stem}.adapter_up.bias' is missing {why}",
        "tensor 'lm_head.weight' matches nothing: it is the base's head (model_head.safetensors), no part of the "
        "adapter; upload adapter.safetensors",
        "tensor 'model.layers.0.attention_adapters.adapters.other.adapter_up.bias' matches nothing: this adapter's "
        "tensors have .adapters.demo. in their names",
        "tensor 'model.layers.3.attention_adapters.adapters.demo.adapter_up.bias' matches nothing: the config calls "
        "for no such tensor (mh_adapter, output_adapter, leave_out, scaling) in this base",
    ]


def test_width_limit() -> None:
    assert faults(bottleneck(width=32)) == [
        "a bottleneck of 32 (layer 0) is above this server's limit of 16 (max_adapter_rank)"
    ]


def test_pfeiffer_is_ambiguous_where_adapterhub_needs_a_plug_in() -> None:
    import msgspec

    qwen = msgspec.structs.replace(SPEC, name="qwen3")
    config, arrays = bottleneck()
    assert len(parsed((config | {"model_type": "qwen3"}, arrays), qwen).sites) == 6
    config, arrays = bottleneck(original_ln_before=True)
    found = faults((config | {"model_type": "qwen3"}, arrays), spec=qwen)
    assert len(found) == 1
    assert found[0].startswith("config field original_ln_before (true): on qwen3 AdapterHub reads h + r or h")


def test_every_field_of_adapterhub_is_classified() -> None:
    known = bottleneck_config.HONOURED | bottleneck_config.HARMLESS | bottleneck_config.REFUSED.keys()
    assert adapter_config("pfeiffer", hidden_size=64)["config"].keys() - known == set()
