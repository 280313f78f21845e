"""One sequence on its way out: engine events in, deltas out."""

from peftserve.api.request import Delta, TokenLogprob, TokenText
from peftserve.errors import InternalError, RequestAbortedError, from_info
from peftserve.text.stream import TextStream
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import EngineRequest, FinishReason, TokenEvent, TokenLogprobs


class SequenceOutput:
    """Turns the events of `request` into deltas and keeps its counts. `outcome` is its end, as metrics name it."""

    def __init__(self, *, index: int, request: EngineRequest, text: TextStream, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.queued_s = 0.0
        self.adapter_wait_s = 0.0
        self.first_token_at: float | None = None
        self.was_started = False  # whether the engine has begun with the prompt
        self.outcome: str = FinishReason.ABORT
        self._text = text
        self._tokenizer = tokenizer

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def take(self, event: TokenEvent, now: float) -> Delta:
        """The delta for `event`. A stop string ends the sequence before the event's later tokens.

        Raises the event's error, and `RequestAbortedError` if something but the client aborted it.
        """
        if event.num_cached_tokens is not None:
            self.num_cached_tokens = event.num_cached_tokens
        self.was_started |= bool(event.token_ids) or event.queued_s is not None
        self.queued_s = event.queued_s or self.queued_s
        self.adapter_wait_s = event.adapter_wait_s or self.adapter_wait_s
        if event.finish_reason is FinishReason.ERROR:
            raise InternalError("the engine gave no reason") if event.error is None else from_info(event.error)
        if event.finish_reason is FinishReason.ABORT:
            raise RequestAbortedError("the request was aborted")
        if event.token_ids and self.first_token_at is None:
            self.first_token_at = now
        pieces: list[str] = []
        used, stop = 0, None
        for token_id in event.token_ids:
            text, stop = self._text.push(token_id)
            pieces.append(text)
            used += 1
            if stop is not None:
                break
        if stop is None and event.finish_reason is not None:
            text, stop = self._text.finish()
            pieces.append(text)
        reason = FinishReason.STOP if stop is not None else event.finish_reason
        if reason is not None:
            self.outcome = reason
        self.num_tokens += used
        return Delta(
            index=self.index,
            text="".join(pieces),
            token_ids=tuple(event.token_ids[:used]),
            logprobs=tuple(self._logprob(entry) for entry in event.logprobs[:used]),
            finish_reason=reason,
            stop_reason=stop if stop is not None else self._stop_token(event),
        )

    def _stop_token(self, event: TokenEvent) -> int | None:
        asked = event.stop_token_id in self.request.sampling.stop_token_ids
        return event.stop_token_id if asked else None

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = tuple(self._token_text(token_id, logprob) for token_id, logprob in entry.top)
        return TokenLogprob(chosen=self._token_text(entry.token_id, entry.logprob), top=top)

    def _token_text(self, token_id: int, logprob: float) -> TokenText:
        raw = self._tokenizer.token_bytes(token_id)
        return TokenText(token_id=token_id, logprob=logprob, text=raw.decode(errors="replace"), bytes=raw)
