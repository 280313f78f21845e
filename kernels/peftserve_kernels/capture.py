"""What may not happen in a step that is captured and replayed: a look at data from the host, or sizes that data decide.

A replay repeats launches with the arguments that they had. It asks nothing on the host, so whatever the host would read
(`.item()`, `nonzero`, a mask as an index) or bring along (a tensor made from a list, a copy from another device) would
be that of the capture for ever.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that wait for data, or whose result's size depends on it.
_DATA_DEPENDENT: Final = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "nonzero_static",
        "unique_consecutive",
        "unique_dim",
    }
)
_FROM_THE_HOST: Final = frozenset({"lift", "lift_fresh", "lift_fresh_copy"})

_ALLOCATIONS: Final = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


_unguarded: int = 0


class CaptureError(RuntimeError):
    """Something in a captured region could not be replayed."""


class CaptureGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises `CaptureError` at the first torch op in its block that a replay could not repeat.

    With `computes` False also at the first that computes anything: where only our own ops are captured. For tests: its
    first use brings in torch's compiler, 100 MB of it.
    """

    def __init__(self, *, computes: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computes = computes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _unguarded:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        if reason := _refusal(name, tensors, kwargs or {}):
            raise CaptureError(f"{func}: {reason}")
        call: Callable[..., Any] = func
        result = call(*args, **(kwargs or {}))
        if not self._computes and name not in _ALLOCATIONS and (func._schema.is_mutable or _is_new(result, tensors)):
            raise CaptureError(f"{func}: is computed by torch, and only our own ops are recorded")
        return result


@contextmanager
def unguarded() -> Iterator[None]:
    """For what makes a capture's own memory: no guard looks at it."""
    global _unguarded
    _unguarded += 1
    try:
        yield
    finally:
        _unguarded -= 1


def _refusal(name: str, tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> str | None:
    if name in _DATA_DEPENDENT:
        return "reads data on the host, or has a result whose size depends on data"
    if name in _FROM_THE_HOST:
        return "makes a tensor from values on the host"
    devices = {x.device.type for x in tensors if x.ndim} | _wanted_device(kwargs)
    if len(devices) > 1:
        return f"copies between devices ({', '.join(sorted(devices))})"
    if name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:]):
        return "a mask as an index has a result whose size depends on data"
    return None


def _is_new(result: Any, sources: Sequence[torch.Tensor]) -> bool:
    """Whether a result has memory of its own: it is no view of a source, and no source itself."""
    known = {_storage(x) for x in sources}
    return any(_storage(x) not in known for x in _tensors(result))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _wanted_device(kwargs: Mapping[str, Any]) -> set[str]:
    device = kwargs.get("device")
    return set() if device is None else {torch.device(device).type}
