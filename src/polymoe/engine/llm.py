"""`LLM`: the offline door. Names and behaviour follow vLLM's class of the same name, plus `variants`."""

import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polymoe import quiet_torch  # noqa: F401  (first: it loads torch)
from polymoe.config import EngineConfig
from polymoe.engine.engine import EngineCore
from polymoe.engine.output import OutputProcessor
from polymoe.engine.request import EngineRequest, RequestOutput, SamplingParams, sampling_params
from polymoe.errors import RequestError

Prompt = str | Sequence[int]


class LLM:
    """All variants of a bundle in this process.

        outputs = LLM("bundle").generate(["2+2=", "def f("], SamplingParams(temperature=0), variants=["math", "code"])

    Args:
        bundle: folder that `polymoe plan` wrote.
        options: fields of `EngineConfig` (dtype, device, slots, max_num_seqs, …).

    Raises: `BundleError`, `ConfigError`. Warns of what runs more than twice as slow as it could.
    """

    def __init__(self, bundle: str | Path, **options: Any) -> None:
        self.engine = EngineCore(EngineConfig(bundle=str(bundle), **options))
        for path in self.engine.info.fast_paths:
            if path.slow:
                warnings.warn(path.warning, stacklevel=2)
        self.processor = OutputProcessor(self.engine.info)
        self._ids = itertools.count()

    @property
    def variants(self) -> list[str]:
        """Names of the variants that are served."""
        return list(self.processor.variants)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        variants: str | Sequence[str] | None = None,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all variants in the same batches.

        Args:
            prompts: one prompt or several, each a text or a list of token ids.
            sampling_params: for all, or one for each prompt. None: the variant's own generation defaults.
            variants: for all, or one for each prompt. None is possible when there is only one variant.
            on_output: called with each finished request, in the order they finish.

        Returns: one `RequestOutput` a prompt, in order.
        Raises: `RequestError`; then nothing was generated.
        """
        batch = _as_prompts(prompts)
        names = self._per_prompt(variants, len(batch), "variants")
        params = self._per_prompt(sampling_params, len(batch), "sampling_params")
        request_ids = [f"llm-{next(self._ids)}" for _ in batch]
        finished: dict[str, RequestOutput] = {}
        try:
            queue: list[EngineRequest] = []
            for request_id, prompt, name, param in zip(request_ids, batch, names, params, strict=True):
                variant = self._variant(name)
                chosen = param or self.default_sampling_params(variant)
                queue += self.processor.add_request(
                    request_id, variant, prompt, chosen, arrival_time=time.monotonic(), fit=param is None
                )
            for output in self._run(queue):
                finished[output.request_id] = output
                if on_output is not None:
                    on_output(output)
        finally:  # after an error or an interrupt nothing may stay behind
            left = self.processor.abort([r for r in request_ids if r not in finished])
            self.engine.abort(left.aborts)
        return [finished[request_id] for request_id in request_ids]

    def default_sampling_params(self, variant: str) -> SamplingParams:
        """What the variant's generation config recommends."""
        return sampling_params(self.processor.variant(variant).generation, {})

    def _variant(self, name: str | None) -> str:
        if name is None:
            if len(self.variants) > 1:
                raise RequestError(f"say which variant: variants= one of {', '.join(self.variants)}.", param="variants")
            return self.variants[0]
        return name

    def _run(self, queue: list[EngineRequest]) -> Any:
        """Yield requests as they finish; the engine's waiting queue is filled as it drains."""
        pending = iter(queue)
        upcoming = next(pending, None)
        limit = self.engine.config.max_waiting
        while upcoming is not None or self.engine.has_work():
            while upcoming is not None and len(self.engine.scheduler.waiting) < limit:
                self.engine.add_request(upcoming)
                upcoming = next(pending, None)
            step = self.processor.process(self.engine.step())
            self.engine.abort(step.aborts)
            yield from step.finished

    @staticmethod
    def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
        if value is None or isinstance(value, str | SamplingParams):
            return [value] * count
        if len(value) != count:
            raise RequestError(f"{name} has {len(value)} entries for {count} prompts; give one or {count}.", param=name)
        return list(value)


def _as_prompts(prompts: Any) -> list[Prompt]:
    """A single prompt -> a list of one; a flat list of token ids is one prompt."""
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)
