"""sample: pick one token a row."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from peftserve_kernels.cpu import sample as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op

# Candidates looked at before the whole vocabulary is sorted: nearly every draw falls into the first few.
_FIRST_WIDTHS: Final = (256, 4096)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """One token id a row, or -1: int64 [B]. Not in place.

    logits: float32 [B, V]; temperature: float32 [B], 0 for greedy (the largest logit, the lowest id among equals);
    top_k: int32 [B], 0 for off; top_p: float32 [B], 1 for off; min_p: float32 [B], 0 for off; uniform: float32 or
    float64 [B] in [0, 1), one random number a row.

    A row that is not greedy orders its tokens by softmax(logits / temperature), largest first, the lowest id first
    among equals, and filters them step by step: the first top_k; of those, renormalised, the fewest whose sum reaches
    top_p (Holtzman et al. 2020, arXiv:1904.09751); of those the ones with at least min_p times the largest probability
    (Nguyen et al. 2024, arXiv:2407.01082). At least one stays. The pick is the first token at which the running sum,
    renormalised, exceeds `uniform`. It depends on that row's values alone. A row with NaN or +inf, or with nothing but
    -inf, has none: it gets -1.
    Raises ValueError when logits is not float32 [B, V] or a parameter is not [B].
    """
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits: must be float32 [B, V], got {logits.dtype} {list(logits.shape)}")
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, value in parameters.items():
        if value.shape != logits.shape[:1]:
            raise ValueError(f"{name}: must be [{logits.shape[0]}], got {list(value.shape)}")
    return select(_IMPLEMENTATIONS, logits.device)(logits, temperature, top_k, top_p, min_p, uniform)


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """Row by row: rows share nothing, and a row's working set stays in the cache."""
    parameters = zip(
        temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), uniform.tolist(), strict=True
    )
    picks = [_pick(row, *row_parameters) for row, row_parameters in zip(logits, parameters, strict=True)]
    return torch.tensor(picks, dtype=torch.int64, device=logits.device)


def _pick(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    if not logits.max().isfinite():  # the largest of NaN and others is NaN
        return -1
    return int(logits.argmax()) if temperature == 0.0 else _draw(logits, temperature, top_k, top_p, min_p, uniform)


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """Inverse CDF over the most probable tokens, looking at more of them only while the pick is not certain."""
    vocab = logits.shape[0]
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    limit = top_k if 0 < top_k < vocab else vocab
    filtered = limit < vocab or top_p < 1.0 or min_p > 0.0
    widths = (limit,) if limit < vocab else (*(w for w in _FIRST_WIDTHS if w < vocab), vocab)
    for width in widths:
        ids = _most_probable(logits, width)
        chosen = probabilities[ids].double()
        cumulative = chosen.cumsum(0)
        whole = 1.0 if limit == vocab else float(cumulative[-1])
        # each filter keeps the beginning of the list, so all together keep the shortest
        kept = int(((chosen > 0) & (chosen >= min_p * chosen[0])).sum())
        if top_p < 1.0:
            kept = min(kept, int((cumulative < top_p * whole).sum()) + 1)
        kept = max(kept, 1)
        total = float(cumulative[kept - 1]) if filtered else 1.0
        is_certain = kept < width or width == limit or (not filtered and uniform < float(cumulative[-1]))
        if is_certain:
            break
    target = torch.tensor(uniform * total, dtype=torch.float64, device=logits.device)
    pick = int(torch.searchsorted(cumulative[:kept], target, right=True))
    return int(ids[min(pick, kept - 1)])


def _most_probable(logits: Tensor, width: int) -> Tensor:
    """Ids of the `width` largest logits, largest first, the lowest id first among equals."""
    if width < logits.shape[0]:
        # topk leaves open which of several equals it takes; its smallest value does not
        smallest = logits.topk(width, sorted=False).values.min()
        ids = (~(logits < smallest)).nonzero().squeeze(1)
        order = logits[ids].sort(descending=True, stable=True).indices
        return ids[order[:width]]
    return logits.sort(descending=True, stable=True).indices


_Sample = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_IMPLEMENTATIONS: Final[Mapping[Backend, _Sample]] = {
    Backend.REFERENCE: sample_reference,
    **native(cpu.sample),
    **triton_op("sample", "sample"),
}
