"""The engine: one bundle, one device, and a step of three lines. It lives in one process and knows no transport."""

import concurrent.futures
import time
from collections.abc import Callable

import torch

from polymoe.bundle.reader import Bundle
from polymoe.bundle.verify import hashed_beside
from polymoe.config import DEFAULT_KV_BYTES, EngineConfig
from polymoe.engine.cache_room import CacheRoom
from polymoe.engine.counters import Counters
from polymoe.engine.grammars import GrammarCompiler
from polymoe.engine.kind import engine_kind
from polymoe.engine.live import NO_SHARE, LiveVariants, check_live
from polymoe.engine.memory_request import memory_request
from polymoe.engine.model_runner import StepInFlight
from polymoe.engine.policies.policies import Policies
from polymoe.engine.scheduling.block_manager import BlockManager, salt_of
from polymoe.engine.scheduling.scheduler import Scheduler
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_plan import LaunchedStep
from polymoe.engine.scheduling.step_record import ScheduledSequence, SequenceKey
from polymoe.engine.variant_info import max_model_len, variant_info
from polymoe.errors import ConfigError, RequestError
from polymoe.machine import total_memory
from polymoe.model.backends.base import Backend
from polymoe.model.backends.choose import choose_activations, choose_backend
from polymoe.model.backends.device_facts import DeviceFacts, check_capability, choose_device, read_device_facts
from polymoe.model.graphs.decode_graphs import DecodeGraphs, suits_graphs
from polymoe.model.graphs.warm_up import prompt_lengths, warm_up
from polymoe.model.live_weights import LiveWeights
from polymoe.model.memory_plan import MemoryPlan, plan_memory, weight_bytes
from polymoe.model.stock.stock_model import StockModel
from polymoe.model.variants.slots import slot_rows
from polymoe.protocol.info import EngineInfo, EngineStats
from polymoe.protocol.request import DEFAULT_SLO_CLASS, EngineRequest, SequenceId, TokenOutput, TokenSampling

# Below this the threads of one operation wait for each other longer than they compute.
_SMALL_MODEL_BYTES = 64 << 20
_LOOK_AGAIN = 0.02  # seconds that an idle engine waits for a grammar before it looks for commands
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _stored_dtype(bundle: Bundle) -> str:
    """The variants' common dtype, float32 where they differ."""
    stored = {variant.dtype for variant in bundle.variants}
    return stored.pop() if len(stored) == 1 else "float32"


class EngineCore:
    """Loads a bundle and runs requests.

    Args:
        progress: called with (stage, fraction done) while loading.
        bundle: in place of the one that `config` names (benchmarks have bundles without a folder).
        backend: in place of the device's own (tests run a GPU's on a CPU).
        facts: in place of what the GPU's driver says (a part of it, or none: tests).

    Raises: `BundleError`, `ConfigError`.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[str, float], None] | None = None,
        *,
        bundle: Bundle | None = None,
        backend: Backend | None = None,
        facts: DeviceFacts | None = None,
    ) -> None:
        self.config = config
        self.device = choose_device(config.device)
        if self.device.type == "cuda":
            facts = facts or read_device_facts(self.device)
            check_capability(facts)
            if self.device.index is not None:
                torch.cuda.set_device(self.device)  # kernels are launched on the current one
        bundle = bundle or Bundle.open(config.bundle, tolerant=True)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        elif self.device.type == "cpu" and bundle.resident_bytes.total < _SMALL_MODEL_BYTES:
            torch.set_num_threads(1)
        self.bundle = bundle
        shares = config.weights_of([variant.name for variant in bundle.variants])
        name = _stored_dtype(bundle) if config.dtype == "auto" else config.dtype
        slots = config.slots or len(bundle.variants)
        self.max_variants = config.max_variants or 0
        check_live(config, bundle, self.device)
        lengths = [max_model_len(bundle, v, config.max_model_len) for v in range(len(bundle.variants))]
        dtype = _DTYPES[name]
        activations = choose_activations(config.activations, bundle.manifest.bytes_per_expert_parameter)
        backend = backend or choose_backend(self.device, dtype, activations)
        kind = engine_kind(bundle.config)
        kind.check(backend)
        stock = StockModel.of(bundle.config)
        self.memory_plan: MemoryPlan | None = None  # of a GPU
        if facts is not None:
            num_rows = sum(slot_rows(slots, len(bundle.variants), config.prefetch))
            weights = weight_bytes(bundle, stock.shapes, num_rows, dtype.itemsize, self.max_variants)
            request = memory_request(config, bundle, stock, dtype, facts, max(lengths))
            self.memory_plan = plan_memory(weights, request)
        room = DEFAULT_KV_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
        if self.memory_plan is not None:
            room = self.memory_plan.kv_cache
        # At least 1: a model without attention has blocks of no size.
        per_block = max(stock.kv_bytes_per_block(config.block_size, dtype), 1)
        self.cache_room = CacheRoom(config, room, per_block, stock.state_bytes)
        try:
            with hashed_beside(bundle, config.verify, progress):
                self.model = kind.model(
                    stock, bundle, self.device, dtype, slots, config.expert_cache_bytes, progress, config.prefetch,
                    backend, self.max_variants,
                )  # fmt: skip
        except torch.OutOfMemoryError as error:  # the plan fitted what was free when it was made
            raise ConfigError(
                "the GPU's memory was taken by another process while weights were loaded; end it (nvidia-smi lists who "
                f"it is), or use another GPU with --device cuda:N. Planned: {self.memory_plan}. ({error})"
            ) from error
        num_blocks = self.cache_room.num_blocks(max(lengths))
        self.model.attach_kv_cache(num_blocks, config.block_size)
        # A state has no blocks that others could take over.
        prefix_caching = config.enable_prefix_caching and kind.keeps_prefixes and not stock.has_states
        self.blocks = BlockManager(num_blocks, config.block_size, prefix_caching)
        policies = Policies.of(
            [*shares, *[NO_SHARE] * self.max_variants],
            num_slots=self.model.slots.num_slots + self.max_variants,
            max_variants_per_step=config.max_variants_per_step,
            max_num_batched_tokens=config.max_num_batched_tokens,
            target_itl=config.target_itl,
            admission_factor=config.admission_factor,
            clock=time.monotonic,
        )
        self.scheduler = Scheduler(
            self.blocks,
            policies,
            max_num_seqs=self.cache_room.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            max_model_len=[*lengths, *[max(lengths)] * self.max_variants],
            reconfigurations=lambda: (self.model.slots.stats.count, self.model.slots.stats.seconds),
        )
        sizes = [v.vocab_size for v in bundle.variants]
        self.vocab_size = max(sizes)
        sizes += [self.vocab_size] * self.max_variants
        graphs = self._decode_graphs(max(lengths), num_blocks)
        self.runner = kind.runner(self.model, config.block_size, sizes, config.seed, graphs)
        self._in_flight: tuple[LaunchedStep, StepInFlight] | None = None
        # By place: planned variants have theirs in the bundle's order, those that came later the places behind.
        self.variants = {v: variant_info(bundle, v, lengths[v]) for v in range(len(bundle.variants))}
        self.counters = Counters(self.scheduler, self.model, self.variants)
        self.grammars = GrammarCompiler(self.variants, self.vocab_size)
        ahead = config.headroom if backend.keeps_tables_on_device else None
        self.live = LiveVariants(self, LiveWeights(self.model, ahead)) if self.max_variants else None
        if self.live is not None:
            self.live.restore()
        if graphs is not None and self.device.type == "cuda":
            report = progress or (lambda _stage, _fraction: None)
            graphs.capture(lambda fraction: report("CUDA graphs", fraction))
        # Without graphs a step keeps the host busy, or waits for the device, until it is nearly done.
        automatic = graphs is not None and graphs.num_captured > 0
        self.asynchronous = automatic if config.async_scheduling is None else config.async_scheduling
        table = bundle.table
        self.info = EngineInfo(
            variants=list(self.variants.values()),
            names={} if self.live is None else self.live.names(),
            policy=bundle.manifest.policy,
            resident_bytes=self.model.resident_bytes,
            slots=self.model.slots.num_slots,
            num_kv_blocks=num_blocks,
            block_size=config.block_size,
            experts_resident=sum(len(set(layer[layer >= 0].tolist())) for layer in table.unbind(1)),
            experts_absent=int((table < 0).any(dim=0).sum()),
            max_concurrency=num_blocks * config.block_size / max(lengths),
            device=str(self.device),
            dtype=name,
            prefix_caching=prefix_caching,
            max_variants=self.max_variants,
            headroom=config.headroom,
            fast_paths=self.model.fast_paths,
            device_bytes=total_memory() if facts is None else facts.total_bytes,
            workspace_bytes=0 if self.memory_plan is None else self.memory_plan.workspace,
        )

    def is_running(self, place: int) -> bool:
        """Whether a sequence of this place waits, runs, or is in a step that is in flight."""
        if any(sequence.variant == place for sequence in self.scheduler.sequences):
            return True
        return self._in_flight is not None and any(s.variant == place for s, _ in self._in_flight[0].sequences)

    def _decode_graphs(self, longest: int, num_blocks: int) -> DecodeGraphs | None:
        """Not captured yet; None for a model that they do not suit."""
        if not suits_graphs(self.model):
            return None
        size = self.config.block_size
        return DecodeGraphs(self.model, self.config.max_num_seqs, min((longest + size - 1) // size, num_blocks))

    def warm_up(self, progress: Callable[[float], None]) -> None:
        """On a GPU: compile what prompts need (decode is compiled by now), so that the first requests do not wait."""
        if self.device.type == "cuda":
            warm_up(self.model, prompt_lengths(self.config.max_num_batched_tokens), progress)

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises `RequestError` for an SLO class that does not exist, and `OverloadedError` where the
        queue is full or the first token would come too late."""
        salt = salt_of(self.variants[request.variant].version, request.cache_salt)
        target = self._ttft_target(request.qos.slo_class)
        grammar = None if request.grammar is None else self.grammars.compile(request.variant, request.grammar)
        self.scheduler.add(Sequence(request, salt, target, grammar))

    def _ttft_target(self, slo_class: str) -> float | None:
        if slo_class != DEFAULT_SLO_CLASS and slo_class not in self.config.slo:
            known = ", ".join(dict.fromkeys([DEFAULT_SLO_CLASS, *self.config.slo]))
            raise RequestError(
                f"The SLO class {slo_class[:64]!r} does not exist; use one of: {known}.", param="slo_class"
            )
        return self.config.slo.get(slo_class)

    def abort(self, request_ids: list[SequenceId]) -> None:
        """Drop requests and free their blocks; ids that are not running are ignored."""
        self.scheduler.abort(set(request_ids))

    def has_work(self) -> bool:
        return self.scheduler.has_work() or self._in_flight is not None

    def step(self) -> list[TokenOutput]:
        """One pass: every output is a token that is new since the last step.

        With asynchronous scheduling the outputs are the tokens of the step before, which the host reads while the
        device runs the one that begins here. What is given to the device runs in that order, so blocks of a sequence
        that turns out to have ended may be given away at once.
        """
        scheduled = self.scheduler.schedule()
        if scheduled:
            self.counters.count(scheduled)
        before = None if self._in_flight is None else self._in_flight[1]
        upcoming = self.scheduler.variants.upcoming
        launched = self.runner.launch(scheduled, before, upcoming) if scheduled else None
        outputs = self._collect()
        if launched is not None:
            self._in_flight = self.scheduler.launched(scheduled), launched
        elif not outputs and self.scheduler.held:  # there may be nothing to do until a grammar is compiled
            futures = [s.grammar for s in self.scheduler.held if s.grammar is not None]
            concurrent.futures.wait(futures, _LOOK_AGAIN, concurrent.futures.FIRST_COMPLETED)
        return outputs if self.asynchronous else outputs + self._collect()

    def _collect(self) -> list[TokenOutput]:
        """Wait for the tokens of the step that is in flight, if there is one."""
        if self._in_flight is None:
            return []
        (step, launched), self._in_flight = self._in_flight, None
        return self.scheduler.update(step, launched.wait())

    def prompt_logits(
        self, prompts: list[tuple[int, list[int]]], num_encoder_tokens: list[int] | None = None
    ) -> list[torch.Tensor]:
        """Logits after every token of several prompts, in one mixed pass outside the schedule.

        Args:
            prompts: (variant index, token ids) each.
            num_encoder_tokens: of each prompt's first tokens, those that an encoder reads; they have no logits.

        Returns: float32 `[tokens, vocabulary of the variant]` for each prompt.
        Raises: `ConfigError` if the KV cache cannot hold them, or more variants are mixed than there are slots.
        """
        if len({variant for variant, _ in prompts}) > self.model.slots.num_slots + self.max_variants:
            raise ConfigError(f"prompts of more variants than the {self.model.slots.num_slots} slots in one pass.")
        needed = sum(self.blocks.blocks_for(len(ids)) for _, ids in prompts)
        if not self.blocks.can_allocate([], needed):
            raise ConfigError(f"the KV cache has {self.blocks.num_free} free blocks, these prompts need {needed}.")
        everything = TokenSampling(max_tokens=1, prompt_logprobs=0)
        scheduled = []
        for index, (variant, ids) in enumerate(prompts):
            encoded = 0 if num_encoder_tokens is None else num_encoder_tokens[index]
            request = EngineRequest(
                request_id=SequenceId("logits", index), variant=variant, prompt_token_ids=ids, sampling=everything,
                num_encoder_tokens=encoded,
            )  # fmt: skip
            blocks = self.blocks.allocate(self.blocks.blocks_for(len(ids)))
            scheduled.append(ScheduledSequence(SequenceKey(), request, 0, ids, blocks, samples=True))
        try:
            return self.runner.logits(scheduled)
        finally:
            for item in scheduled:
                self.blocks.release(item.block_ids)

    def stats(self, routing: bool = False) -> EngineStats:
        """Counters and gauges; `routing`: with what was routed since that was last asked for."""
        return self.counters.stats(0 if self.live is None else self.live.added_bytes, routing)

    def check_integrity(self) -> None:
        """Prove the invariants of scheduler, slots and pool (for tests and after incidents)."""
        self.scheduler.check_integrity()
        self.model.pool.check_integrity()
        if self.model.slots.num_slots < len(self.bundle.variants):
            self.model.slots.check_integrity()
