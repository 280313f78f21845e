"""Random bottleneck adapters in AdapterHub's format, drawn from a seed instead of kept as files.

The goldens in ``smollm2.json`` were made with adapters that this module wrote, so a test writes the same ones
again and compares :func:`weights_sha256` before it blames the maths. Needs numpy and safetensors only. The
format, with the meaning of each key, is in ``MATHS.md``.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Kind = Literal["pfeiffer", "houlsby", "parallel"]
Weights = dict[str, npt.NDArray[np.float32]]

# AdapterHub writes every key, defaults included (BnConfig of adapters 1.3.0).
_COMMON: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
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
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_BY_KIND: dict[Kind, dict[str, Any]] = {
    "pfeiffer": {"original_ln_before": True},
    "houlsby": {"mh_adapter": True, "non_linearity": "swish"},
    "parallel": {"is_parallel": True, "init_weights": "mam_adapter", "reduction_factor": 2, "scaling": 4.0},
}
_PLACES = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}


def adapter_config(kind: Kind, *, hidden_size: int, name: str = "golden", **overrides: Any) -> dict[str, Any]:
    """What AdapterHub saves as ``adapter_config.json`` for ``kind`` on a Llama, with ``overrides`` in ``config``.

    Raises:
        KeyError: an override that is no key of AdapterHub's config.
    """
    if unknown := overrides.keys() - _COMMON.keys():
        raise KeyError(f"not AdapterHub config keys: {sorted(unknown)}")
    return {
        "config": _COMMON | _BY_KIND[kind] | overrides,
        "hidden_size": hidden_size,
        "model_class": "LlamaForCausalLM",
        "model_name": "",
        "model_type": "llama",
        "name": name,
        "version": "adapters.1.3.0",
    }


def rank_of_layer(reduction_factor: float | Mapping[str, float], layer: int, hidden_size: int) -> int:
    """Bottleneck width of ``layer``, at least 1. A map has string keys and may have ``"default"``."""
    if isinstance(reduction_factor, Mapping):
        factor = reduction_factor.get(str(layer), reduction_factor.get("default"))
        if factor is None:
            raise KeyError(f"reduction_factor has neither {layer} nor 'default'")
    else:
        factor = reduction_factor
    return max(1, int(hidden_size // factor))


def random_weights(config: Mapping[str, Any], *, num_layers: int, seed: int, gain: float) -> Weights:
    """Float32 weights that fit an ``adapter_config.json``, whose ``scaling`` must be a number.

    Uniform, down-projections of variance 1/hidden and up-projections of variance gain²/rank, so that an input
    of RMS 1 gives an update of RMS near ``gain`` before ``scaling``. Biases are a tenth of that.
    """
    rng = np.random.default_rng(seed)
    inner, hidden, name = config["config"], config["hidden_size"], config["name"]

    def uniform(shape: tuple[int, ...], std: float) -> npt.NDArray[np.float32]:
        return (rng.random(shape, dtype=np.float32) * 2 - 1) * np.float32(std * 3**0.5)

    weights: Weights = {}
    for layer in range(num_layers):
        if layer in inner["leave_out"]:
            continue
        rank = rank_of_layer(inner["reduction_factor"], layer, hidden)
        for switch, place in _PLACES.items():
            if not inner[switch]:
                continue
            prefix = f"model.layers.{layer}.{place}.adapters.{name}."
            weights[prefix + "adapter_down.0.weight"] = uniform((rank, hidden), hidden**-0.5)
            weights[prefix + "adapter_down.0.bias"] = uniform((rank,), 0.1)
            weights[prefix + "adapter_up.weight"] = uniform((hidden, rank), gain * rank**-0.5)
            weights[prefix + "adapter_up.bias"] = uniform((hidden,), gain * 0.1)
    return weights


def weights_sha256(weights: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """Hex digest over names and little-endian float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].astype("<f4").tobytes())
    return digest.hexdigest()


def write_random_adapter(
    folder: Path,
    *,
    kind: Kind,
    hidden_size: int,
    num_layers: int,
    seed: int,
    gain: float,
    name: str = "golden",
    **overrides: Any,
) -> str:
    """Writes ``adapter_config.json`` and ``adapter.safetensors`` to ``folder``, created if need be.

    Args:
        overrides: keys of AdapterHub's ``config``, for instance ``reduction_factor=8``.

    Returns:
        :func:`weights_sha256` of what was written.
    """
    config = adapter_config(kind, hidden_size=hidden_size, name=name, **overrides)
    weights = random_weights(config, num_layers=num_layers, seed=seed, gain=gain)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "adapter.safetensors")
    return weights_sha256(weights)
