"""One of the n sequences of a request, on its way from tokens back to text."""

import msgspec

from polymoe.client.stop_strings import StopStrings
from polymoe.protocol.request import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    SamplingParams,
    SequenceId,
    TokenLogprobs,
    TokenOutput,
)
from polymoe.text.tokenizer import VariantTokenizer

NOTHING_ALLOWED = "nothing allowed"  # stop reason of an error that is the request's


class CompletionChunk(msgspec.Struct, frozen=True):
    """What one step added to one of the n sequences of a request."""

    request_id: str
    prompt_index: int
    index: int  # which of the n
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None  # one entry a token
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # with the first chunk of sequence 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    # (queue, prefill, decode) seconds, as the engine measured them; with the last token.
    timing: tuple[float, float, float] | None = None


class ClientRequest:
    """A client's request: its prompt and its n sequences."""

    def __init__(
        self,
        request_id: str,
        prompt_index: int,
        variant: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        continued_token_ids: list[int],
        tokenizer: VariantTokenizer | None,
        sampling: SamplingParams,
    ) -> None:
        self.request_id, self.prompt_index = request_id, prompt_index
        self.variant = variant
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.continued_token_ids = continued_token_ids  # what the first token follows
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.sequences: list[OutputSequence] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.num_cached_tokens = 0

    def result(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            variant=self.variant,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sequence.result() for sequence in self.sequences],
            finished=True,
            num_cached_tokens=self.num_cached_tokens,
            prompt_index=self.prompt_index,
        )


class OutputSequence:
    """One of the n sequences: tokens come in, text goes out."""

    def __init__(self, request: ClientRequest, index: int, stop_ids: frozenset[int], whole: bool = True) -> None:
        """whole: `result` is asked for at the end. A stream that nobody reads would keep what it has given out."""
        sampling = request.sampling
        self.request = request
        self.id = SequenceId(request.request_id, request.prompt_index, index)
        self._stop_ids = stop_ids
        self._sampling = sampling
        tokenizer = request.tokenizer
        self._detokenizer = (
            tokenizer.detokenizer(request.continued_token_ids, sampling.skip_special_tokens) if tokenizer else None
        )
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        # A step then brings text and nothing else, unless it is the last.
        self._is_plain = self._detokenizer is not None and not sampling.stop and sampling.logprobs is None
        self._whole = whole
        self._num_tokens = 0
        self._pieces: list[str] = []
        logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self.output = CompletionOutput(index=index, text="", token_ids=[], logprobs=logprobs)

    def update(self, new: TokenOutput) -> CompletionChunk:
        """Take the tokens of a step. Tokens behind a stop string are dropped."""
        if self._is_plain and new.finish_reason is None and new.prompt_logprobs is None:
            return self._grow(new)
        text, count, stop = self._push(new)
        if stop is None and new.finish_reason is not None:
            held, stop = self._flush(may_stop=self._may_stop(count) and new.finish_reason != "abort")
            text += held
        token_ids = new.new_token_ids[:count]
        logprobs = None
        if self.output.logprobs is not None and new.logprobs is not None:
            logprobs = [self._logprob_dict(entry, self._sampling.logprobs) for entry in new.logprobs[:count]]
            if self._whole:
                self.output.logprobs += logprobs
        request = self.request
        prompt_logprobs = None
        if new.prompt_logprobs is not None:
            wanted = self._sampling.prompt_logprobs
            prompt_logprobs = [None, *(self._logprob_dict(entry, wanted) for entry in new.prompt_logprobs)]
            request.prompt_logprobs = prompt_logprobs
        request.num_cached_tokens = max(request.num_cached_tokens, new.num_cached_tokens)

        finish_reason: str | None = "stop" if stop is not None else new.finish_reason
        stop_reason: int | str | None = stop
        if stop is None and new.stop_reason in self._sampling.stop_token_ids:
            stop_reason = new.stop_reason  # the end-of-text token is no reason to report, as in vLLM
        if new.nothing_allowed:
            stop_reason = NOTHING_ALLOWED
        self._keep(token_ids, text)
        self.output.finish_reason, self.output.stop_reason = finish_reason, stop_reason
        return CompletionChunk(
            request_id=request.request_id,
            prompt_index=request.prompt_index,
            index=self.output.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=new.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            timing=None if finish_reason is None else (new.queue_time, new.prefill_time, new.decode_time),
        )

    def _keep(self, token_ids: list[int], text: str) -> None:
        self._num_tokens += len(token_ids)
        if self._whole:
            self.output.token_ids += token_ids
            self._pieces.append(text)

    def _grow(self, new: TokenOutput) -> CompletionChunk:
        """What `update` comes to for nearly all tokens, in less time."""
        assert self._detokenizer is not None
        text = "".join(map(self._detokenizer.push, new.new_token_ids))
        self._keep(new.new_token_ids, text)
        request = self.request
        if new.num_cached_tokens > request.num_cached_tokens:
            request.num_cached_tokens = new.num_cached_tokens
        return CompletionChunk(
            request_id=request.request_id,
            prompt_index=request.prompt_index,
            index=self.output.index,
            text=text,
            token_ids=new.new_token_ids,
            num_cached_tokens=new.num_cached_tokens,
        )

    def finish(self, reason: str) -> CompletionChunk:
        """End without another token."""
        text, _ = self._flush(may_stop=False)
        self._keep([], text)
        self.output.finish_reason = reason
        return CompletionChunk(
            request_id=self.request.request_id,
            prompt_index=self.request.prompt_index,
            index=self.output.index,
            text=text,
            token_ids=[],
            finish_reason=reason,
        )

    def result(self) -> CompletionOutput:
        self.output.text = "".join(self._pieces)
        return self.output

    def _push(self, new: TokenOutput) -> tuple[str, int, str | None]:
        """(text to give out, how many of the new tokens count, the stop string that was found)."""
        if self._detokenizer is None:
            return "", len(new.new_token_ids), None
        text = ""
        for count, token_id in enumerate(new.new_token_ids, start=1):
            is_last = count == len(new.new_token_ids)
            if is_last and new.finish_reason == "stop" and token_id in self._stop_ids:
                # A stop token is reported as a token, but its text only where the client asked for it.
                piece = self._detokenizer.push(token_id) if self._sampling.include_stop_str_in_output else ""
                return text + self._stops.push(piece, may_stop=False)[0], count, None
            piece, stop = self._push_token(token_id, self._may_stop(count))
            text += piece
            if stop is not None:
                return text, count, stop
        return text, len(new.new_token_ids), None

    def _push_token(self, token_id: int, may_stop: bool) -> tuple[str, str | None]:
        """(text to give out, the stop string that was found)."""
        assert self._detokenizer is not None
        hidden = self._hidden_text(token_id)
        if hidden is None or not self._stops.concerns(hidden):
            return self._stops.push(self._detokenizer.push(token_id), may_stop)
        text, stop = self._stops.push(self._detokenizer.flush(), may_stop)  # what came before it, also for the search
        if stop is None:
            more, stop = self._stops.push(hidden, may_stop, hidden=True)
            text += more
        return text, stop

    def _hidden_text(self, token_id: int) -> str | None:
        """The content of a special token that is left out of the text; None for any other token."""
        tokenizer = self.request.tokenizer
        if not self._sampling.stop or not self._sampling.skip_special_tokens or tokenizer is None:
            return None
        return tokenizer.special_text(token_id)

    def _may_stop(self, count: int) -> bool:
        """Whether a stop string may end the text with the `count`-th of the step's tokens."""
        return self._num_tokens + count > self._sampling.min_tokens

    def _flush(self, may_stop: bool) -> tuple[str, str | None]:
        """(the text still held, the stop string that was found in it)."""
        if self._detokenizer is None:
            return "", None
        text, stop = self._stops.push(self._detokenizer.flush(), may_stop)
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)

    def _logprob_dict(self, entry: TokenLogprobs, count: int | None) -> dict[int, Logprob]:
        """The token itself first, then the `count` most probable ones, ranked from 1."""
        tokenizer = self.request.tokenizer

        def alternative(token_id: int, logprob: float, rank: int) -> Logprob:
            text = tokenizer.token_text(token_id) if tokenizer else None
            return Logprob(logprob=logprob, rank=rank, decoded_token=text)

        pairs = list(zip(entry.token_ids, entry.logprobs, strict=True))[: 1 + (count or 0)]
        found = {pairs[0][0]: alternative(*pairs[0], entry.rank)}
        for rank, (token_id, logprob) in enumerate(pairs[1:], start=1):
            if token_id not in found:
                found[token_id] = alternative(token_id, logprob, rank)
        return found
