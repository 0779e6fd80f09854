"""Where experts come from, and how a layer's reach the device."""

from typing import Protocol

import torch

from polymoe.kernels.cpu.compressed_layer import CompressedLayer
from polymoe.kernels.cpu.packed_pool import ExactPool, PackedPool
from polymoe.model.transfer.staging import Staging
from polymoe.quant.formats import get_format

PackedTensors = dict[str, dict[str, torch.Tensor]]


class ExpertStore(Protocol):
    """Where experts come from; a bundle is one."""

    @property
    def table(self) -> torch.Tensor:
        """`[V, L, E]` int32."""

    @property
    def delta(self) -> torch.Tensor | None:
        """`[V, L, E]` int32, −1 for none."""

    @property
    def sign(self) -> torch.Tensor | None:
        """`[V, L, E]` int8, of the deltas; None: all 1."""

    @property
    def levels(self) -> str:
        """Which levels the packed formats have: see `get_format`."""

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> [out, in] or [out] of what packed tensors stand for."""

    def resident_experts(self, layer: int) -> dict[str, torch.Tensor]:
        """Name -> `[P_0, *shape]`, the bases that are not packed; their ids are the lowest."""

    def packed_bases(self, layer: int) -> dict[str, PackedTensors]:
        """Format -> name -> part -> `[P, …]`, in the order of the ids."""

    def packed_deltas(self, layer: int) -> dict[str, PackedTensors]:
        """Format -> name -> part -> `[D, …]`, in the order of the ids."""

    def host_expert(self, layer: int, index: int) -> dict[str, torch.Tensor]:
        """Name -> `[*shape]`, read lazily."""

    def drop_pages(self) -> None:
        """What was read so far has been copied, and need not stay in memory."""


def load_tensor(
    source: torch.Tensor, device: torch.device, staging: Staging, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A copy on the device, in `dtype` or as stored."""
    target = torch.empty(source.shape, dtype=dtype or source.dtype, device=device)
    staging.copy(target, source)
    return target


def load_packed(
    store: ExpertStore,
    layer: int,
    resident: dict[str, torch.Tensor],
    device: torch.device,
    staging: Staging,
    transposed: bool,
) -> CompressedLayer | None:
    """The packed pools of a layer, as stored; None if it has none. transposed: whether `resident` is `[in, out]`."""

    def load(tensors: PackedTensors) -> PackedTensors:
        return {
            name: {part: load_tensor(t, device, staging) for part, t in parts.items()}
            for name, parts in tensors.items()
        }

    bases, deltas = store.packed_bases(layer), store.packed_deltas(layer)
    if not bases and not deltas:
        return None
    shapes = store.packed_shapes
    return CompressedLayer(
        resident,
        tuple(PackedPool(get_format(name, store.levels), load(tensors), shapes) for name, tensors in bases.items()),
        tuple(
            ExactPool(load(tensors)) if fmt.is_lossless else PackedPool(fmt, load(tensors), shapes)
            for fmt, tensors in ((get_format(name, store.levels), tensors) for name, tensors in deltas.items())
        ),
        transposed,
    )
