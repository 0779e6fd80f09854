"""Watches one submission while its client is served: what the metrics, the log and the traces say of it."""

import time
from collections.abc import Sequence

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.request import SamplingParams
from polymoe.server.http_request import HttpRequest
from polymoe.server.metrics import Metrics
from polymoe.server.request_log import RecordedRequest
from polymoe.server.tenants import Tenant
from polymoe.server.traces import Tracer

_Key = tuple[int, int]  # (prompt, which of its n)


class _Progress:
    """Of one sequence: the time of its last token, time.monotonic(), and its tokens."""

    __slots__ = ("last", "tokens")

    def __init__(self) -> None:
        self.last, self.tokens = 0.0, 0


class RequestTimer:
    """Latencies are those that its client sees.

    Args: prompt_lengths: in tokens. tenant: who has begun it, and pays for it.
    """

    def __init__(
        self,
        metrics: Metrics,
        http: HttpRequest,
        prompt_lengths: Sequence[int],
        sampling: SamplingParams,
        recorded: RecordedRequest,
        tenant: Tenant | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        assert http.variant is not None
        self._http, self._recorded, self._tenant, self._tracer = http, recorded, tenant, tracer
        self._variant, self._recent, self._metrics = http.variant, metrics.recent, metrics.of(http.variant)
        self._open = {(p, k) for p in range(len(prompt_lengths)) for k in range(sampling.n)}
        self._progress: dict[_Key, _Progress] = {}  # of those that have a token
        http.num_prompt_tokens = sum(prompt_lengths)
        self._metrics.prompt_tokens.inc(http.num_prompt_tokens)
        self._recent.prompt(self._variant, http.num_prompt_tokens)
        for length in prompt_lengths:
            self._metrics.request_prompt_tokens.observe(length)
            self._metrics.params_n.observe(sampling.n)
            self._metrics.params_max_tokens.observe(sampling.max_tokens)

    def observe(self, chunks: Sequence[CompletionChunk]) -> None:
        now = time.monotonic()
        metrics = self._metrics
        self._recorded.observe(chunks, now)
        for chunk in chunks:
            key = (chunk.prompt_index, chunk.index)
            if chunk.token_ids:
                count = len(chunk.token_ids)
                metrics.generation_tokens.inc(count)
                progress = self._progress.get(key)
                first = progress is None
                if progress is None:
                    progress = self._progress[key] = _Progress()
                    latency = now - self._http.started
                    metrics.first_token.observe(latency)
                    self._http.first_token = self._http.first_token or now
                else:
                    latency = now - progress.last
                    metrics.between_tokens.observe(latency)
                progress.tokens += count
                progress.last = now
                self._http.num_tokens += count
                if self._tenant is not None:
                    self._tenant.charge(count)
                self._recent.token(self._variant, count, latency, first)
            if chunk.finish_reason is not None:
                self._end(key, chunk.finish_reason)
                metrics.whole.observe(now - self._http.started)
            if chunk.timing is not None:
                self._observe_parts(key, chunk, chunk.timing)

    def _observe_parts(self, key: _Key, chunk: CompletionChunk, timing: tuple[float, float, float]) -> None:
        metrics, (queue, prefill, decode) = self._metrics, timing
        metrics.queue.observe(queue)
        metrics.prefill.observe(prefill)
        metrics.decode.observe(decode)
        metrics.inference.observe(prefill + decode)
        count = self._count(key)
        if count > 1:
            metrics.per_output_token.observe(decode / (count - 1))
        if self._tracer is not None:
            self._tracer.sequence_ended(self._http, timing, count, chunk.finish_reason or "")

    def _end(self, key: _Key, reason: str) -> None:
        self._open.discard(key)
        self._metrics.ended[reason].inc()
        self._metrics.request_generation_tokens.observe(self._count(key))
        self._http.finish_reasons.append(reason)

    def _count(self, key: _Key) -> int:
        progress = self._progress.get(key)
        return 0 if progress is None else progress.tokens

    def close(self, error: str | None = None) -> None:
        """Sequences that did not end by themselves were aborted, or failed with `error`. Idempotent."""
        self._recorded.close(error)
        if self._open:
            self._recent.error(self._variant)
        for key in sorted(self._open):
            self._end(key, "abort")
        longest: dict[int, int] = {}
        for (prompt, _), progress in self._progress.items():
            longest[prompt] = max(progress.tokens, longest.get(prompt, 0))
        for count in longest.values():
            self._metrics.request_max_generation_tokens.observe(count)
        self._progress.clear()
        if self._tenant is not None:
            self._tenant.end()
            self._tenant = None
