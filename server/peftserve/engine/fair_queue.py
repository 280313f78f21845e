"""Who goes next: fair queueing over (tenant, adapter) by virtual token counters. Imports no torch.

"Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): each client is charged for the tokens that it was
served; the waiting client with the smallest counter goes first; a client that comes back from idleness is lifted to the
smallest counter of the busy ones, so that it cannot save up service. Among clients that can be served this starves
nobody; what the scheduler adds is ageing for those that cannot be placed (see `Scheduler`).
"""

import heapq
from collections import deque
from collections.abc import Iterator, Mapping

from peftserve.engine.request import Request

Key = tuple[str, str]

# An output token costs a whole step of a sequence, a prompt token shares one with many (weights of the paper).
PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2


class FairQueue:
    """Waiting requests of all clients."""

    def __init__(self) -> None:
        self._queues: dict[Key, deque[Request]] = {}
        self._counters: dict[Key, float] = {}
        self._active: dict[Key, int] = {}  # requests of a client that are waiting or running

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def enter(self, request: Request) -> None:
        """A request of this client has become live (waiting now, running later)."""
        key = request.fairness_key
        if key not in self._active:
            floor = min((self._counters[other] for other in self._active), default=0.0)
            self._counters[key] = max(self._counters.get(key, 0.0), floor)
        self._active[key] = self._active.get(key, 0) + 1

    def leave(self, request: Request) -> None:
        """The request has finished."""
        key = request.fairness_key
        self._active[key] -= 1
        if not self._active[key]:
            del self._active[key]
            # What an idle client owes fades once the busy ones have caught up; without any, all start anew.
            floor = min((self._counters[other] for other in self._active), default=None)
            if floor is None:
                self._counters.clear()
            elif self._counters[key] <= floor:
                del self._counters[key]

    def push(self, request: Request) -> None:
        """Queue a request behind those of its client."""
        self._queues.setdefault(request.fairness_key, deque()).append(request)

    def push_front(self, request: Request) -> None:
        """Queue a preempted request before those of its client."""
        self._queues.setdefault(request.fairness_key, deque()).appendleft(request)

    def remove(self, request: Request) -> None:
        """Take a request out; KeyError or ValueError when it is not queued."""
        queue = self._queues[request.fairness_key]
        queue.remove(request)
        if not queue:
            del self._queues[request.fairness_key]

    def charge(self, request: Request, num_tokens: int, weight: int) -> None:
        """The client was served `num_tokens`."""
        self._counters[request.fairness_key] += num_tokens * weight

    def in_order(self) -> "FairOrder":
        """The waiting clients as they stand now; good for one step."""
        return FairOrder(self._queues, self._counters)


class FairOrder:
    """The first request of each waiting client, the one with the smallest counter first.

    Looking at one costs the logarithm of the clients, so that a step with many that cannot be placed stays short.
    """

    def __init__(self, queues: Mapping[Key, deque[Request]], counters: Mapping[Key, float]) -> None:
        self._queues = queues
        self._counters = counters
        self._heap = [self._entry(key) for key in queues]
        heapq.heapify(self._heap)

    def next(self) -> Request | None:
        """The next request to start; its client does not come up again unless it is `served`."""
        return self._queues[heapq.heappop(self._heap)[-1]][0] if self._heap else None

    def served(self, request: Request) -> None:
        """The request has started and been charged: its client's next one takes its place in the order."""
        if request.fairness_key in self._queues:
            heapq.heappush(self._heap, self._entry(request.fairness_key))

    def _entry(self, key: Key) -> tuple[float, float, Key]:
        return self._counters[key], self._queues[key][0].arrived, key
