"""Stop strings in a stream of text, also across its borders."""

from collections.abc import Sequence


class StopChecker:
    """Holds back text that may be the beginning of a stop string, and cuts at the first one that completes.

    The result does not depend on how the text was cut into pieces: of several matches the one that ends first wins,
    of those that end together the one that begins first.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include` leaves the stop string itself in the text."""
        self._stops = tuple(stops)
        self._include = include
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string if one completed (nothing may be pushed after that)."""
        if not self._stops:
            return text, None
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            begin, stop = match
            self._held = ""
            return text[: begin + len(stop)] if self._include else text[:begin], stop
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if not found:
            return None
        _, begin, stop = min(found)
        return begin, stop

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
