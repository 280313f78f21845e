"""From logits to tokens: penalties, the draw, and log-probabilities, row by row independent of the other rows.

Random numbers are a function of (seed, position in the output) alone, so that a request gives the same tokens whatever
runs beside it and also when it is computed again after a preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from peftserve.engine.plan import Sampled, SampleSpec
from peftserve.types import SamplingParams, TokenLogprobs
from peftserve_kernels.penalties import Penalties, RowPenalties, apply_penalties
from peftserve_kernels.sample import sample

_GREEDY_BELOW = 1e-5  # a temperature so low picks the same token, but dividing by it may overflow
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_U64 = (1 << 64) - 1


class Sampler:
    """What rows ask for stays on the device: while they decode, the same rows come step after step."""

    def __init__(self) -> None:
        self._columns: _Columns | None = None

    def sample_rows(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
        """One token for each row of `logits` float32 [B, vocab], which is overwritten.

        Legal but absurd adapter weights can overflow. No row has a part in what others get, so their own request alone
        ends with an error.
        """
        reporting = [index for index, spec in enumerate(specs) if spec.params.logprobs is not None]
        # Of the model's own distribution, so before anything changes the logits.
        log_probs = logits[reporting].log_softmax(dim=-1) if reporting else None
        _penalize(logits, specs)
        tokens = self._draw(logits, specs)
        reports = {} if log_probs is None else _report(log_probs, reporting, specs, tokens)
        return [Sampled(token, reports.get(index), is_finite=token >= 0) for index, token in enumerate(tokens)]

    def _draw(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[int]:
        params = [spec.params for spec in specs]
        columns = self._columns
        if columns is None or params != columns.params:  # mostly the same objects, which the comparison sees first
            columns = self._columns = _Columns.of(params, logits.device)
        uniform = columns.unused_uniform
        if uniform is None:
            numbers = uniforms([spec.seed for spec in specs], [spec.position for spec in specs])
            uniform = torch.from_numpy(numbers).to(logits.device)
        picked: list[int] = sample(
            logits, columns.temperature, columns.top_k, columns.top_p, columns.min_p, uniform
        ).tolist()
        return picked


@dataclass(frozen=True, slots=True)
class _Columns:
    """The arguments of `sample` for rows with `params`, [B] each; `unused_uniform` when none is drawn at random."""

    params: list[SamplingParams]
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    unused_uniform: torch.Tensor | None

    @classmethod
    def of(cls, params: list[SamplingParams], device: torch.device) -> "_Columns":
        temperature = [p.temperature if p.temperature >= _GREEDY_BELOW else 0.0 for p in params]
        return cls(
            params=params,
            temperature=torch.tensor(temperature, dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
            unused_uniform=None if any(temperature) else torch.zeros(len(params), dtype=torch.float64, device=device),
        )


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits, one for each (seed, position); any integers will do as seeds.

    The output function of SplitMix64 (Steele, Lea and Flood 2014) over the seed, then over the position in its stream.
    """
    stream = _mix(np.array([seed & _U64 for seed in seeds], np.uint64) + _GOLDEN)
    bits = _mix(stream + (np.array(positions, np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _penalize(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> None:
    rows = [_row_penalties(spec, logits.shape[1]) for spec in specs]
    if any(row is not None for row in rows):
        apply_penalties(logits, Penalties.build([row or RowPenalties() for row in rows], logits.device))


def _row_penalties(spec: SampleSpec, vocab: int) -> RowPenalties | None:
    """None when the row's logits stay as they are. Ids outside the vocabulary cannot be picked anyway."""
    params = spec.params
    if not (spec.token_counts or params.logit_bias or spec.banned_token_ids):
        return None
    return RowPenalties(
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        output_counts=spec.token_counts,
        bias={token: value for token, value in params.logit_bias.items() if 0 <= token < vocab},
        banned=frozenset(token for token in spec.banned_token_ids if 0 <= token < vocab),
    )


def _report(
    log_probs: torch.Tensor, reporting: Sequence[int], specs: Sequence[SampleSpec], tokens: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """The log-probabilities of rows `reporting`, which are the rows of `log_probs`."""
    wanted = [specs[index].params.logprobs or 0 for index in reporting]
    picked = [tokens[index] for index in reporting]
    sampled = log_probs[range(len(picked)), picked].tolist()
    best = log_probs.topk(min(max(wanted), log_probs.shape[1]), dim=-1)
    values, ids = best.values.tolist(), best.indices.tolist()
    return {
        index: TokenLogprobs(picked[i], sampled[i], list(zip(ids[i], values[i], strict=True))[: wanted[i]])
        for i, index in enumerate(reporting)
    }
