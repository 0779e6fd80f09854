"""Bytes of one expert in each format."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import is_transposed, matrix_shape
from polymoe.offline.plan.layout import PhysicalLayout
from polymoe.quant.formats import get_format


@dataclass(frozen=True)
class ExpertSizes:
    """`tensors`: name -> ([out, in] or [out], stored dtype) of one expert."""

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, family: Family) -> Self:
        info, first = family.architecture, family.checkpoints[0]
        transposed = is_transposed(family)
        return cls(
            {
                name: (matrix_shape(tuple(shape), transposed), first.dtype(info.expert_tensor(0, name)))
                for name, shape in info.expert_shapes.items()
            }
        )

    def __call__(self, format_name: str) -> int:
        """Bytes of one expert's base or delta, scales counted; of a lossless delta the most."""
        fmt = get_format(format_name)
        return sum(fmt.num_bytes(shape, dtype) for shape, dtype in self.tensors.values())


def plan_bytes(layout: PhysicalLayout, sizes: ExpertSizes) -> tuple[int, int]:
    """(bytes of all bases, of all deltas); an exact delta counts as a whole expert, which it hardly ever exceeds."""
    bases = sum(len(pool) * sizes(name) for pools in layout.bases for name, pool in pools.items())
    deltas = sum(len(pool) * sizes(name) for pools in layout.deltas for name, pool in pools.items())
    return bases, deltas
