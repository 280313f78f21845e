"""Collects everything that is wrong with an upload, so that its author hears all of it at once."""

from peftserve.errors import InvalidAdapterError

MAX_FAULTS = 50
"""Faults reported in full; the rest is counted. A file made for another base can have thousands."""

_FAULTS_IN_MESSAGE = 3


class FaultList:
    """Faults of one upload, in the order found. Each is a sentence that can stand alone."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def add(self, text: str) -> None:
        if text in self._texts:
            return
        self._total += 1
        if self._total <= MAX_FAULTS:
            self._texts.append(text)

    def error(self) -> InvalidAdapterError:
        """One error with all faults, for `if faults: raise faults.error()`."""
        faults = list(self._texts)
        if self._total > MAX_FAULTS:
            faults.append(f"+{self._total - MAX_FAULTS} more")
        shown = "; ".join(self._texts[:_FAULTS_IN_MESSAGE])
        if self._total == 1:
            message = f"adapter refused: {shown}"
        else:
            rest = self._total - min(self._total, _FAULTS_IN_MESSAGE)
            message = f"adapter refused for {self._total} faults: {shown}" + (f"; +{rest} more" if rest else "")
        return InvalidAdapterError(message, faults=faults)


def refusal(text: str) -> InvalidAdapterError:
    """The error for a single fault after which nothing else can be checked."""
    return InvalidAdapterError(f"adapter refused: {text}", faults=[text])


def quote(text: str) -> str:
    """`text` from an untrusted file for a message: quoted, control characters escaped, shortened to 200 characters."""
    shown = text if len(text) <= 200 else text[:200] + "..."
    return repr(shown)
