"""Stop strings: found across borders, whatever the borders; nothing shown that would have to be taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftserve.text.stop import StopChecker

letters = st.text("ab\u00e9", max_size=24)


def run(stops: list[str], pieces: list[str], *, include: bool = False) -> tuple[list[str], str | None]:
    checker = StopChecker(stops, include=include)
    shown: list[str] = []
    for piece in pieces:
        text, stop = checker.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, checker.flush()], None


def first_end(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(end, begin, stop) of the stop that a reader, letter by letter, would notice first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end, end - len(longest), longest
    return None


@given(st.lists(letters, max_size=12), st.lists(letters.filter(bool).map(lambda s: s[:4]), max_size=3), st.booleans())
def test_as_a_reader_letter_by_letter_would(pieces: list[str], stops: list[str], include: bool) -> None:
    shown, stop = run(stops, pieces, include=include)
    text = "".join(pieces)
    found = first_end(text, stops)
    if found is None:
        assert (stop, "".join(shown)) == (None, text)
    else:
        end, begin, expected = found
        assert (stop, "".join(shown)) == (expected, text[: end if include else begin])


@pytest.mark.parametrize("pieces", [["Hello\n", "\nUser:"], ["Hello\n\nUs", "er: x"], list("Hello\n\nUser:")])
def test_across_borders(pieces: list[str]) -> None:
    shown, stop = run(["\n\nUser:"], pieces)
    assert "".join(shown) == "Hello"
    assert stop == "\n\nUser:"


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    checker = StopChecker(["END"])
    assert checker.push("the E") == ("the ", None)
    assert checker.push("N") == ("", None)
    assert checker.push("Z") == ("ENZ", None)
    assert checker.push("E") == ("", None)
    assert checker.flush() == "E"


def test_without_stops_text_passes() -> None:
    assert run([], ["a", "b"]) == (["a", "b", ""], None)
