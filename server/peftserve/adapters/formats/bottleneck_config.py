"""AdapterHub's `adapter_config.json` of a bottleneck, as it applies to a decoder (MATHS.md, sections 2 to 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftserve.adapters.faults import FaultList
from peftserve.adapters.formats import fields
from peftserve.adapters.formats.parsed import Activation, BottleneckInput, BottleneckSite
from peftserve.model.spec import ModelSpec

HONOURED = frozenset(
    {
        "architecture", "is_parallel", "leave_out", "mh_adapter", "non_linearity", "original_ln_after",
        "original_ln_before", "output_adapter", "reduction_factor", "residual_before_ln", "scaling",
    }
)  # fmt: skip
HARMLESS = frozenset(
    {
        "adapter_residual_before_ln", "cross_adapter", "dropout", "factorized_phm_W", "factorized_phm_rule",
        "hypercomplex_nonlinearity", "init_weights", "init_weights_seed", "inv_adapter_reduction_factor",
        "learn_phm", "phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm",
        "shared_phm_rule", "stochastic_depth",
    }
)  # fmt: skip
"""Training, initialisation, and settings of switches that are refused when on (`phm_layer`, `inv_adapter`, ...)."""
REFUSED = {
    "ln_before": "a layer norm inside the adapter is not supported yet",
    "ln_after": "a layer norm inside the adapter is not supported yet",
    "use_gating": "the gate is averaged over the whole sequence, which a causal decoder cannot do token by token",
    "phm_layer": "Compacter (PHM) layers are not supported",
    "inv_adapter": "invertible adapters (MAD-X) are not supported",
    "invertible_adapter": "invertible adapters (MAD-X) are not supported",
}
_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")

# Where AdapterHub runs a model through its own Llama code; other bases go through its plug-in interface.
_NATIVE_FAMILIES = frozenset({"llama", "mistral"})

_ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_python": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_accurate": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_python_tanh": Activation.GELU_TANH,
    "gelu_10": Activation.GELU_10,
    "quick_gelu": Activation.QUICK_GELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "leaky_relu": Activation.LEAKY_RELU,
    "leakyrelu": Activation.LEAKY_RELU,
    "relu2": Activation.RELU2,
    "relu6": Activation.RELU6,
    "sigmoid": Activation.SIGMOID,
    "tanh": Activation.TANH,
    "mish": Activation.MISH,
    "laplace": Activation.LAPLACE,
    "linear": Activation.LINEAR,
}
# adapter-transformers 1 and 2, which wrote no `version`, named the two GELUs differently.
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """`name` is the adapter's own name, part of its tensor names. `scale` None: the file holds a tensor for it."""

    name: str
    sites: tuple[BottleneckSite, ...]
    leave_out: frozenset[int]
    reduction_factor: float | Mapping[str, Any]
    activation: Activation
    input_mode: BottleneckInput
    scale: float | None
    scale_per_channel: bool

    def width(self, layer: int, hidden_size: int, faults: FaultList) -> int | None:
        """max(1, hidden_size // factor) of this layer; None after adding a fault."""
        factor = self.reduction_factor
        where = "config field reduction_factor"
        if isinstance(factor, Mapping):
            key = str(layer) if str(layer) in factor else "default"
            if key not in factor:
                faults.add(f"{where}: gives nothing for layer {layer} and has no 'default'")
                return None
            factor, where = factor[key], f"{where}[{key!r}]"
        if not fields.is_number(factor) or factor < 1e-3:
            faults.add(f"{where}: must be a number above 0; got {fields.show(factor)}")
            return None
        return max(1, int(hidden_size // factor))


def read_config(config: Mapping[str, Any], spec: ModelSpec, faults: FaultList) -> BottleneckConfig:
    """What the config says; after a fault the value that is wrong is replaced by a harmless one."""
    inner = config["config"]
    fields.refuse_fields(inner, HONOURED | HARMLESS, REFUSED, faults)
    for field in _REQUIRED:
        if field not in inner:
            faults.add(f"config field {field}: it is missing")
    _check_base(config, spec, faults)
    scale, per_channel = _scale(inner, faults)
    return BottleneckConfig(
        name=_name(config, faults),
        sites=_sites(inner, faults),
        leave_out=_leave_out(inner, faults),
        reduction_factor=inner.get("reduction_factor", 16),
        activation=_activation(config, faults),
        input_mode=_input_mode(inner, spec, faults),
        scale=scale,
        scale_per_channel=per_channel,
    )


def _check_base(config: Mapping[str, Any], spec: ModelSpec, faults: FaultList) -> None:
    hidden = config.get("hidden_size")
    if hidden != spec.hidden_size:
        faults.add(
            f"config field hidden_size: {fields.show(hidden)}, expected {spec.hidden_size} of {fields.describe(spec)}"
        )
    family = config.get("model_type")
    if family != spec.name:
        faults.add(f"config field model_type: {fields.show(family)}, expected {spec.name!r}, that of the base")


def _name(config: Mapping[str, Any], faults: FaultList) -> str:
    name = config.get("name")
    if isinstance(name, str) and name and "." not in name and len(name) <= 200:
        return name
    faults.add(f"config field name: must be the adapter's name, without a dot; got {fields.show(name)}")
    return "?"


def _sites(inner: Mapping[str, Any], faults: FaultList) -> tuple[BottleneckSite, ...]:
    after_attention = fields.flag(inner, "mh_adapter", faults)
    after_ffn = fields.flag(inner, "output_adapter", faults)
    if not (after_attention or after_ffn):
        faults.add("config fields mh_adapter and output_adapter: both are off, so the adapter would change nothing")
    switched = ((BottleneckSite.ATTENTION, after_attention), (BottleneckSite.FFN, after_ffn))
    return tuple(site for site, on in switched if on)


def _leave_out(inner: Mapping[str, Any], faults: FaultList) -> frozenset[int]:
    value = inner.get("leave_out") or []
    if isinstance(value, list) and all(fields.is_whole(item) for item in value):
        return frozenset(value)
    faults.add(f"config field leave_out: must be a list of layer numbers; got {fields.show(value)}")
    return frozenset()


def _activation(config: Mapping[str, Any], faults: FaultList) -> Activation:
    name = config["config"].get("non_linearity")
    key = name.lower() if isinstance(name, str) else ""
    if not config.get("version"):
        key = _OLD_NAMES.get(key, key)
    if key not in _ACTIVATIONS:
        if "non_linearity" in config["config"]:
            faults.add(
                f"config field non_linearity: {fields.show(name)} is not supported; known are {', '.join(_ACTIVATIONS)}"
            )
        return Activation.LINEAR
    return _ACTIVATIONS[key]


def _scale(inner: Mapping[str, Any], faults: FaultList) -> tuple[float | None, bool]:
    """(the constant scale or None for a tensor, whether that tensor is per channel)."""
    value = inner.get("scaling", 1.0)
    if fields.is_number(value):
        return float(value), False
    if value in ("learned", "channel"):
        return None, value == "channel"
    faults.add(f"config field scaling: must be a number, 'learned' or 'channel'; got {fields.show(value)}")
    return 1.0, False


def _input_mode(inner: Mapping[str, Any], spec: ModelSpec, faults: FaultList) -> BottleneckInput:
    """What W_down reads, and whether the result has the form that is served (MATHS.md, section 2)."""
    before = fields.flag(inner, "original_ln_before", faults)
    after = fields.flag(inner, "original_ln_after", faults, default=True)
    inside = fields.flag(inner, "residual_before_ln", faults, default=True)
    if fields.flag(inner, "is_parallel", faults):
        if not after:
            faults.add(
                "config field original_ln_after (false): a parallel adapter without it drops the residual stream"
            )
        return BottleneckInput.RESIDUAL
    if before and after and not inside:
        faults.add(
            "config field residual_before_ln (false): with original_ln_before and _after the residual counts twice"
        )
    if not after and not (before and not inside):
        faults.add("config field original_ln_after (false): without it the adapter drops the residual stream")
    if not before:
        return BottleneckInput.HIDDEN
    if spec.name not in _NATIVE_FAMILIES:
        faults.add(
            f"config field original_ln_before (true): on {spec.name} AdapterHub reads h + r or h, depending on an "
            "adapter_interface.json that is no part of the adapter; train with original_ln_before false"
        )
    return BottleneckInput.HIDDEN_PLUS_RESIDUAL
