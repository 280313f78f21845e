"""Who may start before a request that has waited too long for KV pages. Imports no torch.

Backfilling as the EASY scheduler of batch jobs does it (Lifka 1995, "The ANL/IBM SP Scheduling System"): a request has
at most so many tokens left, one a step, so it is known when enough of the running ones will have ended at the latest.
Those that end by then, and those that fit beside what will be needed then, delay nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from peftserve.engine.kv_cache import KvPageManager
from peftserve.engine.request import Request


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may grow to."""

    max_batch_tokens: int
    max_model_len: int

    def num_left(self, request: Request) -> int:
        """Tokens that it may still generate."""
        asked = request.spec.sampling.max_tokens - len(request.output_token_ids)
        return min(asked, self.max_model_len - request.num_positions)

    def steps(self, request: Request) -> int:
        """Steps until it has ended, if it has a step's token budget for its prompt."""
        return self.num_left(request) + request.num_pending // self.max_batch_tokens


@dataclass(slots=True)
class Backfill:
    """Room beside a waiting request, which will find its pages in `steps` steps at the latest, and `spare` more."""

    steps: int
    spare: int
    kv: KvPageManager
    bounds: Bounds

    @classmethod
    def beside(cls, waiting: Request, running: Iterable[Request], kv: KvPageManager, bounds: Bounds) -> Self | None:
        """None when the pages will not be there even when all that run have ended.

        Of pages that several share it is not known who gives them back, and pages that the waiting request would find
        in the prefix cache count as missing: an estimate, made anew each step.
        """
        needed = kv.pages_for(waiting.num_positions) - waiting.num_virtual_tokens // kv.page_size
        ends = sorted(running, key=bounds.steps)
        positions = np.array([request.num_positions for request in ends])
        held = np.array([len(request.block_table) for request in ends])
        room = kv.num_available
        for index, request in enumerate(ends):
            room += len(request.block_table) - request.num_shared_pages
            # Those that still run by then have grown.
            steps = bounds.steps(request)
            growth = -(-(positions[index + 1 :] + steps) // kv.page_size) - held[index + 1 :]
            spare = room - needed - int(growth.sum())
            if spare >= 0:
                return cls(steps, spare, kv, bounds)
        return None

    def take(self, request: Request) -> bool:
        """Whether `request` may start; if so, it is counted as started."""
        if self.bounds.steps(request) <= self.steps:
            return True
        pages = self.kv.pages_for(request.num_positions + self.bounds.num_left(request))
        if pages > self.spare:
            return False
        self.spare -= pages
        return True
