"""Decode steps as CUDA graphs: one launch for the whole model, whatever mix of variants a step has.

A graph is captured for each batch size of a ladder and reads its inputs from a `StaticBatch`. Nothing that changes from
step to step is a Python number in it: which variant a row belongs to, which row of a stack serves a variant, which
physical expert serves a position are device tensors that are changed in place. So a graph stays valid when a slot is
loaded, a table changes, or a variant comes or goes for whom there was room. Where pools of weights come or go with it
the graphs are dropped, and captured again one at a time between steps, which run uncaptured until then.

Without CUDA the same padded steps run uncaptured, which is how the tests compare them.
"""

import bisect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from polymoe.model.graphs.static_batch import DecodeInputs, StaticBatch
from polymoe.model.served_model import ServedModel

Captured = tuple[torch.cuda.CUDAGraph, torch.Tensor]  # and the logits that a replay writes

_STEPS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_WARM_UPS = 2  # passes before a capture: kernels are compiled and their configurations chosen


def ladder(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that are captured; the last is `max_num_seqs`, or 256 if that is less."""
    return (*(size for size in _STEPS if size < max_num_seqs), min(max_num_seqs, _STEPS[-1]))


def suits_graphs(model: ServedModel) -> bool:
    """Whether the model's decode steps depend on nothing but device tensors."""
    if model.runs_per_variant:  # which rows are whose is known on the host only
        return False
    resident = all(layer.all_resident or layer.mapped for layer in model.pool.layers)
    return model.context.backend.pads_steps and resident


class DecodeGraphs:
    """Runs decode steps of a model whose KV cache is attached and whose experts are all resident.

    Args:
        max_blocks: most blocks that a sequence can have.
    """

    def __init__(self, model: ServedModel, max_num_seqs: int, max_blocks: int) -> None:
        self.model = model
        self.sizes = ladder(max_num_seqs)
        cache = model.kv_cache
        null_slot = cache.num_blocks * cache.block_size
        self.batch = StaticBatch(self.sizes[-1], max_blocks, null_slot, model.device)
        self._captured: dict[int, Captured] = {}
        self._pool: Any = None  # of memory, which all graphs use
        self._dropped: list[int] = []  # sizes that are to be captured again, the next one last
        self.record: Callable[[int], Captured] = self._record  # tests, which have no CUDA, record otherwise

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    @property
    def is_behind(self) -> bool:
        """Whether sizes wait to be captured again."""
        return bool(self._dropped)

    @torch.inference_mode()
    def drop(self) -> None:
        """What was captured is not valid any more, once the steps that are in flight are done."""
        if on_gpu := bool(self._captured) and self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._dropped = sorted({*self._captured, *self._dropped})
        self._captured.clear()
        if on_gpu:  # a pool that all graphs have left cannot be captured into again
            self._pool = None
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Between two steps: capture one of the sizes that were dropped, the largest first."""
        if not self._dropped:
            return
        size = self._dropped.pop()
        self.batch.fill(self._dummy(size), size)
        try:
            self._captured[size] = self.record(size)
        except RuntimeError as error:
            self._captured.clear()
            self._dropped.clear()
            warnings.warn(f"decode runs without CUDA graphs, which makes it slower: {error}", stacklevel=2)

    def takes(self, count: int) -> bool:
        """Whether a decode step of `count` sequences is one of the ladder's."""
        return count <= self.sizes[-1]

    @torch.inference_mode()
    def forward(self, inputs: DecodeInputs, present: set[int], upcoming: Sequence[int] = ()) -> torch.Tensor:
        """Logits `[n, vocabulary]` of the n sequences; overwritten by the next step of the same size.

        Args: `present`, `upcoming`: variants, as `ServedModel.forward` has them.
        """
        count = len(inputs.input_ids)
        size = self.sizes[bisect.bisect_left(self.sizes, count)]
        self.batch.fill(inputs, size)
        self.model.admit(present)
        captured = self._captured.get(size)
        if captured is None:
            logits = self._compute(size)
        else:
            graph, logits = captured
            self.model.slots.wait_all()  # a graph cannot wait layer by layer
            graph.replay()
        self.model.prefetch(upcoming)
        return logits[:count]

    def _compute(self, size: int) -> torch.Tensor:
        input_ids, positions, batch = self.batch.tensors(size)
        return self.model.compute(input_ids, positions, batch)

    @torch.inference_mode()
    def capture(self, progress: Callable[[float], None]) -> None:
        """Capture every size, the largest first since the others then fit into its memory.

        A stock definition that waits for the device cannot be captured: it is served uncaptured, with a warning.
        """
        if (reason := self._waits_for_device()) is not None:
            warnings.warn(f"decode runs without CUDA graphs, which makes it slower: {reason}", stacklevel=2)
            return
        self._dropped = list(self.sizes)
        while self._dropped:
            progress(1 - len(self._dropped) / len(self.sizes))
            self.catch_up()
        progress(1.0)

    def _record(self, size: int) -> Captured:
        """Compute the batch of `size` rows that is filled in, as a graph."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._compute(size)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (loading of experts and variants) may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._compute(size)
        return graph, logits

    def _waits_for_device(self) -> str | None:
        """What torch says about an operation that waits for the device, which must not happen during a capture."""
        self.batch.fill(self._dummy(1), 1)
        self._compute(1)  # kernels are compiled and timed, which waits
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._compute(1)
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return None

    def _dummy(self, size: int) -> DecodeInputs:
        """Rows that read and write nothing but the null block, of a variant that is loaded."""
        variant = self.model.some_variant
        zeros = np.zeros(size, dtype=np.int64)
        cache = self.model.kv_cache
        return DecodeInputs(
            input_ids=zeros,
            positions=zeros,
            token_variant=np.full(size, variant),
            slot_mapping=np.full(size, self.batch.null_slot),
            block_table=np.full((size, 1), cache.num_blocks),
        )
