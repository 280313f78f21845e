"""Matching a file's tensors against what the config and the base call for."""

from collections.abc import Callable, Collection, Mapping

from peftserve.adapters.faults import FaultList, quote
from peftserve.adapters.safetensors import TensorView


class TensorTable:
    """The tensors of one file, taken one by one; what nobody took in the end matched nothing."""

    def __init__(self, tensors: Mapping[str, TensorView], faults: FaultList) -> None:
        self._tensors = tensors
        self._faults = faults
        self._left = dict.fromkeys(tensors)

    @property
    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def take(self, name: str, shape: tuple[int | None, ...], why: str) -> TensorView | None:
        """The tensor `name` if it is there, of this shape and finite; otherwise None after adding a fault.

        `why` says where the expected shape comes from. If a size is None, the config is broken (a fault already) and
        only presence is checked.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            self._faults.add(f"tensor {quote(name)} is missing" + ("" if None in shape else f" ({why})"))
            return None
        self._left.pop(name, None)
        if None in shape:
            return None
        if tensor.shape != shape:
            self._faults.add(
                f"tensor {quote(name)}: wrong shape, expected {list(shape)} but got {list(tensor.shape)} ({why})"
            )
            return None
        bad = tensor.num_not_finite()
        if bad:
            self._faults.add(f"tensor {quote(name)}: {bad} of its values are NaN or infinite")
            return None
        return tensor

    def refuse_rest(self, explain: Callable[[str], str]) -> None:
        """Add a fault for each tensor that was not taken; `explain` says what it may be."""
        for name in self._left:
            self._faults.add(f"tensor {quote(name)} matches nothing: {explain(name)}")
