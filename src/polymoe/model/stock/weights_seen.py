"""Which objects a stock module's weights were when something was made of them: another once a version comes, or a
weight of all becomes a stack."""

from collections.abc import Iterable
from typing import Any

import torch

from polymoe.model.backends.base import Weight
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.model.variants.variant_stack import VariantStack


def weight_of(tensor: torch.Tensor) -> Weight:
    """A stock module's weight with its versions."""
    if isinstance(tensor, VariantStack):
        return Weight(tensor.rows, tensor.row_map)
    if isinstance(tensor, PackedVariants):
        return Weight(tensor.packed, tensor.row_map)
    return Weight(tensor[None], None)


class WeightsSeen:
    """`tensors`: (module, name) of each. Asking costs one or two looks into a dictionary for each."""

    def __init__(self, tensors: Iterable[tuple[torch.nn.Module, str]]) -> None:
        self._seen: list[tuple[dict[str, Any], str, Any]] = []
        for module, name in tensors:
            tensor = getattr(module, name)
            own = module._parameters if name in module._parameters else vars(module)
            self._seen.append((own, name, tensor))
            if isinstance(tensor, VariantStack):
                self._seen.append((vars(tensor), "rows", tensor.rows))
            if isinstance(tensor, PackedVariants):
                self._seen.append((vars(tensor), "packed", tensor.packed))

    @property
    def are_current(self) -> bool:
        for own, name, seen in self._seen:  # noqa: SIM110  (twice as fast as `all`, in every step for every layer)
            if own.get(name) is not seen:
                return False
        return True
