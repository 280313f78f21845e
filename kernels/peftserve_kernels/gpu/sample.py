"""sample without a sort: a search for the logit at which a running sum passes a target.

The tokens that stand before the pick in the order of `sample` are those of a larger logit, and, among equals, of a
lower id. So every filter and the pick itself is one question: which is the largest logit such that the tokens at or
above it number k (top_k), or weigh m (top_p, the pick)? It is answered on the bits of the logit, a few of them a pass.
Weights e^((l - largest) / temperature) are summed as integers in units of 2^-40: sums are exact, so no order of
summation, no chunk size and no other row has a part in the result. A weight below 2^-40 of the largest counts as
nothing: the most that tokens of that kind lose together is 2^-40 V of the largest weight.

Four launches, their grids by shape alone:
1. the largest logit of each chunk of the vocabulary, and the first token that has it: greedy rows need no more;
2. of each chunk, the number and the weight of its tokens within 1/2, 1, 2, ... 32 temperatures of the row's largest;
3. the tokens of the nearest level that holds the pick are copied out in the order of their ids, if they are few;
4. a program a row searches among those, else among the whole row.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.launch import launch

_MAX_CHUNK: Final = 2048

# Distances 2^(i - 1) from the largest logit, in temperatures, at which a row is tallied; the last one is all of it.
_LEVELS: Final = tl.constexpr(8)
_UNIT: Final = tl.constexpr(2.0**40)
_LOWEST_KEY: Final = tl.constexpr(-(2**31))
_SMALLEST_NORMAL: Final = tl.constexpr(2.0**-126)


class SampleConfig(NamedTuple):
    """chunk: tokens a program takes at a time; copied: most tokens of a row that are copied out, and the warps of the
    programs that take one chunk and of those that search a row."""

    chunk: int
    copied: int
    chunk_warps: int
    row_warps: int


def choose(vocab: int) -> SampleConfig:
    """Sixteen logits a thread, eight in the search; rows smaller than a chunk are padded to a power of two."""
    chunk = min(_MAX_CHUNK, max(32, triton.next_power_of_2(vocab)))
    warps = max(1, chunk // 256)
    return SampleConfig(chunk, copied=2 * chunk, chunk_warps=max(1, warps // 2), row_warps=warps)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """See `peftserve_kernels.sample`. Boundaries between tokens are those of exact sums of float32 weights; the
    reference adds float32 probabilities, so that a `uniform`, `top_p` or `min_p` within about 1e-6 of a boundary may
    give the token next to the reference's."""
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    config = choose(vocab)
    chunks = triton.cdiv(vocab, config.chunk)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    maxima, firsts = scratch(chunks, dtype=torch.float32), scratch(chunks, dtype=torch.int32)
    counts = scratch(_LEVELS.value, chunks, dtype=torch.int32)
    masses = scratch(_LEVELS.value, chunks, dtype=torch.int64)
    values, tokens = scratch(config.copied, dtype=torch.float32), scratch(config.copied, dtype=torch.int32)
    levels = scratch(dtype=torch.int32)
    sizes = {"CHUNK": config.chunk, "CHUNKS_PADDED": triton.next_power_of_2(chunks)}
    row = (logits, logits.stride(0), vocab, chunks, maxima)
    tallies = (counts, masses)
    temperature, top_k, top_p, min_p, uniform = (x.contiguous() for x in (temperature, top_k, top_p, min_p, uniform))
    parameters = (temperature, top_k, top_p, min_p, uniform)
    grid, warps = (rows, chunks), config.chunk_warps
    launch(_chunk_maxima, grid, *row, firsts, CHUNK=config.chunk, num_warps=warps)
    launch(_chunk_tallies, grid, *row, *tallies, temperature, **sizes, num_warps=warps)
    copies = (values, tokens, levels)
    launch(_copy_out, grid, *row, *tallies, *parameters, *copies, **sizes, COPIED=config.copied, num_warps=warps)
    launch(
        _pick,
        (rows,),
        *row,
        firsts,
        *tallies,
        *parameters,
        *copies,
        ids,
        **sizes,
        COPIED=config.copied,
        num_warps=config.row_warps,
    )
    return ids


@triton.jit
def _load(source, length, chunk, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A chunk's positions and logits. NaN, of which nothing is picked, becomes -inf, so that every loop ends."""
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(source + position, mask=position < length, other=-float("inf"))
    return position, tl.where(value == value, value, -float("inf"))


@triton.jit
def _key(value):  # type: ignore[no-untyped-def]
    """int32 in the order of the floats; both zeros are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _weight(value, largest, temperature):  # type: ignore[no-untyped-def]
    """e^((value - largest) / temperature) in units of 2^-40, int64. Both arguments finite, or value -inf."""
    temperature = tl.maximum(temperature, _SMALLEST_NORMAL)
    # farther down the weight is nothing: 64 temperatures are e^-64
    distance = tl.maximum(value - largest, -64.0 * temperature)
    return (tl.exp(distance / temperature) * _UNIT).to(tl.int64)


@triton.jit
def _level_key(largest, temperature, level):  # type: ignore[no-untyped-def]
    """The key at a level's distance. The product is exact, so that fusing it into the difference changes nothing."""
    distance = temperature * ((1 << level).to(tl.float32) * 0.5)
    key = _key(largest - distance)
    return tl.where(level == _LEVELS - 1, _LOWEST_KEY, key)


@triton.jit
def _row_largest(maxima, row, chunks, CHUNKS_PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    chunk = tl.arange(0, CHUNKS_PADDED)
    values = tl.load(maxima + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    return tl.max(values, axis=0)


@triton.jit
def _is_drawn(temperature, largest):  # type: ignore[no-untyped-def]
    """Whether the row needs weights: not a greedy one, nor one without a pick, where none are defined."""
    return (temperature != 0.0) & _has_pick(largest)


@triton.jit
def _has_pick(largest):  # type: ignore[no-untyped-def]
    return (largest > -float("inf")) & (largest < float("inf"))


@triton.jit
def _level_tallies(  # type: ignore[no-untyped-def]
    counts, masses, row, chunks, CHUNKS_PADDED: tl.constexpr
):
    """A row's tallies by level, int64 [LEVELS]."""
    chunk = tl.arange(0, CHUNKS_PADDED)[None, :]
    at = (row * _LEVELS + tl.arange(0, _LEVELS)[:, None]) * chunks + chunk
    count = tl.sum(tl.load(counts + at, mask=chunk < chunks, other=0).to(tl.int64), axis=1)
    return count, tl.sum(tl.load(masses + at, mask=chunk < chunks, other=0), axis=1)


@triton.jit
def _smallest_key(largest, temperature, min_p):  # type: ignore[no-untyped-def]
    """min_p as a bound of the logits, so that what it keeps is a beginning of the order; the largest always is."""
    return _key(tl.minimum(largest + temperature * tl.log(min_p), largest))


@triton.jit
def _nucleus(top_p, whole):  # type: ignore[no-untyped-def]
    """The weight that a nucleus must reach, 1 .. whole."""
    wanted = tl.ceil(top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), whole)


@triton.jit
def _chunk_maxima(  # type: ignore[no-untyped-def]
    logits, stride, vocab, chunks, maxima, firsts, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * stride + token, mask=token < vocab, other=-float("inf"))
    value = tl.where(value == value, value, float("inf"))  # so that the row's largest is not finite
    largest = tl.max(value, axis=0)
    tl.store(maxima + row * chunks + chunk, largest)
    tl.store(firsts + row * chunks + chunk, tl.min(tl.where(value == largest, token, vocab), axis=0))


@triton.jit
def _chunk_tallies(  # type: ignore[no-untyped-def]
    logits,
    stride,
    vocab,
    chunks,
    maxima,
    counts,
    masses,
    temperatures,
    CHUNK: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
):
    """Of one chunk, how many tokens lie at or above each level and what they weigh."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    largest = _row_largest(maxima, row, chunks, CHUNKS_PADDED)
    if _is_drawn(temperature, largest):
        token, value = _load(logits + row * stride, vocab, chunk, CHUNK)
        key = _key(value)
        weight = _weight(value, largest, temperature)
        for level in range(_LEVELS):
            inside = (key >= _level_key(largest, temperature, level + tl.full((), 0, tl.int32))) & (token < vocab)
            at = (row * _LEVELS + level) * chunks + chunk
            tl.store(counts + at, tl.sum(inside.to(tl.int32), axis=0))
            tl.store(masses + at, tl.sum(tl.where(inside, weight, 0), axis=0))


@triton.jit
def _copy_out(  # type: ignore[no-untyped-def]
    logits,
    stride,
    vocab,
    chunks,
    maxima,
    counts,
    masses,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    values,
    tokens,
    levels,
    CHUNK: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    COPIED: tl.constexpr,
):
    """The chunk's tokens of the level that the pick is in, behind those of the chunks before, in the order of ids."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    largest = _row_largest(maxima, row, chunks, CHUNKS_PADDED)
    if _is_drawn(temperature, largest):
        level = tl.arange(0, _LEVELS)
        level_counts, level_masses = _level_tallies(counts, masses, row, chunks, CHUNKS_PADDED)
        level_keys = _level_key(largest, temperature, level)
        whole = tl.max(level_masses, axis=0)
        top_k = tl.load(top_ks + row).to(tl.int64)
        top_p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        # the first filter that is on bounds what all of them keep together, and so the pick
        if (top_k > 0) & (top_k < vocab):
            holds = level_counts >= top_k
        elif top_p < 1.0:
            holds = level_masses >= _nucleus(top_p, whole)
        elif min_p > 0.0:
            holds = level_keys <= _smallest_key(largest, temperature, min_p)
        else:
            holds = level_masses > tl.load(uniforms + row).to(tl.float64) * whole.to(tl.float64)
        chosen = tl.min(tl.where(holds, level, _LEVELS - 1), axis=0)
        if chunk == 0:
            # once, so that `_pick` cannot come to another one
            tl.store(levels + row, chosen)
        count = tl.sum(tl.where(level == chosen, level_counts, 0), axis=0)
        if count <= COPIED:
            others = tl.arange(0, CHUNKS_PADDED)
            at = (row * _LEVELS + chosen) * chunks + others
            before = tl.sum(tl.load(counts + at, mask=others < chunk, other=0), axis=0)
            token, value = _load(logits + row * stride, vocab, chunk, CHUNK)
            inside = (_key(value) >= _level_key(largest, temperature, chosen)) & (token < vocab)
            to = row * COPIED + before + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            tl.store(values + to, value, mask=inside)
            tl.store(tokens + to, token, mask=inside)


@triton.jit
def _tally(  # type: ignore[no-untyped-def]
    source, length, largest, temperature, end, a, b, c, CHUNK: tl.constexpr
):
    """How many tokens have keys in a .. end, b .. end and c .. end (end excluded; a <= b <= c), and their weights."""
    count_a = tl.full((CHUNK,), 0, tl.int32)
    count_b = tl.full((CHUNK,), 0, tl.int32)
    count_c = tl.full((CHUNK,), 0, tl.int32)
    mass_a = tl.full((CHUNK,), 0, tl.int64)
    mass_b = tl.full((CHUNK,), 0, tl.int64)
    mass_c = tl.full((CHUNK,), 0, tl.int64)
    for chunk in range(tl.cdiv(length, CHUNK)):
        position, value = _load(source, length, chunk, CHUNK)
        key = _key(value)
        weight = _weight(value, largest, temperature)
        inside = (key < end) & (position < length)
        count_a += (inside & (key >= a)).to(tl.int32)
        count_b += (inside & (key >= b)).to(tl.int32)
        count_c += (inside & (key >= c)).to(tl.int32)
        mass_a += tl.where(inside & (key >= a), weight, 0)
        mass_b += tl.where(inside & (key >= b), weight, 0)
        mass_c += tl.where(inside & (key >= c), weight, 0)
    return (
        tl.sum(count_a, axis=0).to(tl.int64),
        tl.sum(count_b, axis=0).to(tl.int64),
        tl.sum(count_c, axis=0).to(tl.int64),
        tl.sum(mass_a, axis=0),
        tl.sum(mass_b, axis=0),
        tl.sum(mass_c, axis=0),
    )


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    source,
    length,
    largest,
    temperature,
    level_keys,
    level_counts,
    level_masses,
    target,
    BY_COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The group of equal logits in which the running count or weight reaches `target`, 1 .. what the row has.

    Returns its keys low .. high (high excluded; one key, or more when they hold one token), and the count and weight
    at or above low, and at or above high.
    """
    reached = (level_counts if BY_COUNT else level_masses) >= target
    low = tl.max(tl.where(reached, level_keys, _LOWEST_KEY), axis=0).to(tl.int64)
    low_count = tl.min(tl.where(reached, level_counts, 1 << 62), axis=0)
    low_mass = tl.min(tl.where(reached, level_masses, 1 << 62), axis=0)
    top = _key(largest).to(tl.int64) + 1
    high = tl.min(tl.where(reached, top, level_keys.to(tl.int64)), axis=0)
    high_count = tl.max(tl.where(reached, 0, level_counts), axis=0)
    high_mass = tl.max(tl.where(reached, 0, level_masses), axis=0)
    while (high - low > 1) & (low_count - high_count > 1):
        width = high - low
        a = low + width // 4
        b = low + width // 2
        c = low + width * 3 // 4
        count_a, count_b, count_c, mass_a, mass_b, mass_c = _tally(
            source, length, largest, temperature, high, a, b, c, CHUNK
        )
        base_count = high_count
        base_mass = high_mass
        for index in tl.static_range(3):
            if index == 0:
                key, count, mass = a, base_count + count_a, base_mass + mass_a
            elif index == 1:
                key, count, mass = b, base_count + count_b, base_mass + mass_b
            else:
                key, count, mass = c, base_count + count_c, base_mass + mass_c
            enough = (count if BY_COUNT else mass) >= target
            # a, b, c rise: the last that is enough is the new low, the first that is not the new high
            low_count = tl.where(enough, count, low_count)
            low_mass = tl.where(enough, mass, low_mass)
            low = tl.where(enough, key, low)
            is_new_high = (enough == 0) & (key < high)
            high_count = tl.where(is_new_high, count, high_count)
            high_mass = tl.where(is_new_high, mass, high_mass)
            high = tl.where(is_new_high, key, high)
    return low, high, low_count, low_mass, high_count, high_mass


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    logits,
    stride,
    vocab,
    chunks,
    maxima,
    firsts,
    counts,
    masses,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    values,
    tokens,
    levels,
    ids,
    CHUNK: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    COPIED: tl.constexpr,
):
    """A row's pick: its group of equal logits, its place in the group, its id."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    largest = _row_largest(maxima, row, chunks, CHUNKS_PADDED)
    if _is_drawn(temperature, largest):
        level = tl.arange(0, _LEVELS)
        level_counts, level_masses = _level_tallies(counts, masses, row, chunks, CHUNKS_PADDED)
        level_keys = _level_key(largest, temperature, level)
        copied = tl.sum(tl.where(level == tl.load(levels + row), level_counts, 0), axis=0)
        is_copied = copied <= COPIED
        if is_copied:
            source = values + row * COPIED
            length = copied.to(tl.int32)
        else:
            source = logits + row * stride
            length = vocab
        # the filters all keep a beginning of the order, so the lightest beginning is what they keep together
        kept = tl.max(level_masses, axis=0)
        top_k = tl.load(top_ks + row).to(tl.int64)
        if (top_k > 0) & (top_k < vocab):
            _, _, low_count, low_mass, high_count, high_mass = _search(
                source, length, largest, temperature, level_keys, level_counts, level_masses, top_k, True, CHUNK
            )
            each = (low_mass - high_mass) // (low_count - high_count)
            kept = high_mass + (top_k - high_count) * each
        top_p = tl.load(top_ps + row)
        if top_p < 1.0:
            wanted = _nucleus(top_p, kept)
            _, _, low_count, low_mass, high_count, high_mass = _search(
                source, length, largest, temperature, level_keys, level_counts, level_masses, wanted, False, CHUNK
            )
            each = (low_mass - high_mass) // (low_count - high_count)
            kept = high_mass + (wanted - high_mass + each - 1) // each * each
        min_p = tl.load(min_ps + row)
        if min_p > 0.0:
            smallest = _smallest_key(largest, temperature, min_p)
            end = _key(largest).to(tl.int64) + 1
            _, _, _, mass, _, _ = _tally(source, length, largest, temperature, end, smallest, smallest, smallest, CHUNK)
            kept = tl.minimum(kept, mass)
        target = (tl.load(uniforms + row).to(tl.float64) * kept.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, kept - 1)
        low, high, low_count, low_mass, high_count, high_mass = _search(
            source, length, largest, temperature, level_keys, level_counts, level_masses, target + 1, False, CHUNK
        )
        place = (target - high_mass) // ((low_mass - high_mass) // (low_count - high_count))
        before = tl.full((), 0, tl.int64)
        found = tl.full((), 0, tl.int32)
        for chunk in range(tl.cdiv(length, CHUNK)):
            position, value = _load(source, length, chunk, CHUNK)
            key = _key(value)
            inside = ((key >= low) & (key < high) & (position < length)).to(tl.int32)
            is_pick = (inside == 1) & (before + tl.cumsum(inside, axis=0) == place + 1)
            found += tl.sum(tl.where(is_pick, position, 0), axis=0)
            before += tl.sum(inside, axis=0)
        pick = found
        if is_copied:
            pick = tl.load(tokens + row * COPIED + found)
        tl.store(ids + row, pick.to(tl.int64))
    else:
        # greedy: the first token of the largest logit
        others = tl.arange(0, CHUNKS_PADDED)
        value = tl.load(maxima + row * chunks + others, mask=others < chunks, other=-float("inf"))
        first = tl.load(firsts + row * chunks + others, mask=(value == largest) & (others < chunks), other=vocab)
        tl.store(ids + row, tl.where(_has_pick(largest), tl.min(first, axis=0), -1).to(tl.int64))
