"""Absent experts in decode steps that wait for nobody: kernels read them over the bus, the busiest from the device.

A layer's absent experts lie in pinned host memory, which a GPU's kernels address like their own; rows on the device
hold those that are used most. Both are further pools of the layer, with ids after the resident ones:

    |-- resident 0 … P − 1 --|-- on the host P … P + H − 1 --|-- rows P + H … P + H + C − 1 --|

Which id serves a (variant, expert) is a table on the device. It is changed between steps, in the order of the stream,
so captured graphs stay valid. The steps count what they use on the device; the counts are read when they have arrived,
and then an expert moves: the last holder of its row goes back to its host id; the expert is copied, once all steps
before that are done and beside those that follow; when it is there, its id becomes the row's.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from polymoe.config import format_bytes
from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.machine import available_memory
from polymoe.model.experts.cache import ExpertCache, TierStats
from polymoe.model.experts.layer import LayerExperts
from polymoe.model.experts.mapped_layer import MappedLayer
from polymoe.model.transfer.copies import Arrival, Copier, Copy, ThreadCopier
from polymoe.model.transfer.download import Download
from polymoe.model.transfer.stream_copies import StreamCopier

Weights = Mapping[str, torch.Tensor]

_PERIOD = 16  # steps between two looks at the counts
_MOVES = 8  # experts on their way at once, so that steps which read over the bus keep most of it


@dataclass(frozen=True)
class _Move:
    layer: MappedLayer
    expert: int
    row: int
    arrival: Arrival


class MappedExperts:
    """All layers' absent experts, and who is in which row.

    Args:
        layers: by layer number.
        expert_bytes: of one expert in the dtype that is computed in.
        copier: brings experts to their rows.
        stats: counts what decode steps used.
    """

    def __init__(self, layers: Mapping[int, MappedLayer], expert_bytes: int, copier: Copier, stats: TierStats) -> None:
        self.layers, self._expert_bytes, self._copier, self._stats = layers, expert_bytes, copier, stats
        self.counted_steps = 0  # that `stats` knows of
        self._steps = 0
        self._download: Download | None = None
        self._moves: list[_Move] = []

    @property
    def host_bytes(self) -> int:
        """Pinned memory of the host."""
        return sum(layer.num_host for layer in self.layers.values()) * self._expert_bytes

    @property
    def row_bytes(self) -> int:
        """Rows on the device."""
        return sum(layer.num_rows for layer in self.layers.values()) * self._expert_bytes

    def host_expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        """Name -> `[*shape]` of an expert of the host tier."""
        return {name: stack[index] for name, stack in self.layers[layer].host.items()}

    def after_step(self) -> None:
        """Between two steps: move what the counts ask for. Waits for nothing."""
        self._steps += 1
        for move in [move for move in self._moves if move.arrival.seconds() is not None]:
            self._finish(move)
        if self._download is not None and self._download.is_done():
            counts, self._download = self._download.wait(), None
            self.counted_steps += _PERIOD
            self._decide(counts)
        if self._download is None and self._steps % _PERIOD == 0:
            counted = [layer.counts for layer in self.layers.values()]
            self._download = Download([own.clone() for own in counted])
            for own in counted:
                own.zero_()

    def _decide(self, counts: Sequence[torch.Tensor]) -> None:
        for (number, layer), own in zip(self.layers.items(), counts, strict=True):
            host, rows = own[: layer.num_host].tolist(), own[layer.num_host : -1].tolist()
            self._stats.misses += sum(host)
            self._stats.hits += sum(rows)
            self._stats.host_bytes += sum(host) * self._expert_bytes
            for row, expert in enumerate(layer.holder):
                if expert >= 0:
                    host[expert] += rows[row]
            for expert, times in enumerate(host):
                if times and layer.num_rows:
                    layer.policy.access(expert, times)
            self._rearrange(number, layer)

    def _rearrange(self, number: int, layer: MappedLayer) -> None:
        """Start to bring what the policy keeps into rows of what it does not."""
        busy = {move.row: move.expert for move in self._moves if move.layer is layer}
        held = {*layer.holder, *busy.values()}
        wanted = [expert for expert in range(layer.num_host) if expert in layer.policy and expert not in held]
        free = [r for r, e in enumerate(layer.holder) if r not in busy and (e < 0 or e not in layer.policy)]
        for expert, row in zip(wanted, free, strict=False):
            if len(self._moves) == _MOVES:
                return
            if layer.holder[row] >= 0:
                layer.point(layer.holder[row], None)
                layer.holder[row] = -1
            copies = [
                Copy("", stack[row], (expert, f"{number} {name}"), partial(layer.host[name].__getitem__, expert))
                for name, stack in layer.rows.items()
            ]
            self._moves.append(_Move(layer, expert, row, self._copier.start(copies, self._copier.mark())))

    def _finish(self, move: _Move) -> None:
        """The copy has arrived."""
        started = time.perf_counter()
        move.arrival.wait_all()
        self._stats.seconds += time.perf_counter() - started
        self._moves.remove(move)
        move.layer.holder[move.row] = move.expert
        move.layer.point(move.expert, move.row)

    def check_integrity(self) -> None:
        """Rows and table say the same, and no expert is in two rows."""
        for number, layer in self.layers.items():
            held = [expert for expert in layer.holder if expert >= 0]
            assert len(held) == len(set(held)), f"layer {number}: an expert is in two rows"
            for expert in range(layer.num_host):
                place = layer.num_host + layer.holder.index(expert) if expert in held else expert
                ids = layer.table[layer._absent == -1 - expert]
                assert bool((ids == layer._first + place).all()), f"layer {number}: host expert {expert} is elsewhere"


def map_experts(
    all_layers: Sequence[LayerExperts], table: torch.Tensor, cache: ExpertCache, modules: Sequence[Any], top_k: int
) -> MappedExperts | None:
    """Make absent experts readable for decode steps; None where those have to wait for them.

    They have to where the kernels do not know the model's experts, where the host computes them faster than the bus
    brings them, and where the host's memory cannot hold them pinned (a warning says so). A quarter of the cache's
    budget stays with it, for prompts.

    Args:
        all_layers: of the pool, with its `table [V, L, E]`.
        modules: the stock experts modules, one a layer. top_k: experts a token.
    """
    backend, device = all_layers[0].context.backend, table.device
    absent = {n: layer.num_absent for n, layer in enumerate(all_layers) if not layer.all_resident}
    if not absent or not all(all_layers[n].compute.follows_tables for n in absent):
        return None
    parameters, dtype = sum(tensor.numel() for tensor in cache.host_expert(next(iter(absent)), 0).values()), cache.dtype
    expert_bytes = parameters * dtype.itemsize
    uses = top_k * float((table < 0).float().mean())
    if cache.costs is not None and not cache.costs.decodes_mapped(expert_bytes, parameters, uses):
        return None
    try:
        stacks = _pinned_stacks(cache.host_expert, absent, dtype, pinned=device.type == "cuda")
    except MemoryError as error:
        warnings.warn(f"decode steps wait for absent experts, which makes them slower: {error}", stacklevel=2)
        return None
    room = cache.budget * 3 // 4 // expert_bytes // len(absent)
    on_device, layers = table.clone(), {}
    for number, host in stacks.items():
        own, count = all_layers[number], min(room, absent[number])
        rows = {n: torch.empty(count, *t.shape[1:], dtype=dtype, device=device) for n, t in host.items() if count}
        compressed = own.compressed or CompressedLayer(own.resident, (), (), own.transposed)
        layers[number] = layer = MappedLayer(own.table, on_device[:, number], compressed, host, rows)
        here = replace(own.described, table=layer.table, weights=layer.weights, num_absent=0)
        layer.prepared = backend.prepare_experts(modules[number], here)
        own.mapped = layer
    mapped = MappedExperts(
        layers, expert_bytes, StreamCopier(device) if device.type == "cuda" else ThreadCopier(), cache.stats
    )
    cache.host_expert, cache.budget = mapped.host_expert, cache.budget - mapped.row_bytes
    return mapped


def _pinned_stacks(
    host_expert: Callable[[int, int], Weights], counts: Mapping[int, int], dtype: torch.dtype, pinned: bool
) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> name -> `[count, *shape]`. MemoryError, before anything is read, where the host has no room."""
    shapes = {
        layer: {n: (count, *t.shape) for n, t in host_expert(layer, 0).items()} for layer, count in counts.items()
    }
    sizes = [math.prod(shape) * dtype.itemsize for own in shapes.values() for shape in own.values()]
    # torch rounds each piece of pinned memory up to a power of two.
    needed, available = sum(1 << (size - 1).bit_length() if pinned else size for size in sizes), available_memory()
    advice = "plan with more --memory."
    if available is not None and needed > 0.9 * available:
        raise MemoryError(
            f"{format_bytes(needed)} of them do not fit into the {format_bytes(available)} of memory that the host has "
            f"free; {advice}"
        )
    try:
        stacks = {
            layer: {name: torch.empty(shape, dtype=dtype, pin_memory=pinned) for name, shape in own.items()}
            for layer, own in shapes.items()
        }
    except RuntimeError as error:
        raise MemoryError(
            f"the system does not give {format_bytes(needed)} of pinned memory ({error}); {advice}"
        ) from error
    for layer, own in stacks.items():
        for index in range(counts[layer]):
            for name, tensor in host_expert(layer, index).items():
                own[name][index].copy_(tensor)
    return stacks
