"""Reading config fields: typed, with a fault that names the field when it is not what it should be."""

import json
from collections.abc import Container, Mapping
from typing import Any

from peftserve.adapters.faults import FaultList, quote
from peftserve.adapters.strict_json import type_name
from peftserve.model.spec import ModelSpec


def is_off(value: object) -> bool:
    """Whether a field's value switches it off: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


def is_whole(value: Any) -> bool:
    """Whether it is a whole JSON number (Python counts booleans among them)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 1, in the bounds of an int32."""
    return is_whole(value) and 1 <= value < 1 << 31


def is_number(value: Any) -> bool:
    """Whether it is a number that a float32 can hold."""
    return (isinstance(value, float) or is_whole(value)) and abs(value) <= 3.4e38


def show(value: object) -> str:
    """A config value in a message: as JSON would show it, shortened."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return "a huge number" if abs(value) >= 1e20 else repr(value)
    text = json.dumps(value)
    return text if len(text) <= 100 else type_name(value)


def count(config: Mapping[str, Any], field: str, faults: FaultList) -> int | None:
    """A required count, or None after adding a fault."""
    value: Any = config.get(field)
    if is_count(value):
        return int(value)
    got = f"got {show(value)}" if field in config else "it is missing"
    faults.add(f"config field {field}: must be a whole number of at least 1; {got}")
    return None


def number(config: Mapping[str, Any], field: str, faults: FaultList) -> float | None:
    """A required finite number, or None after adding a fault."""
    value: Any = config.get(field)
    if is_number(value):
        return float(value)
    got = f"got {show(value)}" if field in config else "it is missing"
    faults.add(f"config field {field}: must be a number; {got}")
    return None


def flag(config: Mapping[str, Any], field: str, faults: FaultList, *, default: bool = False) -> bool:
    """A boolean; null and absence mean `default`."""
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        faults.add(f"config field {field}: must be true or false; got {show(value)}")
        return default
    return value


def refuse_fields(
    config: Mapping[str, Any], known: Container[str], refused: Mapping[str, str], faults: FaultList
) -> None:
    """Add a fault for each field of `refused` (field -> reason) that is on, and for each unknown field that is on."""
    for field, value in config.items():
        if is_off(value):
            continue
        if field in refused:
            faults.add(f"config field {field} ({show(value)}): {refused[field]}")
        elif field not in known:
            faults.add(
                f"config field {quote(field)} ({show(value)}): not known here, "
                "and it could change what the adapter computes"
            )


def describe(spec: ModelSpec) -> str:
    """The base for a message about sizes that don't fit it."""
    return (
        f"the base ({spec.name}, {spec.num_layers} layers, hidden size {spec.hidden_size}, {spec.num_heads} heads, "
        f"{spec.num_kv_heads} KV heads of {spec.head_dim}, FFN size {spec.intermediate_size})"
    )
