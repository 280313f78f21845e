"""Bottleneck adapters as AdapterHub (`adapters` 1.x) saves them for Llama and Mistral decoders.

stream' = r + h + s (W_up f(W_down z + b_down) + b_up), with h a sublayer's output and r the residual stream at its
input. Which z a config means, and which configs fit that formula at all, was derived from AdapterHub's source and is
written down in tests/goldens/bottleneck/MATHS.md.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from peftserve.adapters.faults import FaultList, quote
from peftserve.adapters.formats import fields
from peftserve.adapters.formats.bottleneck_config import BottleneckConfig, read_config
from peftserve.adapters.formats.parsed import BottleneckAdapter, BottleneckModule, BottleneckSite
from peftserve.adapters.formats.tensors import TensorTable
from peftserve.adapters.safetensors import TensorView
from peftserve.model.spec import ModelSpec

_PLACES = {BottleneckSite.ATTENTION: "attention_adapters", BottleneckSite.FFN: "output_adapters"}


def parse(
    config: Mapping[str, Any], tensors: Mapping[str, TensorView], spec: ModelSpec, max_width: int
) -> BottleneckAdapter:
    """The adapter in these files; raises `InvalidAdapterError` with all faults. `max_width` bounds the bottleneck."""
    faults = FaultList()
    settings = read_config(config, spec, faults)
    table = TensorTable(tensors, faults)
    sites = _read_sites(settings, table, spec, max_width, faults)
    table.refuse_rest(lambda name: _explain(name, settings))
    if faults:
        raise faults.error()
    return BottleneckAdapter(sites, settings.activation, settings.input_mode)


def _read_sites(
    settings: BottleneckConfig, table: TensorTable, spec: ModelSpec, max_width: int, faults: FaultList
) -> dict[tuple[int, BottleneckSite], BottleneckModule]:
    root = "model.layers" if any(name.startswith("model.") for name in table.names) else "layers"
    too_large: dict[int, int] = {}
    sites: dict[tuple[int, BottleneckSite], BottleneckModule] = {}
    for layer in range(spec.num_layers):
        if layer in settings.leave_out:
            continue
        width = settings.width(layer, spec.hidden_size, faults) if settings.sites else None
        if width is not None and width > max_width:
            too_large.setdefault(width, layer)
        for site in settings.sites:
            stem = f"{root}.{layer}.{_PLACES[site]}.adapters.{settings.name}"
            module = _read_module(table, stem, width, settings, spec, faults)
            if module is not None:
                sites[layer, site] = module
    for width, layer in too_large.items():
        faults.add(
            f"a bottleneck of {width} (layer {layer}) is above this server's limit of {max_width} (max_adapter_rank)"
        )
    if settings.sites and settings.leave_out.issuperset(range(spec.num_layers)):
        faults.add("config field leave_out: leaves out every layer, so the adapter would change nothing")
    return sites


def _read_module(
    table: TensorTable, stem: str, width: int | None, settings: BottleneckConfig, spec: ModelSpec, faults: FaultList
) -> BottleneckModule | None:
    hidden = spec.hidden_size
    why = f"a bottleneck of {width} on {fields.describe(spec)}"
    down = table.take(f"{stem}.adapter_down.0.weight", (width, hidden), why)
    down_bias = table.take(f"{stem}.adapter_down.0.bias", (width,), why)
    up = table.take(f"{stem}.adapter_up.weight", (hidden, width), why)
    up_bias = table.take(f"{stem}.adapter_up.bias", (hidden,), why)
    learned: TensorView | None = None
    if settings.scale is None:
        shape = (hidden,) if settings.scale_per_channel else (1,)
        learned = table.take(f"{stem}.scaling", shape, "the learned scaling")
    if width is None or down is None or down_bias is None or up is None or up_bias is None:
        return None
    if settings.scale is not None:
        return BottleneckModule(width, settings.scale, down, down_bias, up, up_bias)
    if learned is None:
        return None
    with np.errstate(over="ignore"):
        scaled_up = TensorView.from_array(up.float32() * learned.float32()[:, np.newaxis])
        scaled_bias = TensorView.from_array(up_bias.float32() * learned.float32())
    if scaled_up.num_not_finite() or scaled_bias.num_not_finite():
        faults.add(f"tensor {quote(f'{stem}.scaling')}: scaling adapter_up by it overflows float32")
    return BottleneckModule(width, 1.0, down, down_bias, scaled_up, scaled_bias)


def _explain(name: str, settings: BottleneckConfig) -> str:
    """What a tensor that the config does not account for may be."""
    if name.endswith("lm_head.weight") or name.startswith("heads."):
        return "it is the base's head (model_head.safetensors), no part of the adapter; upload adapter.safetensors"
    if f".adapters.{settings.name}." not in name:
        return f"this adapter's tensors have .adapters.{settings.name}. in their names"
    return "the config calls for no such tensor (mh_adapter, output_adapter, leave_out, scaling) in this base"
