"""From a client's request to engine requests, and from the engine's tokens back to text.

Synchronous, so that the offline `LLM` class and the server's asyncio client share it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from polymoe.engine.request import (
    CompletionOutput,
    EngineRequest,
    Logprob,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from polymoe.engine.stop_strings import StopStrings
from polymoe.engine.tokenizer import VariantTokenizer
from polymoe.errors import ContextLengthError, RequestError, UnknownVariantError

if TYPE_CHECKING:
    from polymoe.engine.engine import EngineInfo, VariantInfo


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """What one step added to one of the n sequences of a request."""

    request_id: str
    index: int  # which of the n
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None  # one entry a token
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # with the first delta of sequence 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    # (queue, prefill, decode) seconds, as the engine measured them; only where the engine ended the sequence.
    timing: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the outputs of one engine step mean for the clients."""

    deltas: list[CompletionDelta] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)  # engine request ids that nobody waits for any more


class OutputProcessor:
    """Knows every request that is in flight. Not thread-safe."""

    def __init__(self, info: "EngineInfo") -> None:
        self.variants: dict[str, VariantInfo] = {variant.name: variant for variant in info.variants}
        self._index = {variant.name: index for index, variant in enumerate(info.variants)}
        self._tokenizers: dict[str, VariantTokenizer] = {}  # directory -> tokenizer; variants often share one
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[str, _Sequence] = {}  # engine request id -> its sequence

    @property
    def num_sequences(self) -> int:
        """Sequences in flight, running or waiting."""
        return len(self._sequences)

    def variant(self, name: str) -> "VariantInfo":
        """Raises `UnknownVariantError`."""
        if name not in self.variants:
            raise UnknownVariantError(name, list(self.variants))
        return self.variants[name]

    def tokenizer(self, variant: str) -> VariantTokenizer | None:
        """The variant's tokenizer, loaded at first use; None if the bundle has none."""
        directory = self.variant(variant).tokenizer_dir
        if directory is None:
            return None
        if directory not in self._tokenizers:
            self._tokenizers[directory] = VariantTokenizer(directory)
        return self._tokenizers[directory]

    def require_tokenizer(self, variant: str, purpose: str, param: str = "prompt") -> VariantTokenizer:
        """Like `tokenizer`, but raises `RequestError` when there is none."""
        tokenizer = self.tokenizer(variant)
        if tokenizer is None:
            raise RequestError(
                f"The model `{variant}` has no tokenizer, which {purpose} needs; send token ids.", param=param
            )
        return tokenizer

    def add_request(
        self,
        request_id: str,
        variant: str,
        prompt: str | Sequence[int],
        sampling: SamplingParams,
        *,
        text: str | None = None,
        cache_salt: str = "",
        arrival_time: float = 0.0,
    ) -> list[EngineRequest]:
        """Check a request and take note of it.

        Args:
            prompt: text, or token ids (`text` is then what the output reports as its prompt, if given).
            arrival_time: seconds, time.monotonic().

        Returns: the `n` engine requests to add, with ids `{request_id}-{k}`.
        Raises: `RequestError`, and then nothing is noted.
        """
        info = self.variant(variant)
        if request_id in self._requests:
            raise RequestError(f"The request id {request_id!r} is in use.", param="request_id")
        if isinstance(prompt, str):
            text = prompt
            token_ids = self.require_tokenizer(variant, "a text prompt").encode(prompt)
        else:
            token_ids = list(prompt)
        _check_tokens(info, token_ids, sampling)
        tokenizer = self.require_tokenizer(variant, "stop", "stop") if sampling.stop else self.tokenizer(variant)

        stop_ids = [] if sampling.ignore_eos else list(info.eos_token_ids)
        stop_ids = list(dict.fromkeys([*stop_ids, *sampling.stop_token_ids]))
        request = _Request(request_id, variant, text, token_ids, tokenizer, sampling)
        engine_requests = []
        for k in range(sampling.n):
            engine_id = f"{request_id}-{k}"
            sequence = _Sequence(request, k, engine_id, frozenset(stop_ids))
            request.sequences.append(sequence)
            self._sequences[engine_id] = sequence
            engine_requests.append(
                EngineRequest(
                    request_id=engine_id,
                    variant=self._index[variant],
                    prompt_token_ids=token_ids,
                    sampling=_sampling_of(sampling, k),
                    stop_token_ids=stop_ids,
                    cache_salt=cache_salt,
                    arrival_time=arrival_time,
                )
            )
        self._requests[request_id] = request
        return engine_requests

    def process(self, outputs: Sequence[TokenOutput]) -> StepOutput:
        """Turn what the engine computed into text. Outputs of sequences that have ended are dropped."""
        step = StepOutput()
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            delta = sequence.update(output)
            step.deltas.append(delta)
            if delta.finish_reason is not None:
                if output.finish_reason is None:  # a stop string: the engine does not know yet
                    step.aborts.append(sequence.engine_id)
                self._end(sequence, step)
        return step

    def abort(self, request_ids: Sequence[str]) -> StepOutput:
        """End requests now, with finish reason "abort"; ids that are not in flight are ignored."""
        step = StepOutput()
        for request_id in request_ids:
            request = self._requests.get(request_id)
            for sequence in request.sequences if request is not None else ():
                if sequence.output.finish_reason is None:
                    step.deltas.append(sequence.finish("abort"))
                    step.aborts.append(sequence.engine_id)
                    self._end(sequence, step)
        return step

    def _end(self, sequence: "_Sequence", step: StepOutput) -> None:
        request = sequence.request
        del self._sequences[sequence.engine_id]
        if all(other.output.finish_reason is not None for other in request.sequences):
            del self._requests[request.request_id]
            step.finished.append(request.result())


class _Request:
    """A client's request: its prompt and its n sequences."""

    def __init__(
        self,
        request_id: str,
        variant: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        tokenizer: VariantTokenizer | None,
        sampling: SamplingParams,
    ) -> None:
        self.request_id = request_id
        self.variant = variant
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.sequences: list[_Sequence] = []
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
        )


class _Sequence:
    """One of the n sequences: tokens come in, text goes out."""

    def __init__(self, request: _Request, index: int, engine_id: str, stop_ids: frozenset[int]) -> None:
        sampling = request.sampling
        self.request = request
        self.engine_id = engine_id
        self._stop_ids = stop_ids
        self._sampling = sampling
        tokenizer = request.tokenizer
        self._detokenizer = (
            tokenizer.detokenizer(request.prompt_token_ids, sampling.skip_special_tokens) if tokenizer else None
        )
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._pieces: list[str] = []
        logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []
        self.output = CompletionOutput(index=index, text="", token_ids=[], logprobs=logprobs)

    def update(self, new: TokenOutput) -> CompletionDelta:
        """Take the tokens of a step. Tokens behind a stop string are dropped."""
        text, count, stop = self._push(new)
        token_ids = new.new_token_ids[:count]
        logprobs = None
        if self.output.logprobs is not None and new.logprobs is not None:
            logprobs = [self._logprob_dict(entry, self._sampling.logprobs) for entry in new.logprobs[:count]]
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
        if stop is None and finish_reason is not None:
            text += self._flush()
        self.output.token_ids += token_ids
        self._pieces.append(text)
        self.output.finish_reason, self.output.stop_reason = finish_reason, stop_reason
        return CompletionDelta(
            request_id=request.request_id,
            index=self.output.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=new.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            timing=(new.queue_time, new.prefill_time, new.decode_time) if new.finish_reason is not None else None,
        )

    def finish(self, reason: str) -> CompletionDelta:
        """End without another token."""
        text = self._flush()
        self._pieces.append(text)
        self.output.finish_reason = reason
        return CompletionDelta(
            request_id=self.request.request_id,
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
            may_stop = len(self.output.token_ids) + count > self._sampling.min_tokens
            piece, stop = self._stops.push(self._detokenizer.push(token_id), may_stop)
            text += piece
            if stop is not None:
                return text, count, stop
        return text, len(new.new_token_ids), None

    def _flush(self) -> str:
        if self._detokenizer is None:
            return ""
        held, _ = self._stops.push(self._detokenizer.flush(), may_stop=False)
        return held + self._stops.flush()

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


def _sampling_of(sampling: SamplingParams, k: int) -> SamplingParams:
    """The parameters of the k-th of n sequences: another seed, and the prompt's logprobs only once."""
    if sampling.n == 1:
        return sampling
    seed = sampling.seed
    if seed is not None:
        seed = (seed + k + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(
        sampling, n=1, seed=seed, prompt_logprobs=sampling.prompt_logprobs if k == 0 else None
    )


def _check_tokens(info: "VariantInfo", token_ids: list[int], sampling: SamplingParams) -> None:
    """Raises `RequestError` unless the engine can run this prompt on this variant."""
    if not token_ids:
        raise RequestError("The prompt is empty; it needs at least one token.", param="prompt")
    if len(token_ids) + sampling.max_tokens > info.max_model_len:
        raise ContextLengthError(info.max_model_len, len(token_ids), sampling.max_tokens)
    named = {"prompt": token_ids, "stop_token_ids": sampling.stop_token_ids, "logit_bias": sampling.logit_bias}
    for param, ids in named.items():
        for token_id in itertools.filterfalse(range(info.vocab_size).__contains__, ids):
            raise RequestError(
                f"Token id {token_id} is outside the vocabulary of `{info.name}` (0 to {info.vocab_size - 1}).",
                param=param,
            )
