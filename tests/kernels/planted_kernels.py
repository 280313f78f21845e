"""Kernels with the faults that ahead-of-time compilation must find. `python -m tests.kernels.planted_kernels` compiles
them and prints JSON; it needs a process in which Triton does not interpret."""

import json
import sys

import torch
import triton
import triton.language as tl

from peftserve_kernels.gpu import aot
from peftserve_kernels.gpu.launch import Target, launch, recording


@triton.jit
def sound(x, y, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index, mask=index < n) * 2.0, mask=index < n)


@triton.jit
def spilling(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of SIZE / 16 * SIZE registers a thread of one warp, all of it needed twice."""
    index = tl.arange(0, SIZE)[:, None] * 2 * SIZE + tl.arange(0, 2 * SIZE)[None, :]
    tile = tl.load(x + index)
    tile -= tl.max(tile, axis=1)[:, None]
    tl.store(y + index, tile - tl.max(tile, axis=1)[:, None])


@triton.jit
def product(x, w, y, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [M, k] times w [k, N]; WIDE multiplies in float32."""
    row, column, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, k, K):
        a = tl.load(x + row[:, None] * k + start + depth[None, :])
        b = tl.load(w + (start + depth)[:, None] * N + column[None, :])
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(y + row[:, None] * N + column[None, :], acc)


def main() -> int:
    target = Target("cuda", 80)
    floats = torch.empty(1 << 16, device="meta")
    halves = torch.empty(1 << 16, dtype=torch.bfloat16, device="meta")
    with recording(target) as launches:
        launch(sound, (1,), floats, floats, 512, BLOCK=512, num_warps=4)
        launch(spilling, (1,), floats, floats, SIZE=64, num_warps=1)
        small = {"M": 16, "N": 32, "K": 32, "num_warps": 4, "num_stages": 2}
        launch(product, (1,), halves, halves, floats, 1024, WIDE=False, **small)
        launch(product, (1,), halves, halves, floats, 1024, WIDE=True, **small)
        launch(product, (1,), halves, halves, floats, 1024, WIDE=False, M=16, N=64, K=128, num_warps=4, num_stages=12)
        launch(sound, (1,), floats, floats, 1, BLOCK=128, num_warps=4)
        launch(sound, (1,), floats[1:], floats, 511, BLOCK=512, num_warps=4)
    found = []
    for made in launches:
        item = aot.case(made, target)
        binary = aot.compile_case(item)
        faults = aot.faults(item, binary, wants_tensor_cores=True)
        signature = {name: str(kind) for name, kind in item.signature.items()}
        found.append({"kernel": made.name, "faults": faults, "signature": signature, "binary": binary.as_dict()})
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
