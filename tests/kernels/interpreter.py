"""Triton's interpreter, made fit for comparing bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@contextmanager
def rows_alike() -> Iterator[None]:
    """Products in float64, rounded once: in float32, NumPy's order of summing a row depends on where the row stands."""

    def create_dot(_self: object, a: Any, b: Any, d: Any, *_options: object) -> Any:
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield
