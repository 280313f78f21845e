"""When to try again, and after how long: exponential backoff with full jitter, or what the server asks for.

tenacity rather than stamina on top of it: stamina reports each retry through structlog wherever that is installed,
which unconfigured prints to standard output, and a library must not write into a program's output.
"""

from dataclasses import dataclass

import tenacity

from peftserve_client.errors import ApiError, ConnectionFailedError, OverloadedError, UnavailableError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` in all (1: never retry), within `total_s` seconds, waiting at most `max_wait_s` between two.

    The wait before attempt k is drawn evenly from [0, min(max_wait_s, first_wait_s · 2^(k-1))] ("full jitter", so
    that clients of a restarted server do not return in step). A server's Retry-After is waited out instead, with up
    to a tenth on top; one beyond `max_wait_s` ends the retries, as the caller may know better things to do.
    """

    attempts: int = 4
    total_s: float = 60.0
    first_wait_s: float = 0.25
    max_wait_s: float = 10.0

    def retryable(self, error: BaseException) -> bool:
        """Connection errors, "overloaded" and "unavailable": the server did no work that repeating would double."""
        if isinstance(error, ConnectionFailedError):
            return True
        if isinstance(error, OverloadedError | UnavailableError):
            return (error.retry_after_s or 0.0) <= self.max_wait_s
        return False

    def sync(self) -> tenacity.Retrying:
        """An iterator of attempts: `for attempt in policy.sync(): with attempt: ...`."""
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(self.retryable),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(self.total_s),
            wait=self._wait,
            reraise=True,
        )

    def asynchronous(self) -> tenacity.AsyncRetrying:
        """The same for `async for`."""
        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self.retryable),
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_before_delay(self.total_s),
            wait=self._wait,
            reraise=True,
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, ApiError) and error.retry_after_s is not None:
            return error.retry_after_s + float(tenacity.wait_random(0, error.retry_after_s / 10)(state))
        backoff = tenacity.wait_random_exponential(multiplier=self.first_wait_s, max=self.max_wait_s)
        return float(backoff(state))
