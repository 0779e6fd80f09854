"""A request while it runs: its chunks as the records that a stream yields."""

from collections.abc import Sequence

from polymoe.client.output_sequence import CompletionChunk
from polymoe.protocol.request import CompletionOutput, RequestOutput


class RunningOutput:
    """Makes a `RequestOutput` of what is known so far or, with `delta`, of what is new since the last one."""

    def __init__(
        self, request_id: str, variant: str, prompt: str | None, prompt_token_ids: list[int], n: int, delta: bool
    ) -> None:
        self._output = RequestOutput(
            request_id=request_id, variant=variant, prompt=prompt, prompt_token_ids=prompt_token_ids, outputs=[]
        )
        self._delta = delta
        self._left = n
        self._found: dict[int, CompletionOutput] = {}

    def add(self, chunks: Sequence[CompletionChunk]) -> RequestOutput:
        """Several chunks of one sequence become one. The record is the caller's: it does not change any more."""
        if self._delta:
            self._found = {}
        output = self._output
        for new in chunks:
            now = self._found.setdefault(new.index, CompletionOutput(index=new.index, text="", token_ids=[]))
            self._found[new.index] = CompletionOutput(
                index=new.index,
                text=now.text + new.text,
                token_ids=now.token_ids + new.token_ids,
                logprobs=now.logprobs if new.logprobs is None else [*(now.logprobs or ()), *new.logprobs],
                finish_reason=new.finish_reason,
                stop_reason=new.stop_reason,
            )
            self._left -= new.finish_reason is not None
            output.prompt_logprobs = new.prompt_logprobs or output.prompt_logprobs
            output.num_cached_tokens = max(output.num_cached_tokens, new.num_cached_tokens)
        return RequestOutput(
            request_id=output.request_id,
            variant=output.variant,
            prompt=output.prompt,
            prompt_token_ids=output.prompt_token_ids,
            prompt_logprobs=output.prompt_logprobs,
            outputs=[self._found[index] for index in sorted(self._found)],
            finished=self._left == 0,
            num_cached_tokens=output.num_cached_tokens,
        )
