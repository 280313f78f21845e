"""Which linear layers of the base a LoRA config means, and with which rank and alpha."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftserve.adapters.faults import FaultList, quote
from peftserve.adapters.formats import fields, patterns
from peftserve.model.spec import ModelSpec, Target, targets

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NOT_SERVED = ("lm_head", "model.embed_tokens")


def module_names(spec: ModelSpec) -> dict[str, tuple[int, Target]]:
    """Hugging Face's name of every linear layer in the decoder -> (layer, target)."""
    return {
        f"model.layers.{layer}.{'self_attn' if target.name in _ATTENTION else 'mlp'}.{target.name}": (layer, target)
        for layer in range(spec.num_layers)
        for target in targets(spec)
    }


def find_targets(config: Mapping[str, Any], spec: ModelSpec, faults: FaultList) -> list[str]:
    """The names of the modules that PEFT would adapt (`tuners_utils.check_target_module_exists`), in layer order."""
    selects = _selector(config.get("target_modules"), "target_modules", faults)
    excludes = _selector(config.get("exclude_modules") or [], "exclude_modules", faults)
    layers = _layers(config, faults)
    if selects is None or excludes is None:
        return []
    wanted = config["target_modules"]
    exact = frozenset(wanted) if isinstance(wanted, list) else frozenset()
    by_layer = layers is not None and isinstance(wanted, list)
    found = [
        name
        for name, (layer, _) in module_names(spec).items()
        if selects(name) and not excludes(name) and (not by_layer or name in exact or layer in (layers or ()))
    ]
    for name in _NOT_SERVED:
        if selects(name) and not excludes(name) and (not by_layer or name in exact):
            faults.add(f"config field target_modules: LoRA on {name.rpartition('.')[2]} is not supported yet")
    if not found:
        faults.add(
            f"config field target_modules ({_show_targets(wanted)}): names no linear layer of {fields.describe(spec)}; "
            f"its layers are named like model.layers.0.self_attn.q_proj"
        )
    return found


def pattern_values(
    config: Mapping[str, Any],
    field: str,
    spec: ModelSpec,
    faults: FaultList,
    *,
    wants: str,
    valid: Callable[[Any], bool],
) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` resolved: module name -> value."""
    value = config.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        faults.add(f"config field {field}: must be an object of module name -> {wants}; got {fields.show(value)}")
        return {}
    for key, item in value.items():
        if not valid(item):
            faults.add(f"config field {field}: {quote(key)} must have {wants}; got {fields.show(item)}")
    chosen, complaints = patterns.first_matches(list(value), module_names(spec))
    for text in complaints:
        faults.add(f"config field {field}: {text}")
    return {name: value[key] for name, key in chosen.items() if valid(value[key])}


def _selector(value: Any, field: str, faults: FaultList) -> Callable[[str], bool] | None:
    """Whether a module name is meant by `target_modules` or `exclude_modules`; None after adding a fault."""
    if isinstance(value, str) and value:
        if field == "target_modules" and value.lower() == "all-linear":
            return lambda name: name not in _NOT_SERVED
        try:
            return patterns.compile_fullmatch(value)
        except ValueError as error:
            faults.add(f"config field {field}: {error}")
            return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        names = frozenset(value)
        return lambda name: any(suffix in names for suffix in _suffixes(name))
    faults.add(f"config field {field}: must be module names in a list, or a pattern; got {fields.show(value)}")
    return None


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _layers(config: Mapping[str, Any], faults: FaultList) -> frozenset[int] | None:
    """The layers of `layers_to_transform`, None for all."""
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    listed = value if isinstance(value, list) else [value]
    if not all(fields.is_whole(item) for item in listed):
        faults.add(f"config field layers_to_transform: must be layer numbers; got {fields.show(value)}")
        return None
    if isinstance(config.get("target_modules"), str):
        faults.add("config field layers_to_transform: cannot be combined with a target_modules that is a string")
    names = config.get("layers_pattern") or []
    for name in names if isinstance(names, list) else [names]:
        if name not in ("layers", "model.layers"):
            faults.add(f"config field layers_pattern ({fields.show(name)}): the layers of this base are named 'layers'")
    return frozenset(listed)


def _show_targets(wanted: Sequence[str] | str) -> str:
    if isinstance(wanted, str):
        return quote(wanted)
    shown = ", ".join(quote(name) for name in wanted[:5])
    return f"[{shown}{', ...' if len(wanted) > 5 else ''}]"
