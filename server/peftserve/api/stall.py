"""Streams whose clients do not read: a write that has waited too long, and what then is told, on both doors."""

import time

from peftserve.log import get_logger
from peftserve.metrics import Metrics

log = get_logger(__name__)


class StallWatch:
    """When the write that is under way began. Of each stream there is one writer, and somebody who looks now and then:
    a timer for each write would cost more, as those come by the thousands a second."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._began: float | None = None

    def begin(self) -> None:
        """A write begins."""
        self._began = time.monotonic()

    def end(self) -> float | None:
        """The client has taken it. Returns when it began (`time.monotonic`)."""
        began, self._began = self._began, None
        return began

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way."""
        return self._began is not None

    @property
    def is_stalled(self) -> bool:
        """Whether it has waited for `timeout_s`."""
        return self._began is not None and time.monotonic() - self._began >= self.timeout_s

    @property
    def look_s(self) -> float:
        """How often to look."""
        return self.timeout_s / 4


def tell(metrics: Metrics, door: str, request_id: str, timeout_s: float) -> None:
    """Count and log a stream that is aborted because its client does not read; `door`: http or grpc."""
    metrics.stream_stalled(door)
    log.warning("stream aborted: its client does not read", request_id=request_id, timeout_s=timeout_s)
