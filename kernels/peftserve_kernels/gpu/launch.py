"""The one door to Triton kernels: a launch is run, or recorded, or both.

Launch choice is a pure function of `Target`, dtypes and shapes, in each op's file; `current_target` says which target
that is. `recording` replaces running by a list of `Launch`, for any target, without a GPU and on meta tensors.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, NamedTuple

import torch
import triton

INTERPRETED: Final[bool] = bool(triton.knobs.runtime.interpret)
"""Whether kernels run under Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors."""


class Target(NamedTuple):
    """What code is generated for: backend "cuda" with arch 80, 90, 100 (compute capability), or "hip" with "gfx942"."""

    backend: str
    arch: int | str

    @property
    def is_hopper_or_later(self) -> bool:
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90


TARGETS: Final = (Target("cuda", 80), Target("cuda", 90), Target("cuda", 100), Target("hip", "gfx942"))
"""The targets that kernels are compiled for ahead of time in the tests."""

# What the interpreter takes its launch choices for.
_INTERPRETED_TARGET: Final = TARGETS[0]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: `arguments` in the kernel's order without its constexprs, which are `constants`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.fn.__name__)


@dataclass(frozen=True, slots=True)
class _Observer:
    runs: bool
    target: Target | None
    launches: list[Launch] = field(default_factory=list)


_observer: ContextVar[_Observer | None] = ContextVar("_observer", default=None)


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Launches are listed instead of run, with the choices for `target`. Outputs are left uninitialised."""
    yield from _observe(_Observer(runs=False, target=target))


@contextmanager
def watching() -> Iterator[list[Launch]]:
    """Launches are run, and listed too."""
    yield from _observe(_Observer(runs=True, target=None))


def _observe(observer: _Observer) -> Iterator[list[Launch]]:
    token = _observer.set(observer)
    try:
        yield observer.launches
    finally:
        _observer.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Run `kernel` over `grid` (not empty) on the current stream; `constants` are its constexpr parameters."""
    observer = _observer.get()
    if observer is not None:
        observer.launches.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
        if not observer.runs:
            return
    # Fusing a product and a sum is one rounding less; its default differs between versions of Triton.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    run: Callable[..., object] = kernel[grid]
    run(*arguments, **constants, **options)


def current_target(device: torch.device) -> Target:
    """What kernels on `device` are compiled for: the recorded target, else the device's own."""
    observer = _observer.get()
    if observer is not None and observer.target is not None:
        return observer.target
    return _INTERPRETED_TARGET if INTERPRETED else _device_target(device.index or 0)


@cache
def _device_target(index: int) -> Target:
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)
