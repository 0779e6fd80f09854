"""What one could do without polymoe, as weights for stock transformers: averages, quantised copies, and deltas
written in other ways."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.deltas import coded_bytes, even_levels, nested, sign_and_rank
from polymoe.errors import PolymoeError
from polymoe.model.stock.switch_experts import stacked_name
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import as_matrix, is_transposed
from polymoe.offline.plan.plan import paper_plan
from polymoe.offline.similarity.scan import FamilyScan

GROUP = 64  # values that share a scale in a quantised copy, as its users' tools have it
_SCALE_BYTES = 2
_STEPS = np.linspace(0.5, 1.0, 26)  # of the step at which nothing is clipped

Weights = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Baseline:
    """`weights(v)`: (parameter, value) of all that differs from variant v's checkpoint. Bytes are on the device."""

    expert_bytes: int
    nonexpert_bytes: int
    weights: Callable[[int], Weights]


def make_baseline(name: str, family: Family, scan: FamilyScan) -> Baseline:
    """The baseline of that name in `BASELINES`. Raises `PolymoeError` where this family does not allow it."""
    return BASELINES[name](family, scan)


def put_weights(model: Any, weights: Weights) -> None:
    """Copy them into a stock model, which must have each by its name, or as the modules that Switch Transformers'
    stacks are made of."""
    state = model.state_dict()
    parts: dict[str, dict[int, Tensor]] = {}
    for stored, tensor in state.items():
        found = stacked_name(stored)
        if found is not None:
            parts.setdefault(found[0], {})[found[1]] = tensor
    for name, value in weights:
        if name in parts:
            for expert, tensor in parts[name].items():
                tensor.copy_(value[expert])
        else:
            state[name].copy_(value)


def _expert_names(family: Family) -> list[tuple[int, str]]:
    """(layer, parameter) of all stacks of experts."""
    info = family.architecture
    return [(layer, info.expert_tensor(layer, t)) for layer in range(info.num_layers) for t in info.expert_shapes]


def _one_model(scan: FamilyScan) -> tuple[int, int]:
    """(expert bytes, non-expert bytes) of the first variant alone."""
    experts = scan.expert_bytes * scan.expert_same_as[0].size
    return experts, sum(sizes[0] for sizes in scan.nonexpert_bytes.values())


def _check_one_vocabulary(family: Family) -> None:
    if len(set(family.vocab_sizes)) > 1:
        raise PolymoeError(f"the variants' vocabularies differ in size: {', '.join(map(str, family.vocab_sizes))}.")


def _average(family: Family, scan: FamilyScan) -> Baseline:
    """One model whose every weight is the mean of the variants'."""
    _check_one_vocabulary(family)

    def weights(_: int) -> Weights:
        for name in family.checkpoints[0].target_names:
            tensors = [checkpoint.tensor(name) for checkpoint in family.checkpoints]
            if tensors[0].is_floating_point():
                yield name, torch.stack([t.float() for t in tensors]).mean(dim=0).to(tensors[0].dtype)

    return Baseline(*_one_model(scan), weights)


def _one_nonexperts(family: Family, scan: FamilyScan) -> Baseline:
    """The paper without its reconfiguration: round-robin experts, and the first variant's non-experts for all."""
    _check_one_vocabulary(family)
    same_as = scan.expert_same_as
    owner = paper_plan(scan.distance, same_as, same_as[0].size).serving[0]

    def weights(_: int) -> Weights:
        first = family.checkpoints[0]
        for name in family.architecture.nonexperts:
            yield name, first.tensor(name)
        for layer, name in _expert_names(family):
            stacks = {v: family.checkpoints[v].tensor(name) for v in set(owner[layer].tolist())}
            yield name, torch.stack([stacks[int(v)][e] for e, v in enumerate(owner[layer])])

    return Baseline(*_one_model(scan), weights)


def _copies(bits: int, family: Family, scan: FamilyScan) -> Baseline:
    """Every variant's own experts, rounded to the nearest of 2^bits levels in groups with the best step."""
    transposed, info = is_transposed(family), family.architecture

    def weights(variant: int) -> Weights:
        for _, name in _expert_names(family):
            stack = family.checkpoints[variant].tensor(name)
            if stack.ndim > 2:
                rounded = [rounded_to_nearest(as_matrix(expert, transposed).float(), bits) for expert in stack]
                stack = torch.stack([as_matrix(matrix, transposed) for matrix in rounded])
            yield name, stack

    expert = sum(_copy_bytes(tuple(shape), bits, transposed) for shape in info.expert_shapes.values())
    return Baseline(expert * scan.expert_same_as.size, scan.nonexpert_bytes_total, weights)


def _deltas(
    write: Callable[[Tensor, Tensor, Tensor, int], Tensor], base_bits: int, bits: int, family: Family, scan: FamilyScan
) -> Baseline:
    """The mean of each position's variants in even levels of `base_bits`, and every variant's difference to it as
    `write` (weight, base, the base's scales, bits) has it in the bytes of `bits` a value."""
    transposed, info = is_transposed(family), family.architecture

    def weights(variant: int) -> Weights:
        for _, name in _expert_names(family):
            stacks = [checkpoint.tensor(name) for checkpoint in family.checkpoints]
            if stacks[0].ndim == 2:
                yield name, stacks[variant]
                continue
            written = []
            for experts in zip(*stacks, strict=True):
                own = [as_matrix(expert, transposed).float() for expert in experts]
                base, scales = even_levels(torch.stack(own).mean(dim=0), base_bits)
                written.append(as_matrix(write(own[variant].contiguous(), base, scales, bits), transposed))
            yield name, torch.stack(written).to(stacks[0].dtype)

    shapes = [tuple(shape)[::-1] if transposed else tuple(shape) for shape in info.expert_shapes.values()]
    variants = len(family.checkpoints)
    expert = sum(
        coded_bytes(*shape, base_bits) + variants * coded_bytes(*shape, bits)
        if len(shape) == 2
        else 2 * variants * shape[0]
        for shape in shapes
    )
    return Baseline(expert * scan.expert_same_as[0].size, scan.nonexpert_bytes_total, weights)


def _copy_bytes(shape: tuple[int, ...], bits: int, transposed: bool) -> int:
    if len(shape) == 1:
        return 2 * shape[0]  # a bias stays as it is
    outputs, inputs = shape[::-1] if transposed else shape
    return outputs * (math.ceil(inputs * bits / 8) + _SCALE_BYTES * math.ceil(inputs / GROUP))


def rounded_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """`weight` float32 [O, I] in integers −2^(b−1) … 2^(b−1) − 1 times a scale for each `GROUP` values of a row; the
    scale is the one of `_STEPS` with the least squared error."""
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # The side with one level more takes the largest value.
    extreme = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True)) / low
    best, least = torch.zeros_like(padded), torch.full(extreme.shape, math.inf)
    for step in _STEPS.tolist():
        scale = (extreme * step).to(torch.bfloat16).float()
        scale = torch.where(scale == 0, 1.0, scale)
        rounded = (padded / scale).round().clamp(low, high) * scale
        error = (rounded - padded).square().sum(dim=2, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.view(outputs, -1)[:, :inputs]


BASELINES: dict[str, Callable[[Family, FamilyScan], Baseline]] = {
    "average": _average,
    "one-nonexperts": _one_nonexperts,
    **{f"int{bits}-copies": partial(_copies, bits) for bits in (8, 4, 3)},
    **{f"nested-{base}-{bits}": partial(_deltas, nested, base, bits) for base in (8, 4) for bits in (1, 2, 3)},
    **{f"rank-{base}-{bits}": partial(_deltas, sign_and_rank, base, bits) for base in (8, 4) for bits in (2, 3)},
}
