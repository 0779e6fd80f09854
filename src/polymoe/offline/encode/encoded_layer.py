"""One layer's packed experts as the bundle stores them."""

from dataclasses import dataclass, field

from torch import Tensor

from polymoe.offline.encode.position_codec import PackedTensor

Packed = dict[str, dict[str, Tensor]]  # tensor name -> part -> packed tensor


@dataclass(frozen=True, eq=False)
class EncodedLayer:
    """`bases` (serving leader, expert) and `deltas` (variant, expert) -> tensor name -> part -> packed tensor.

    Left out: bases that are a variant's own expert as stored, and deltas of variants that are the base as stored.
    Variants with bit-identical experts have one and the same parts. With "±" only the leader has a delta.
    Matrices are packed as [out, in] whatever the module holds; `matrix_shape` says what `decode` is to be given.
    """

    bases: dict[tuple[int, int], Packed] = field(default_factory=dict)
    deltas: dict[tuple[int, int], Packed] = field(default_factory=dict)

    def add(self, leader: int, expert: int, tensor: str, packed: PackedTensor) -> None:
        if packed.base is not None:
            self.bases.setdefault((leader, expert), {})[tensor] = packed.base
        for v, parts in packed.deltas.items():
            self.deltas.setdefault((v, expert), {})[tensor] = parts
