"""Which implementation of an op runs: chosen by device, or forced by `PEFTSERVE_KERNELS`.

Every op file holds a table Backend -> implementation and asks `select` for its entry. An op without an entry for the
wanted backend uses its torch reference, which every table has.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cache
from typing import Any, Final, TypeVar

import torch

from peftserve_kernels.capture import unguarded

ENVIRONMENT_VARIABLE: Final = "PEFTSERVE_KERNELS"

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


class Backend(StrEnum):
    """An implementation of the ops."""

    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


@cache
def forced_backend() -> Backend | None:
    """The backend that `PEFTSERVE_KERNELS` asks for; None when it is unset or empty. Read once.

    Raises ValueError when it names no backend.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not value:
        return None
    try:
        return Backend(value)
    except ValueError:
        choices = ", ".join(Backend)
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={value!r}: must be one of {choices}") from None


def backend_for(device: torch.device) -> Backend:
    """The backend wanted for tensors on `device`: the forced one, else native on the CPU and Triton elsewhere."""
    forced = forced_backend()
    if forced is not None:
        return forced
    return Backend.CPU if device.type == "cpu" else Backend.TRITON


def triton_op(module: str, name: str) -> Mapping[Backend, Callable[..., Any]]:
    """The Triton entry of an op: `name` in `peftserve_kernels.gpu.<module>`, imported at its first call.

    So Triton is neither needed nor loaded where other backends run; without it the first call raises ImportError.
    """

    @cache
    def implementation() -> Callable[..., Any]:
        with unguarded():  # what a module computes when it is imported is no part of a captured step
            function: Callable[..., Any] = getattr(importlib.import_module(f"peftserve_kernels.gpu.{module}"), name)
        return function

    return {Backend.TRITON: lambda *args, **kwargs: implementation()(*args, **kwargs)}


def select(table: Mapping[Backend, Implementation], device: torch.device) -> Implementation:
    """The implementation in `table` for tensors on `device`, or the reference where the wanted one is missing."""
    return table.get(backend_for(device), table[Backend.REFERENCE])
