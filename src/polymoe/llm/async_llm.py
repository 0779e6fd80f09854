"""`AsyncLLM`: the engine in a process of its own, for programs with an event loop. Names follow vLLM's class."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

from polymoe.client.client import AsyncEngineClient
from polymoe.client.output import OutputProcessor
from polymoe.client.request_stream import RequestStream
from polymoe.client.request_tokens import fitted
from polymoe.config import EngineConfig
from polymoe.errors import EngineDeadError, OverloadedError
from polymoe.llm.planned_config import Source, planned_config
from polymoe.llm.prompts import Messages, Prompt, default_sampling_params, encode_prompt, the_variant
from polymoe.llm.running_output import RunningOutput
from polymoe.protocol.request import RequestOutput, SamplingParams

_LOOK_AGAIN = 1.0  # seconds; a request that has ended is told of only when its outputs are taken


class AsyncLLM:
    """All variants of a bundle; everything that is asked at the same time shares the batches.

        async with AsyncLLM("bundle") as llm:
            async for output in llm.generate("2+2=", SamplingParams(max_tokens=9), variant="math"):
                print(output.outputs[0].text)

    The arguments are those of `LLM`. All methods belong to one event loop. A script needs no `__main__` guard: the
    process is a new Python, not a copy of this one.
    """

    def __init__(self, bundle: Source, *, policy: str = "auto", memory: str | None = None, **options: Any) -> None:
        self._source, self._policy, self._memory = bundle, policy, memory
        self._options = options
        EngineConfig.of("", options)  # what is wrong is said here
        self._client: AsyncEngineClient | None = None
        self._starting = asyncio.Lock()
        self._room = asyncio.Condition()  # notified whenever a request has ended
        self._ids = itertools.count()

    async def start(self) -> None:
        """Plan what is to be planned, load, and wait until requests are welcome. `generate` does it where it is due.

        Raises what `LLM` does.
        """
        async with self._starting:
            if self._client is not None:
                return
            config = await asyncio.to_thread(planned_config, self._source, self._policy, self._memory, self._options)
            client = AsyncEngineClient(config)
            await client.start()
            self._client = client

    async def close(self) -> None:
        """End the process. Generators that still run raise `EngineDeadError`. Idempotent."""
        if self._client is not None:
            await self._client.shutdown()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def variants(self) -> list[str]:
        """Names of the variants that are served. Raises `EngineDeadError` before `start`."""
        return list(self._processor.variants)

    def default_sampling_params(self, variant: str) -> SamplingParams:
        """What the variant's generation config recommends."""
        return default_sampling_params(self._processor, variant)

    async def generate(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        variant: str | None = None,
        delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt, or continue a conversation, and yield what is known whenever there is more.

        Args:
            prompt: a text, a list of token ids, or a list of `{"role": …, "content": …}`.
            sampling_params: None: the variant's own generation defaults.
            request_id: what the outputs are to carry.
            variant: None is possible when there is only one.
            delta: yield only what is new, in place of everything so far.

        Closing the generator, or leaving the loop, ends the request. Where more is asked than the engine queues it
        waits. Raises `RequestError`, and `EngineDeadError` when the engine has stopped.
        """
        await self.start()
        name = the_variant(self._processor, variant)
        # In a thread: long texts, and templates, which are programs from a checkpoint, keep others waiting.
        text, token_ids = await asyncio.to_thread(encode_prompt, self._processor, name, prompt)
        sampling = sampling_params
        if sampling is None:  # as `LLM` does
            room = self._processor.variant(name).max_new_tokens(len(token_ids))
            sampling = fitted(self.default_sampling_params(name), room)
        if sampling.structured_outputs is not None:
            processor = self._processor
            await processor.grammars.prepare(processor.grammar_source(name, sampling.structured_outputs))
        output = RunningOutput(request_id or f"llm-{next(self._ids)}", name, text, token_ids, sampling.n, delta)
        try:
            with await self._submit(name, (text, token_ids), sampling) as stream:
                async for chunks in stream:
                    yield output.add(chunks)
        finally:
            async with self._room:
                self._room.notify_all()

    async def _submit(
        self, variant: str, prompt: tuple[str | None, list[int]], sampling: SamplingParams
    ) -> RequestStream:
        """Waits for room. A single request that finds none in an idle engine is refused."""
        client = self._started
        most = client.config.max_num_seqs + client.config.max_waiting
        while True:
            # With deadlines it is refused for what it would take, not for want of room.
            if client.config.slo or client.processor.num_sequences < most:
                try:
                    return await client.submit(f"llm-{os.urandom(8).hex()}", variant, [prompt], sampling)
                except OverloadedError:
                    if client.config.slo or not client.open_streams:
                        raise
            async with self._room:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), _LOOK_AGAIN)

    @property
    def _started(self) -> AsyncEngineClient:
        if self._client is None:
            raise EngineDeadError("This AsyncLLM has not started; use it in `async with`.")
        return self._client

    @property
    def _processor(self) -> OutputProcessor:
        return self._started.processor
