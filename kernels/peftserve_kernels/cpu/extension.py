"""The compiled extension: loading it, and choosing its instruction set.

`PEFTSERVE_CPU_ISA` forces one of amx_bf16, avx512_bf16, avx512_vnni, avx2 and portable; else the best that the
processor has is used. Where the package was installed without a C++ compiler there is no extension: one warning, and
the torch references run.
"""

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

from peftserve_kernels.dispatch import Backend

if TYPE_CHECKING:
    import peftserve_kernels.cpu._native as ops
else:
    try:
        from peftserve_kernels.cpu import _native as ops
    except ImportError:
        logging.getLogger(__name__).warning("the native CPU kernels are not built: ops on the CPU will be slow")
        ops = None

HAS_NATIVE: Final[bool] = ops is not None
__all__ = [
    "ARENA_DTYPES",
    "DTYPES",
    "ENVIRONMENT_VARIABLE",
    "HAS_NATIVE",
    "address",
    "native",
    "ops",
    "supported_isas",
    "use_isa",
]

ENVIRONMENT_VARIABLE: Final = "PEFTSERVE_CPU_ISA"

DTYPES: Final[Mapping[torch.dtype, int]] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers of `Dtype` in kernels/native/types.h: what activations and caches may be."""
ARENA_DTYPES: Final[Mapping[torch.dtype, int]] = {**DTYPES, torch.int8: 3}
"""And what adapters may be."""

Implementation = TypeVar("Implementation", bound=Callable[..., Any])


def native(implementation: Implementation) -> Mapping[Backend, Implementation]:
    """The entry of a native op for its table of implementations: none without the extension."""
    return {Backend.CPU: implementation} if HAS_NATIVE else {}


def address(x: Tensor | None) -> int:
    """Where the first element of `x` lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this processor can run, best first; none without the extension."""
    return tuple(ops.supported_isas()) if HAS_NATIVE else ()


def use_isa(isa: str) -> None:
    """Run the native ops with `isa` from now on. Raises ValueError when the processor or the build does not have it."""
    if not (HAS_NATIVE and ops.set_isa(isa)):
        choices = ", ".join(supported_isas()) or "none, for lack of the extension"
        raise ValueError(f"CPU instruction set {isa!r}: this machine has {choices}")


def _use_environment() -> None:
    isa = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if isa:
        use_isa(isa)


_use_environment()
