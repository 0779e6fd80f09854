"""`LLM`: the offline door. Names and behaviour follow vLLM's class of the same name, plus `variants`."""

import gc
import itertools
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from polymoe.native import quiet_torch  # noqa: F401  (first: it loads torch)

# isort: split
from polymoe.client.output import OutputProcessor
from polymoe.engine.core import EngineCore
from polymoe.errors import EngineDeadError, RequestError
from polymoe.llm.batch_progress import OnOutput, batch_progress
from polymoe.llm.planned_config import Source, planned_config
from polymoe.llm.prompts import (
    Messages,
    Prompt,
    as_conversations,
    as_prompts,
    default_sampling_params,
    encode_conversation,
    encode_prompt,
    is_conversation,
    is_prompt,
    the_variant,
)
from polymoe.llm.running_output import RunningOutput
from polymoe.llm.shared_engine import SharedEngine, Submission
from polymoe.protocol.request import RequestOutput, SamplingParams

_T = TypeVar("_T")


class LLM:
    """All variants of a bundle in this process. Several threads may use it at once; their requests share the batches.

        with LLM("bundle") as llm:
            outputs = llm.generate(["2+2=", "def f("], SamplingParams(temperature=0), variants=["math", "code"])

    Args:
        bundle: folder that `polymoe plan` wrote, or {name: checkpoint} to plan now and keep for the next time, as
            `polymoe serve NAME=PATH…` does.
        policy, memory: of that plan, as on the command line; without `memory` policy `auto` fills the device.
        options: fields of `EngineConfig` (dtype, device, slots, max_num_seqs, …).

    Raises: `BundleError`, `ConfigError`, and what planning raises (`CheckpointError`, `FamilyError`, `PlanError`).
    Warns of what runs more than twice as slow as it could.
    """

    def __init__(
        self,
        bundle: Source,
        *,
        policy: str = "auto",
        memory: str | None = None,
        **options: Any,
    ) -> None:
        self._serve(EngineCore(planned_config(bundle, policy, memory, options)))

    def _serve(self, engine: EngineCore) -> None:
        for path in engine.info.fast_paths:
            if path.slow:
                warnings.warn(path.warning, stacklevel=3)
        self._engine: EngineCore | None = engine
        self._processor: OutputProcessor | None = OutputProcessor(engine.info)
        self._shared = SharedEngine(engine, self._processor)
        self._ids = itertools.count()

    @property
    def engine(self) -> EngineCore:
        """Not to be touched while another thread generates. Raises `EngineDeadError` after `close`."""
        if self._engine is None:
            raise EngineDeadError("This LLM was closed.")
        return self._engine

    @property
    def processor(self) -> OutputProcessor:
        """Tokenizers and variants. Raises `EngineDeadError` after `close`."""
        if self._processor is None:
            raise EngineDeadError("This LLM was closed.")
        return self._processor

    @property
    def variants(self) -> list[str]:
        """Names of the variants that are served."""
        return list(self.processor.variants)

    def close(self) -> None:
        """Give the memory back. Calls that run in other threads end with `EngineDeadError`. Idempotent."""
        if self._engine is None:
            return
        on_gpu = self._engine.device.type == "cuda"
        self._shared.close()
        self._engine = self._processor = None
        gc.collect()  # modules and hooks refer to each other
        if on_gpu:
            import torch

            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        variants: str | Sequence[str] | None = None,
        on_output: OnOutput | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, all variants in the same batches.

        Args:
            prompts: one prompt or several, each a text or a list of token ids.
            sampling_params: for all, or one for each prompt. None: the variant's own generation defaults.
            variants: for all, or one for each prompt; several for a single prompt ask each of them. None is possible
                when there is only one variant.
            on_output: called with each finished request, in the order they finish.
            use_tqdm: show progress on a terminal.

        Returns: one `RequestOutput` a prompt, in order.
        Raises: `RequestError`; then nothing was generated.
        """
        batch = _repeated(as_prompts(prompts), is_prompt(prompts), variants)

        def encode(prompt: Prompt, variant: str) -> tuple[str | None, list[int]]:
            return encode_prompt(self.processor, variant, prompt)

        return self._generate(batch, encode, sampling_params, variants, on_output, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        variants: str | Sequence[str] | None = None,
        on_output: OnOutput | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Continue conversations, each through the chat template of its variant.

        Args:
            messages: one conversation or several, each a list of `{"role": …, "content": …}`.
            chat_template_kwargs: variables for the templates.

        The other arguments, what is returned and what is raised are as in `generate`.
        """
        batch = _repeated(as_conversations(messages), is_conversation(messages), variants)

        def encode(conversation: Messages, variant: str) -> tuple[str, list[int]]:
            return encode_conversation(self.processor, variant, conversation, chat_template_kwargs)

        return self._generate(batch, encode, sampling_params, variants, on_output, use_tqdm)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        variant: str | None = None,
        *,
        delta: bool = False,
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, or continue one conversation, and yield what is known whenever there is more.

            for output in llm.stream("Once", SamplingParams(max_tokens=99), variant="drama", delta=True):
                print(output.outputs[0].text, end="", flush=True)

        Args:
            delta: yield only what is new, in place of everything so far.

        Closing the generator, or leaving the loop, ends the request. Raises `RequestError` with the first `next`.
        """
        name = the_variant(self.processor, variant)
        text, token_ids = encode_prompt(self.processor, name, prompt)
        submission = self._submission(name, text, token_ids, sampling_params)
        output = RunningOutput(submission.request_id, name, text, token_ids, submission.sampling.n, delta)
        ticket = self._shared.submit([submission], chunks=True)
        try:
            while (news := self._shared.news(ticket)).chunks:
                yield output.add(news.chunks)
        finally:
            self._shared.cancel(ticket)

    def default_sampling_params(self, variant: str) -> SamplingParams:
        """What the variant's generation config recommends."""
        return default_sampling_params(self.processor, variant)

    def _generate(
        self,
        batch: list[_T],
        encode: Callable[[_T, str], tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        variants: str | Sequence[str] | None,
        on_output: OnOutput | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = _per_prompt(sampling_params, len(batch), "sampling_params")
        names = [the_variant(self.processor, name) for name in _per_prompt(variants, len(batch), "variants")]
        submissions = [
            self._submission(name, *encode(prompt, name), param)
            for prompt, name, param in zip(batch, names, params, strict=True)
        ]
        finished: dict[str, RequestOutput] = {}
        ticket = self._shared.submit(submissions)
        try:
            with batch_progress(len(batch), use_tqdm) as advance:
                while len(finished) < len(batch):
                    for output in self._shared.news(ticket).finished:
                        finished[output.request_id] = output
                        advance(output)
                        if on_output is not None:
                            on_output(output)
        finally:  # after an error or an interrupt nothing may stay behind
            self._shared.cancel(ticket)
        return [finished[submission.request_id] for submission in submissions]

    def _submission(
        self, variant: str, text: str | None, token_ids: list[int], sampling: SamplingParams | None
    ) -> Submission:
        """`sampling` None: the variant's own defaults, cut to the room that the prompt leaves."""
        chosen = sampling or self.default_sampling_params(variant)
        number, now = next(self._ids), time.monotonic()
        return Submission(f"llm-{number}", variant, token_ids, chosen, text, now, fit=sampling is None)


def _repeated(batch: list[_T], single: bool, variants: str | Sequence[str] | None) -> list[_T]:
    """A single prompt once for each of several variants."""
    return batch * len(variants) if single and variants is not None and not isinstance(variants, str) else batch


def _per_prompt(value: Any, count: int, name: str) -> list[Any]:
    if value is None or isinstance(value, str | SamplingParams):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts; give one or {count}.", param=name)
    return list(value)
