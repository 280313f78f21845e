"""The text of one sequence as its tokens come: detokenising and stop strings together."""

from collections.abc import Sequence

from peftserve.text.detokenizer import detokenizer
from peftserve.text.stop import StopChecker
from peftserve.text.tokenizer import Tokenizer


class TextStream:
    """Push tokens, get text. `min_tokens` is how many tokens pass before stop strings count."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopChecker(stop, include=include_stop)
        self._min_tokens = min_tokens
        self.num_tokens = 0

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string if this token completed one: then the stream has ended."""
        self.num_tokens += 1
        text = self._detokenizer.push(token_id)
        if self.num_tokens <= self._min_tokens:
            return text, None
        return self._stops.push(text)

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text at the end, and a stop string if the rest completes one."""
        text, stop = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush(), stop
