"""`transformers`: what one has without polymoe. Every variant's whole model in stock transformers, in this process.

One variant at a time: the one whose request has waited longest gets a batch of all its requests that wait, padded, and
`generate` runs until the whole batch is done; requests that come meanwhile wait for the next one.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from polymoe.bench.systems import Counters
from polymoe.machine import peak_rss
from polymoe.model.stock.kind import kind_of


@dataclass(eq=False)
class _Waiting:
    variant: str
    prompt: list[int]
    output_tokens: int
    done: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StockSystem:
    """`checkpoints`: variant -> folder. `most`: requests in a batch. `threads`: CPU threads; None: torch's default."""

    def __init__(
        self, checkpoints: Mapping[str, Path], device: torch.device, dtype: str, most: int, threads: int | None = None
    ) -> None:
        self._checkpoints, self._device, self._dtype, self._most = checkpoints, device, dtype, most
        self._threads = threads
        self._models: dict[str, Any] = {}
        self._waiting: list[_Waiting] = []
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._models = await asyncio.to_thread(self._load)

    async def stop(self) -> None:
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)
        self._models.clear()

    async def generate(self, variant: str, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        """All tokens come at once: a batch of `generate` tells of no token before its last."""
        request = _Waiting(variant, prompt, output_tokens)
        self._waiting.append(request)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        await request.done
        yield output_tokens

    async def counters(self) -> Counters:
        """`peak_rss_bytes` is that of the benchmark's own process."""
        return Counters(peak_rss_bytes=peak_rss(os.getpid()))

    async def _run(self) -> None:
        while self._waiting:
            variant = self._waiting[0].variant
            batch = [request for request in self._waiting if request.variant == variant][: self._most]
            self._waiting = [request for request in self._waiting if request not in batch]
            try:
                await asyncio.to_thread(self._generate, variant, batch)
            except Exception as error:
                for request in [*batch, *self._waiting]:
                    if not request.done.done():
                        request.done.set_exception(error)
                self._waiting.clear()
                return
            for request in batch:
                if not request.done.done():
                    request.done.set_result(None)
            await asyncio.sleep(0)  # those whose answers came may ask again before the next batch is made

    def _load(self) -> dict[str, Any]:
        from polymoe.offline.checkpoint.checkpoint import read_config

        models = {}
        for name, path in self._checkpoints.items():
            config = read_config(path)
            model = kind_of(config).auto.from_pretrained(path, config=config, dtype=self._dtype, local_files_only=True)
            models[name] = model.to(self._device).eval()
        return models

    @torch.inference_mode()
    def _generate(self, variant: str, batch: Sequence[_Waiting]) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        longest = max(len(request.prompt) for request in batch)
        model, most = self._models[variant], max(request.output_tokens for request in batch)
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.int64)
        for row, request in enumerate(batch):
            count = len(request.prompt)
            place = slice(longest - count, longest) if kind_of(model.config).pads_left else slice(0, count)
            ids[row, place], mask[row, place] = torch.tensor(request.prompt), 1
        model.generate(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device), do_sample=False, num_beams=1,
            min_new_tokens=most, max_new_tokens=most, pad_token_id=0,
        )  # fmt: skip
