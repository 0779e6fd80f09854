"""What computes on a device: the interface that a model's parts call."""

from abc import ABC, abstractmethod

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer, Weights
from polymoe.model.batch.batch import AttentionBatch, RowMap, Segments

Tables = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class DeviceKernels(ABC):
    """Fed from device tensors alone. Nothing here waits for the device, so that a decode step can be captured."""

    @abstractmethod
    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        """`x [T, I]` times each token's own row of `stack [R, O, I]` -> `[T, O]`."""

    @abstractmethod
    def rms_norm(
        self, x: torch.Tensor, weights: torch.Tensor, version: torch.Tensor | None, repeat: int, eps: float
    ) -> torch.Tensor:
        """See `polymoe.kernels.gpu.rms_norm`."""

    @abstractmethod
    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: AttentionBatch,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`query [T, Hq, D]` over the cache of one layer `[blocks, block_size, Hk, D / Dv]` -> `[T, Hq, Dv]`."""

    @abstractmethod
    def supports_experts(self, module: torch.nn.Module, weights: Weights | CompressedLayer) -> bool:
        """Whether `experts` computes this layer; otherwise torch does."""

    @abstractmethod
    def experts(
        self,
        module: torch.nn.Module,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        token_variant: torch.Tensor,
        tables: Tables,
        weights: Weights | CompressedLayer,
        num_absent: int,
    ) -> torch.Tensor:
        """A layer's resident experts for `hidden [T, H]`; what is routed to an absent one adds nothing.

        Args:
            tables: the layer's physical ids, deltas and signs, `[V, E]` each.
            num_absent: how many different absent experts the ids name at most.
        """
