"""The stock model of a bundle before it has weights: what it will need is known and nothing is allocated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from polymoe.model.stock.probe import Trial, trace
from polymoe.model.stock.skeleton import build_skeleton


@dataclass(frozen=True)
class StockModel:
    """A skeleton, for one `ServedModel` to fill, and what a trial run of it has shown."""

    skeleton: PreTrainedModel
    trial: Trial

    @classmethod
    def of(cls, config: Any) -> "StockModel":
        """Raises `UnsupportedModelError`."""
        trial = trace(config)
        return cls(build_skeleton(config), trial)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Weight -> its shape in one model."""
        return {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}

    def kv_bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Keys and values of `block_size` tokens, all layers, and states that grow with the tokens."""
        numbers = sum(x.elements_per_token for x in self.trial.attention_layers.values())
        numbers += sum(spec.state.per_token for spec in self.trial.per_variant.values())
        return numbers * block_size * dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """What each sequence keeps beside its blocks, whatever its length."""
        return sum(spec.state.fixed for spec in self.trial.per_variant.values())

    @property
    def has_states(self) -> bool:
        """Whether sequences keep anything that other sequences with the same first tokens cannot be given."""
        return any(spec.state.fixed or spec.state.per_token for spec in self.trial.per_variant.values())
