"""A step's plan as tensors: built once a step with numpy, then read by every layer."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from peftserve.engine.plan import SegmentPlan, StepPlan
from peftserve_kernels.dispatch import Backend, backend_for
from peftserve_kernels.paged_attention import AttentionBatch, cut_queries
from peftserve_kernels.segments import Segments


@dataclass(frozen=True, slots=True)
class Batch:
    """M tokens of S rows, on the device.

    `token_ids`, `positions` int64 [M]; `slots` int64 [M], page * page_size + offset of each token's K and V;
    `sample_rows` int64 [B], the last token of each row that samples, None when all tokens do; `lora` and
    `bottleneck` are None when nothing in the batch uses one.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    attention: AttentionBatch
    sample_rows: torch.Tensor | None
    lora: Segments | None
    bottleneck: Segments | None


def build_batch(plan: StepPlan, page_size: int, device: torch.device) -> Batch:
    """The tensors of `plan`, which has at least one row."""
    rows = plan.rows
    lengths = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
    computed = np.fromiter((row.num_computed for row in rows), np.int64, len(rows))
    query_start = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=query_start[1:])
    num_tokens = int(query_start[-1])
    tables = np.zeros((len(rows), max(len(row.block_table) for row in rows)), np.int32)
    token_ids = np.empty(num_tokens, np.int64)
    for index, row in enumerate(rows):
        tables[index, : len(row.block_table)] = row.block_table
        token_ids[query_start[index] : query_start[index + 1]] = row.token_ids
    row_of = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(num_tokens) + (computed - query_start[:-1])[row_of]
    slots = tables[row_of, positions // page_size].astype(np.int64) * page_size + positions % page_size
    sampled = [index for index, row in enumerate(rows) if row.sample is not None]

    def put(array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    decode = prefill = None
    if backend_for(device) is Backend.TRITON:
        decode, prefill = map(put, cut_queries(query_start))

    return Batch(
        token_ids=put(token_ids),
        positions=put(positions),
        slots=put(slots),
        attention=AttentionBatch(
            block_tables=put(tables),
            query_start=put(query_start),
            context_len=put((computed + lengths).astype(np.int32)),
            decode=decode,
            prefill=prefill,
        ),
        sample_rows=None if len(sampled) == num_tokens else put(query_start[1:][sampled].astype(np.int64) - 1),
        lora=_segments(plan.lora, device),
        bottleneck=_segments(plan.bottleneck, device),
    )


def _segments(plan: SegmentPlan, device: torch.device) -> Segments | None:
    if not plan.slot:
        return None
    return Segments.build(plan.start, plan.slot, device)
