"""One variant's own weights in a part of the model, as plain tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from polymoe.model.variants.variant_stack import VariantStack


class PlainWeights:
    """The stacks below `module`, each replaced by one of its rows for as long as a variant runs."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._stacks = [
            (part, name, value, value.rows.unbind())
            for part in module.modules()
            for name, value in vars(part).items()
            if isinstance(value, VariantStack)
        ]

    @contextmanager
    def of(self, variant: int) -> Iterator[None]:
        """Raises `RuntimeError` for a variant that is in no slot."""
        for part, name, stack, rows in self._stacks:
            row = stack.row_map.rows[variant]
            if row < 0:
                raise RuntimeError(f"variant {variant} is in the batch but in no slot")
            part.__dict__[name] = rows[row]
        try:
            yield
        finally:
            for part, name, stack, _ in self._stacks:
                part.__dict__[name] = stack
