"""Pfeiffer bottleneck adapters for a transformers Llama: inject, save and load, in AdapterHub's format.

Source of the maths and the names: ``adapters`` 1.3.0, ``SeqBnConfig`` on ``LlamaDecoderLayerWithAdapters``
(Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247). Llama calls its output adapter with the residual stream and
no layer norm, so ``original_ln_before`` adds the residual before the adapter and ``original_ln_after`` adds it to the
result; with x the output of the decoder layer (residual included) both together give::

    y = x + W_up · relu(W_down · x + b_down) + b_up
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"


class PfeifferAdapter(nn.Module):
    """One adapter behind one decoder layer, in float32; parameter names are AdapterHub's.

    Starts as the identity (AdapterHub's ``init_weights="mam_adapter"``): a zero up-projection.
    """

    def __init__(self, hidden_size: int, bottleneck_size: int) -> None:
        super().__init__()
        down = nn.Linear(hidden_size, bottleneck_size)
        self.adapter_down = nn.Sequential(down, nn.ReLU())
        self.adapter_up = nn.Linear(bottleneck_size, hidden_size)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zeroed in (down.bias, self.adapter_up.weight, self.adapter_up.bias):
            nn.init.zeros_(zeroed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map layer outputs [..., hidden] to the same shape and dtype; the bottleneck itself runs in float32."""
        delta: torch.Tensor = self.adapter_up(self.adapter_down(x.float()))
        return x + delta.to(x.dtype)


class BottleneckAdapters(nn.ModuleList):
    """The adapters of all decoder layers of one model; ``detach`` gives the bare model back."""

    def __init__(self, model: LlamaForCausalLM, name: str, reduction_factor: int) -> None:
        hidden_size = model.config.hidden_size
        layers = model.model.layers
        super().__init__(PfeifferAdapter(hidden_size, hidden_size // reduction_factor) for _ in layers)
        self.name = name
        self.reduction_factor = reduction_factor
        self.hidden_size = hidden_size
        self._hooks = [
            layer.register_forward_hook(lambda _module, _args, output, adapter=adapter: adapter(output))
            for layer, adapter in zip(layers, self, strict=True)
        ]

    def detach(self) -> None:
        """Take the adapters out of the model again."""
        for hook in self._hooks:
            hook.remove()

    def save(self, folder: Path, base_name: str, dtype: torch.dtype) -> None:
        """Write ``adapter_config.json`` and ``adapter.safetensors`` (weights in ``dtype``) as AdapterHub does."""
        prefix = f".output_adapters.adapters.{self.name}."
        weights = {
            f"model.layers.{index}{prefix}{key}": value.to(dtype).contiguous()
            for index, adapter in enumerate(self)
            for key, value in adapter.state_dict().items()
        }
        save_file(weights, folder / WEIGHTS_FILE)
        config = {
            "config": seq_bn_config(self.reduction_factor),
            "hidden_size": self.hidden_size,
            "model_class": "LlamaForCausalLM",
            "model_name": base_name,
            "model_type": "llama",
            "name": self.name,
            "version": "adapters.1.3.0",
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, model: LlamaForCausalLM, folder: Path) -> BottleneckAdapters:
        """Inject the adapters that ``save`` wrote to ``folder``.

        Raises:
            ValueError: the configuration is not the one that ``save`` writes.
            RuntimeError: the tensors do not match it.
        """
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        name, reduction_factor = config["name"], config["config"]["reduction_factor"]
        if config["config"] != seq_bn_config(reduction_factor):
            raise ValueError(f"{folder / CONFIG_FILE}: not a plain SeqBnConfig")
        adapters = cls(model, name, reduction_factor)
        weights = {
            key.removeprefix("model.layers.").replace(f"output_adapters.adapters.{name}.", ""): value
            for key, value in load_file(folder / WEIGHTS_FILE).items()
        }
        adapters.load_state_dict(weights)
        return adapters


def seq_bn_config(reduction_factor: int) -> dict[str, Any]:
    """Every field of AdapterHub's ``SeqBnConfig`` (1.3.0) with its default, but for size and initialization."""
    return {
        "adapter_residual_before_ln": False,
        "cross_adapter": False,
        "dropout": 0.0,
        "factorized_phm_W": True,
        "factorized_phm_rule": False,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "init_weights": "mam_adapter",
        "init_weights_seed": None,
        "inv_adapter": None,
        "inv_adapter_reduction_factor": None,
        "is_parallel": False,
        "learn_phm": True,
        "leave_out": [],
        "ln_after": False,
        "ln_before": False,
        "mh_adapter": False,
        "non_linearity": "relu",
        "original_ln_after": True,
        "original_ln_before": True,
        "output_adapter": True,
        "phm_bias": True,
        "phm_c_init": "normal",
        "phm_dim": 4,
        "phm_init_range": 0.0001,
        "phm_layer": False,
        "phm_rank": 1,
        "reduction_factor": reduction_factor,
        "residual_before_ln": True,
        "scaling": 1.0,
        "shared_W_phm": False,
        "shared_phm_rule": True,
        "stochastic_depth": 0.0,
        "use_gating": False,
    }
