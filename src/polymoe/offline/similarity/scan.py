"""One pass over the weights of a family: what is identical, and how far apart the rest is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polymoe.bundle.layer_names import layer_names
from polymoe.bundle.tensor_file import dtype_name, raw_bytes
from polymoe.console import Console
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.distances import LayerDistances
from polymoe.progress import byte_progress
from polymoe.thread_pool import thread_pool


@dataclass(frozen=True, eq=False)
class FamilyScan:
    """What the weights say. V variants, L layers with routed experts, E experts a layer; hashes are SHA-256."""

    variant_names: tuple[str, ...]
    expert_modules: tuple[str, ...]  # one path an expert layer
    distance: NDArray[np.float64]  # [L, E], Σ_{i<j} ‖W_i − W_j‖₂
    norm: NDArray[np.float64]  # [L, E], mean over the variants of ‖W_v‖₂
    pair_distance: NDArray[np.float64]  # [V, V], of all experts together, relative to the norm of their weights
    pair_square: NDArray[np.float64]  # [L, E, V, V], ‖W_v − W_w‖² of whole experts, and ‖W_v‖² on the diagonal
    changed_bytes: NDArray[np.int64]  # [V, L, E], of the values whose bits differ from the first variant's
    expert_same_as: NDArray[np.int64]  # [V, L, E], the lowest variant whose expert is bit-identical
    expert_hash: NDArray[np.uint8]  # [V, L, E, 32]
    expert_bytes: int  # one expert, as stored
    nonexpert_same_as: Mapping[str, tuple[int, ...]]  # name -> per variant, the lowest with the identical tensor
    nonexpert_hash: Mapping[str, tuple[bytes, ...]]  # name -> per variant
    nonexpert_bytes: Mapping[str, tuple[int, ...]]  # name -> per variant
    nonexpert_square: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # packable ones, as `pair_square`

    @property
    def relative_distance(self) -> NDArray[np.float64]:
        """[L, E]: the mean distance of a pair, relative to the mean norm of the weights. 0 for a single variant."""
        num_variants = len(self.variant_names)
        pairs = max(1, num_variants * (num_variants - 1) // 2)
        scale = pairs * self.norm
        return np.divide(self.distance, scale, out=np.zeros_like(self.distance), where=scale > 0)

    @property
    def layer_names(self) -> list[str]:
        """What `polymoe inspect` calls each expert layer."""
        return layer_names(self.expert_modules)

    @property
    def nonexpert_bytes_total(self) -> int:
        """Bytes of all variants' non-experts, identical tensors once."""
        return sum(
            self.nonexpert_bytes[name][v] for name, sources in self.nonexpert_same_as.items() for v in set(sources)
        )

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights of one model, the largest variant's."""
        own = (sum(sizes[v] for sizes in self.nonexpert_bytes.values()) for v in range(len(self.variant_names)))
        return self.expert_bytes * int(self.expert_same_as[0].size) + max(own)

    @property
    def table_bytes(self) -> int:
        """Bytes of the int32 table that maps (variant, layer, expert) to a physical expert."""
        return 4 * self.expert_same_as.size

    def weights_hash(
        self,
        variant: int,
        serving: NDArray[np.int64] | None = None,
        packed: Mapping[tuple[int, int], bytes] | None = None,
    ) -> str:
        """Hash over all tensors of a variant; with `serving` [L, E], over the experts that serve it, not its own.

        `packed`: (layer, expert) -> the hash of what serves it there, where that is no checkpoint's expert verbatim.
        """
        digest = hashlib.sha256()
        for name in sorted(self.nonexpert_hash):
            digest.update(name.encode() + b"\0" + self.nonexpert_hash[name][variant])
        _, num_layers, num_experts = self.expert_same_as.shape
        for layer in range(num_layers):
            for expert in range(num_experts):
                owner = variant if serving is None else int(serving[layer, expert])
                instead = None if packed is None else packed.get((layer, expert))
                digest.update(instead or self.expert_hash[owner, layer, expert].tobytes())
        return digest.hexdigest()


def scan_family(family: Family, console: Console | None = None) -> FamilyScan:
    """Read every tensor of every variant once, layer by layer; one expert tensor of one layer is held V times at most.

    Raises `CheckpointError` when weights are not finite.
    """
    info, variants = family.architecture, family.checkpoints
    shape = (len(variants), info.num_layers, info.num_experts)
    distance, norm = np.zeros(shape[1:]), np.zeros(shape[1:])
    squares = np.zeros((*shape[1:], len(variants), len(variants)))
    changed_bytes = np.zeros(shape, dtype=np.int64)
    same_as, hashes = np.zeros(shape, dtype=np.int64), np.zeros((*shape, 32), dtype=np.uint8)
    nonexpert_hash: dict[str, tuple[bytes, ...]] = {}
    nonexpert_square: dict[str, NDArray[np.float64]] = {}

    with (
        thread_pool() as pool,
        byte_progress("Comparing", family.num_bytes, console) as advance,
    ):

        def load(name: str) -> list[Tensor]:
            """The tensor in all variants."""
            # Not in the pool's threads: each would keep a heap of its own after stacking experts.
            tensors = [checkpoint.tensor(name) for checkpoint in variants]
            advance(sum(tensor.nbytes for tensor in tensors))
            return tensors

        for layer in range(info.num_layers):
            sums = LayerDistances(len(variants), info.num_experts)
            experts = [[hashlib.sha256() for _ in range(info.num_experts)] for _ in variants]
            for tensor in info.expert_shapes:
                stacks = load(info.expert_tensor(layer, tensor))
                digests = [list(pool.map(tensor_hash, stack)) for stack in stacks]
                list(pool.map(sums.add, range(info.num_experts), zip(*stacks, strict=True), repeat(digests)))
                for variant, expert in np.argwhere(~np.isfinite(sums.norms)):
                    raise CheckpointError(
                        f"{variants[variant].name}: {variants[variant].path}: expert {expert} of "
                        f"{info.expert_tensor(layer, tensor)} has NaN or infinite weights; save or download it again."
                    )
                for variant, rows in enumerate(digests):
                    for expert, digest in enumerate(rows):
                        experts[variant][expert].update(tensor.encode() + b"\0" + digest)
                del stacks  # before the next tensor is read
            squares[layer], changed_bytes[:, layer] = sums.squares, sums.changed_bytes
            distance[layer], norm[layer] = sums.distance, sums.norms.mean(axis=0)
            for expert in range(info.num_experts):
                column = [row[expert].digest() for row in experts]
                same_as[:, layer, expert] = _lowest_equal(column)
                hashes[:, layer, expert] = [list(digest) for digest in column]
        for name in info.nonexperts:
            tensors = load(name)
            for checkpoint, weight in zip(variants, tensors, strict=True):
                if not bool(torch.isfinite(weight).all()):
                    raise CheckpointError(
                        f"{checkpoint.name}: {checkpoint.path}: {name} has NaN or infinite weights; save or download "
                        "it again."
                    )
            nonexpert_hash[name] = tuple(pool.map(tensor_hash, tensors))
            if name in family.packable:
                apart = LayerDistances(len(variants), 1)
                apart.add(0, tensors, [[digest] for digest in nonexpert_hash[name]])
                nonexpert_square[name] = apart.squares[0]

    return FamilyScan(
        variant_names=family.names,
        expert_modules=info.expert_modules,
        distance=distance,
        norm=norm,
        pair_distance=_relative(squares.sum(axis=(0, 1))),
        pair_square=squares,
        changed_bytes=changed_bytes,
        expert_same_as=same_as,
        expert_hash=hashes,
        expert_bytes=family.expert_bytes,
        nonexpert_same_as={name: tuple(_lowest_equal(column)) for name, column in nonexpert_hash.items()},
        nonexpert_hash=nonexpert_hash,
        nonexpert_bytes={name: tuple(c.num_bytes(name) for c in variants) for name in info.nonexperts},
        nonexpert_square=nonexpert_square,
    )


def _relative(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """[V, V] squared distances with squared norms on the diagonal -> distances over the root mean square norm."""
    own = squares.diagonal()
    scale = (own[:, None] + own[None]) / 2
    relative: NDArray[np.float64] = np.sqrt(np.divide(squares, scale, out=np.zeros_like(squares), where=scale > 0))
    np.fill_diagonal(relative, 0.0)
    return relative


def tensor_hash(tensor: Tensor) -> bytes:
    """SHA-256 of dtype, shape and values."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
    return digest.digest()


def _lowest_equal(column: Sequence[bytes]) -> list[int]:
    """For each entry the index of the first equal one: [a, b, a] -> [0, 1, 0]."""
    return [column.index(digest) for digest in column]
