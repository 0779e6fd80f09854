"""`swap`: time sharing of whole models. One variant's model is loaded at a time and has the machine to itself.

When requests of other variants wait, no more are admitted to the present model; once those it has are done, its process
ends and the next is started for the variant whose request has waited longest, which then gets all of its requests that
wait. A load is the start of a process: interpreter and imports too, as servers that swap models by process do. A
variant's own request after another's in the queue waits for its next turn.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from polymoe.bench.systems import Counters, EngineSystem
from polymoe.config import EngineConfig


class SwapSystem:
    """`configs`: variant -> the engine with that variant's whole model. `module`: what its process runs."""

    def __init__(
        self,
        configs: Mapping[str, EngineConfig],
        model_bytes: Mapping[str, int],
        module: str = "polymoe.engine.process",
    ) -> None:
        self._configs, self._model_bytes, self._module = configs, model_bytes, module
        self._engine: EngineSystem | None = None
        self._variant = ""
        self._running = 0
        self._waiting: list[tuple[str, asyncio.Future[EngineSystem]]] = []
        self._switch: asyncio.Task[None] | None = None
        self._past = Counters()  # of engines that have ended, and the loads

    async def start(self) -> None:
        await self._load(next(iter(self._configs)))
        self._past = Counters()  # the first model is there before the first request

    async def stop(self) -> None:
        if self._switch is not None:
            await asyncio.gather(self._switch, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()

    async def generate(self, variant: str, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        turn: asyncio.Future[EngineSystem] = asyncio.get_running_loop().create_future()
        self._waiting.append((variant, turn))
        self._advance()
        try:
            engine = await turn
            async for count in engine.generate(variant, prompt, output_tokens):
                yield count
        finally:
            if turn.done() and not turn.cancelled():
                self._running -= 1
            self._advance()

    async def counters(self) -> Counters:
        if self._switch is not None:
            await self._switch
        assert self._engine is not None
        return self._with(await self._engine.counters())

    def _with(self, counters: Counters) -> Counters:
        """The past and one engine: its processes ran one after the other, so their peaks do not add."""
        peaks = [p for p in (self._past.peak_rss_bytes, counters.peak_rss_bytes) if p is not None]
        together = self._past + counters
        return replace(together, peak_rss_bytes=max(peaks, default=None))

    def _advance(self) -> None:
        """Admit who may run now, or begin to switch."""
        self._waiting = [(variant, turn) for variant, turn in self._waiting if not turn.done()]
        if not self._waiting or (self._switch is not None and not self._switch.done()):
            return
        oldest = self._waiting[0][0]
        if oldest == self._variant:
            self._admit_until_other()
        elif self._running == 0:
            self._switch = asyncio.create_task(self._take_turn(oldest))
            self._switch.add_done_callback(lambda _: self._advance())  # all it was for may have been given up

    def _admit_until_other(self) -> None:
        assert self._engine is not None
        while self._waiting and self._waiting[0][0] == self._variant:
            self._give_turn(self._waiting.pop(0)[1])

    def _give_turn(self, turn: "asyncio.Future[EngineSystem]") -> None:
        assert self._engine is not None
        if not turn.done():
            turn.set_result(self._engine)
            self._running += 1

    async def _take_turn(self, variant: str) -> None:
        try:
            await self._load(variant)
        except Exception as error:
            for _, turn in self._waiting:
                if not turn.done():
                    turn.set_exception(error)
                    self._running += 1  # `generate` takes it back
            return
        mine = [turn for other, turn in self._waiting if other == variant]
        self._waiting = [(other, turn) for other, turn in self._waiting if other != variant]
        for turn in mine:
            self._give_turn(turn)

    async def _load(self, variant: str) -> None:
        started = time.monotonic()
        if self._engine is not None:
            self._past = self._with(await self._engine.counters())
            await self._engine.stop()
        self._engine = EngineSystem(self._configs[variant], module=self._module)
        await self._engine.start()
        self._variant = variant
        loaded = Counters(host_bytes=self._model_bytes[variant], model_loads=1, model_load_s=time.monotonic() - started)
        self._past = self._with(loaded)
