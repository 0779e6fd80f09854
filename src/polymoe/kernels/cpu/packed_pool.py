"""Stacks of packed experts on the device, and the linear maps over them: torch, one matrix decoded at a time.

    base:   y_r = Q_b(r) x_r + c_b(r)             delta:   y_r += s_r (Δ_d(r) x_r + e_d(r))

Letters: S rows, G groups of rows, P packed bases, D deltas, I inputs, O outputs. Nothing here keeps a dense expert: a
matrix is decoded, used for the rows of its group and dropped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from polymoe.quant.codec import decode
from polymoe.quant.exact import changes_before_rows, decode_exact
from polymoe.quant.formats import PLANES, Format, group_size

MARK_ROWS = 16


@dataclass(frozen=True, eq=False)
class Groups:
    """Group g is rows `starts[g] : stops[g]` and uses entry `ids[g]` of a pool, times `signs[g]`."""

    ids: Sequence[int]
    starts: Sequence[int]
    stops: Sequence[int]
    signs: Sequence[int]


@dataclass(frozen=True, eq=False)
class StoredPool:
    """Experts as the stock module holds them, in a memory of their own: the host's, or rows that change hands.

    tensors: tensor name -> `[P, *shape]`.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def linear(self, x: Tensor, name: str, groups: Groups, out: Tensor) -> None:
        """Set the groups' rows of `out` (float32 [S, O]) to the product of `x` [S, I], bias included."""
        for index, start, stop in zip(groups.ids, groups.starts, groups.stops, strict=True):
            out[start:stop] = (x[start:stop] @ self.tensors[name][index].T).float()
            if f"{name}_bias" in self.tensors:
                out[start:stop] += self.tensors[f"{name}_bias"][index].float()


@dataclass(frozen=True, eq=False)
class PackedPool:
    """Experts in one format of scaled codes.

    tensors: tensor name -> part -> `[P, …]` as `polymoe.quant.formats.parts` describes; a bias has the one part "".
    shapes: tensor name -> [O, I] or [O].
    """

    fmt: Format
    tensors: Mapping[str, Mapping[str, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]

    def __len__(self) -> int:
        return next(iter(next(iter(self.tensors.values())).values())).shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for parts in self.tensors.values() for t in parts.values())

    def decoded(self, name: str, index: int) -> Tensor:
        """float32 [O, I] or [O]: one tensor of one expert."""
        parts = {part: stack[index] for part, stack in self.tensors[name].items()}
        return decode(parts, self.fmt, self.shapes[name], torch.float32)

    def linear(self, x: Tensor, name: str, groups: Groups, out: Tensor) -> None:
        """Set the groups' rows of `out` (float32 [S, O]) to the base product of `x` [S, I], bias included."""
        for index, start, stop in zip(groups.ids, groups.starts, groups.stops, strict=True):
            out[start:stop] = x[start:stop].float() @ self.decoded(name, index).T
            if f"{name}_bias" in self.tensors:
                out[start:stop] += self.decoded(f"{name}_bias", index)

    def add(self, x: Tensor, name: str, groups: Groups, out: Tensor) -> None:
        """Add the delta product of `x` [S, I] with its sign to the groups' rows of `out` (float32 [S, O])."""
        # By id: two variants may have one delta, with both signs, and decoding costs more than the product.
        by_id = sorted(zip(groups.ids, groups.starts, groups.stops, groups.signs, strict=True))
        for index, users in groupby(by_id, key=itemgetter(0)):
            matrix = self.decoded(name, index)
            bias = self.decoded(f"{name}_bias", index) if f"{name}_bias" in self.tensors else None
            for _, start, stop, sign in users:
                out[start:stop].addmm_(x[start:stop].float(), matrix.T, alpha=sign)
                if bias is not None:
                    out[start:stop] += sign * bias


@dataclass(frozen=True, eq=False)
class TiledPool(PackedPool):
    """A pool whose codes and scales are in tiles of 16 outputs: see `tiles.py`. Decoding it is for the reference.

    table: uint8 `[64]` or `[256]`, level + 128 of each code, over and over. step: what 1 of a level is worth, before
    the scale.
    """

    table: Tensor
    step: float

    def decoded(self, name: str, index: int) -> Tensor:
        """float32 [O, I]: one matrix of one expert."""
        parts, (outputs, inputs) = self.tensors[name], self.shapes[name]
        units = parts["codes"][index].view(outputs // 16, inputs // 32, self.fmt.bits, 64)
        codes = torch.zeros(outputs // 16, inputs // 32, 8, 64, dtype=torch.uint8)
        start = 0
        for width in PLANES[self.fmt.bits]:  # [.., width vectors of bytes] -> [.., 8 vectors of codes]
            shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
            plane = (units[:, :, start : start + width, None] >> shifts) & (2**width - 1)
            codes |= plane.flatten(2, 3) << start
            start += width
        rows = codes.view(-1, inputs // 32, 8, 16, 4).permute(0, 3, 1, 2, 4).reshape(outputs, inputs)
        scales = parts["scales"][index].view(outputs // 16, -1, 16).transpose(1, 2).reshape(outputs, -1).float()
        spread = scales.repeat_interleave(group_size(self.fmt, inputs), dim=-1)[:, :inputs]
        return (self.table[rows.int()].float() - 128) * self.step * spread


@dataclass(frozen=True, eq=False)
class ExactPool:
    """Lossless deltas: which values of the base changed, and to what.

    tensors: tensor name -> {"bitmap": uint8 [D, O, ⌈I / 8⌉], "values": [all changes], "starts": int64 [D + 1]}, the
        values of delta d at `values[starts[d] : starts[d + 1]]`; biases likewise without the axis O.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]

    def __len__(self) -> int:
        return next(iter(self.tensors.values()))["bitmap"].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for parts in self.tensors.values() for t in parts.values())

    @cached_property
    def marks(self) -> dict[str, Tensor]:
        """Matrix -> int32 `[D, ⌈O / MARK_ROWS⌉]`: how many values each delta changes before each such row."""
        bitmaps = {name: parts["bitmap"] for name, parts in self.tensors.items() if parts["bitmap"].ndim == 3}
        return {n: changes_before_rows(b)[:, ::MARK_ROWS].to(torch.int32).contiguous() for n, b in bitmaps.items()}

    def changed(self, name: str, index: int, base: Tensor) -> Tensor:
        """The variant's own tensor, in the dtype and on the device of `base` [O, I] or [O]."""
        parts = self.tensors[name]
        start, stop = parts["starts"][index : index + 2].tolist()
        values = parts["values"][start:stop].to(base.dtype)
        return decode_exact({"bitmap": parts["bitmap"][index], "values": values}, base)

    def replace(self, x: Tensor, name: str, groups: Groups, base_of: Callable[[str, int], Tensor], out: Tensor) -> None:
        """Set the groups' rows of `out` (float32 [S, O]) to the product with the variants' own tensors.

        base_of: (tensor name, group) -> the base as stored, [O, I] or [O].
        """
        for g, (index, start, stop) in enumerate(zip(groups.ids, groups.starts, groups.stops, strict=True)):
            own = self.changed(name, index, base_of(name, g))
            out[start:stop] = (x[start:stop] @ own.T).float()
            if f"{name}_bias" in self.tensors:
                out[start:stop] += self.changed(f"{name}_bias", index, base_of(f"{name}_bias", g)).float()


def join(pools: Sequence[ExactPool]) -> tuple[ExactPool, list[ExactPool]]:
    """One pool with the deltas of all, in their order, and each as a part of it. Waits for no device."""
    counts, whole = [len(pool) for pool in pools], dict[str, dict[str, Tensor]]()
    parts: list[dict[str, dict[str, Tensor]]] = [{} for _ in pools]
    for name in pools[0].tensors:
        own = [pool.tensors[name] for pool in pools]
        sizes = [len(tensors["values"]) for tensors in own]
        before = [sum(sizes[:i]) for i in range(len(own))]
        starts = [own[0]["starts"][:1], *(t["starts"][1:] + b for t, b in zip(own, before, strict=True))]
        joined = {part: torch.cat([tensors[part] for tensors in own]) for part in ("bitmap", "values")}
        whole[name] = {**joined, "starts": torch.cat(starts)}
        first = 0
        for part, tensors, count, size, begin in zip(parts, own, counts, sizes, before, strict=True):
            bitmap, values = joined["bitmap"][first : first + count], joined["values"][begin : begin + size]
            part[name] = {"bitmap": bitmap, "values": values, "starts": tensors["starts"]}
            first += count
    return ExactPool(whole), [ExactPool(part) for part in parts]
