"""A variant as a bundle serves it, in a stock transformers model whose scales can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymoe.bundle.reader import Bundle
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.matrices import as_matrix
from polymoe.offline.distill.learned import Learned
from polymoe.quant.formats import Format, get_format, group_size


@dataclass(frozen=True, eq=False)
class _Stack:
    """One tensor of all experts of a layer: `fixed` float32 [E, out, in], plus sign · levels · scales for those in
    `deltas`: format -> (experts [n], sign · levels [n, out, in], scales as stored [n, out, groups], delta ids [n])."""

    fixed: Tensor
    deltas: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]


class ServedVariant:
    """`stored()`: what can be learned, as it is: (layer, format, tensor) -> scales, name -> norm or router."""

    def __init__(self, bundle: Bundle, variant: int, checkpoint: Checkpoint) -> None:
        from polymoe.offline.checkpoint.loaded_model import loaded_model

        self.bundle, self.variant = bundle, variant
        self.model = loaded_model(checkpoint, torch.float32).requires_grad_(False)
        self.model.set_experts_implementation("eager")  # the one with gradients everywhere
        self.stacks = {
            (layer, tensor): self._stack(layer, tensor)
            for layer in range(len(bundle.expert_modules))
            for tensor in bundle.expert_tensor_names
        }
        packed = bundle.manifest.packed_nonexperts
        self.packed = {name: bundle.nonexpert(variant, name).float() for name in packed}  # as they will be served
        self.names = [name for name in bundle.nonexpert_names if self._is_own(name) and self._is_trained(name)]

    def stored(self) -> dict[Any, Tensor]:
        scales = {
            (layer, fmt, tensor): parts[2].float()
            for (layer, tensor), stack in self.stacks.items()
            for fmt, parts in stack.deltas.items()
        }
        return {**scales, **{name: self.bundle.nonexpert(self.variant, name).float() for name in self.names}}

    def changes(self) -> dict[Any, Tensor]:
        """What is optimised, 0 at first: relative changes of the scales; of others in units of their mean size."""
        return {key: torch.zeros_like(value, requires_grad=True) for key, value in self.stored().items()}

    def changed(self, changes: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The values after `changes`."""
        return {
            key: value * (1 + changes[key]) if isinstance(key, tuple) else value + changes[key] * value.abs().mean()
            for key, value in self.stored().items()
        }

    def rounded(self, changes: Mapping[Any, Tensor]) -> Learned:
        """`changed` in the dtypes that the bundle stores, and where the scales belong in its pools."""
        values: dict[Any, Tensor] = {}
        for key, value in self.changed(changes).items():
            if isinstance(key, tuple):
                dtype = self.stacks[key[0], key[2]].deltas[key[1]][2].dtype
            else:
                dtype = self.bundle.nonexpert(self.variant, key).dtype
            values[key] = value.to(dtype)
        rows = {
            (layer, fmt, tensor): parts[3]
            for (layer, tensor), stack in self.stacks.items()
            for fmt, parts in stack.deltas.items()
        }
        return Learned(values, rows)

    def original_logits(self, windows: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=windows, use_cache=False).logits
        return logits

    def logits(self, windows: Tensor, values: Mapping[Any, Tensor]) -> Tensor:
        """float32 [windows, length, vocabulary] of what is served with `values` as `stored` gives them."""
        weights = {**self.packed, **{name: values[name].float() for name in self.names}}
        for (layer, tensor), stack in self.stacks.items():
            whole = stack.fixed
            for fmt, (experts, levels, _, _) in stack.deltas.items():
                spread = values[layer, fmt, tensor].float()
                size = group_size(get_format(fmt), levels.shape[-1])
                spread = spread.repeat_interleave(size, dim=-1)[..., : levels.shape[-1]]
                whole = whole.index_add(0, experts, levels * spread)
            if whole.ndim == 3 and self.bundle.manifest.transposed:
                whole = whole.transpose(1, 2)
            weights[f"{self.bundle.expert_modules[layer]}.{tensor}"] = whole
        call = {"input_ids": windows, "use_cache": False}
        found: Tensor = torch.func.functional_call(self.model, weights, (), call).logits
        return found

    def _is_own(self, name: str) -> bool:
        sources = self.bundle.nonexpert_sources(name)
        return sources.count(sources[self.variant]) == 1

    def _is_trained(self, name: str) -> bool:
        """Norms, and routers: the matrices beside a layer's experts with a row an expert."""
        value = self.bundle.nonexpert(self.variant, name)
        if value.ndim == 1:
            return "norm" in name and name.endswith("weight")
        beside = any(name.startswith(path.rpartition(".")[0] + ".") for path in self.bundle.expert_modules)
        return beside and value.ndim == 2 and len(value) == self.bundle.manifest.num_experts

    def _stack(self, layer: int, tensor: str) -> _Stack:
        bundle, shape = self.bundle, self.bundle.packed_shapes[tensor]
        bases = list(self._bases(layer, tensor, shape))
        fixed = []
        for place in bundle.table[self.variant, layer].tolist():
            if place < 0:
                own = bundle.host_expert(layer, -1 - place)[tensor]
                fixed.append(as_matrix(own, bundle.manifest.transposed).float())
            else:
                fixed.append(bases[place])
        found: dict[str, list[tuple[int, Tensor, Tensor, int]]] = {}
        delta = [-1] * len(fixed) if bundle.delta is None else bundle.delta[self.variant, layer].tolist()
        for expert, place in enumerate(delta):
            if place < 0:
                continue
            fmt, row, parts = _find(bundle, layer, place, tensor)
            sign = 1 if bundle.sign is None else int(bundle.sign[self.variant, layer, expert])
            assert bundle.delta is not None
            alone = int((bundle.delta[:, layer] == place).sum()) == 1
            one = fmt.entry(parts, row)
            if "scales" not in parts or not alone:
                base = self._stored_base(layer, tensor, expert) if fmt.is_lossless else fixed[expert]
                fixed[expert] = fmt.corrected(base, one, sign).float()
            else:
                levels = sign * fmt.decode({**one, "scales": torch.ones_like(one["scales"])}, shape, torch.float32)
                found.setdefault(fmt.name, []).append((expert, levels, one["scales"], row))
        deltas = {
            name: (torch.tensor(experts), torch.stack(levels), torch.stack(scales), torch.tensor(rows))
            for name, (experts, levels, scales, rows) in ((n, zip(*v, strict=True)) for n, v in found.items())
        }
        return _Stack(torch.stack(fixed), deltas)

    def _bases(self, layer: int, tensor: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """float32 [out, in] of each physical base, in the order of their ids."""
        for stored in self.bundle.resident_experts(layer)[tensor]:
            yield as_matrix(stored, self.bundle.manifest.transposed).float()
        for name, pool in self.bundle.packed_bases(layer).items():
            fmt = get_format(name, self.bundle.levels)
            for row in range(self.bundle.manifest.base_pools[layer][name]):
                yield fmt.decode(fmt.entry(pool[tensor], row), shape, torch.float32)

    def _stored_base(self, layer: int, tensor: str, expert: int) -> Tensor:
        place = int(self.bundle.table[self.variant, layer, expert])
        return as_matrix(self.bundle.resident_experts(layer)[tensor][place], self.bundle.manifest.transposed)


def _find(bundle: Bundle, layer: int, place: int, tensor: str) -> tuple[Format, int, dict[str, Tensor]]:
    """(format, row in its pool, the pool's parts of `tensor`) of delta `place` of a layer."""
    pools, sizes = bundle.packed_deltas(layer), bundle.manifest.delta_pools[layer]
    for name, size in sizes.items():
        if place < size:
            return get_format(name, bundle.levels), place, pools[name][tensor]
        place -= size
    raise AssertionError("an id beyond the pools")
