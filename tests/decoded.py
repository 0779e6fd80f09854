"""What a bundle's packed experts stand for, decoded slowly through its public API: the reference for serving them."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.weights import put_weights
from polymoe.bundle.reader import Bundle, PackedTensors
from polymoe.quant.codec import decode
from polymoe.quant.exact import decode_exact
from polymoe.quant.formats import get_format
from references import ReferenceFamily


def decoded_experts(bundle: Bundle, variant: int, layer: int) -> dict[str, torch.Tensor]:
    """{tensor name: [E, *shape]} float32, as the stock module holds them: what serves `variant`."""
    experts = [_decoded_expert(bundle, variant, layer, e) for e in range(bundle.manifest.num_experts)]
    stacked = {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
    if bundle.manifest.transposed:
        stacked = {name: stack.transpose(1, 2) if stack.ndim == 3 else stack for name, stack in stacked.items()}
    assert {n: list(t.shape[1:]) for n, t in stacked.items()} == bundle.manifest.expert_shapes
    return stacked


def _decoded_expert(bundle: Bundle, variant: int, layer: int, expert: int) -> dict[str, torch.Tensor]:
    base_id = int(bundle.table[variant, layer, expert])
    flip = bundle.manifest.transposed
    if base_id < 0:
        found = bundle.host_expert(layer, -1 - base_id)
        return {name: (t.T if flip and t.ndim == 2 else t).float() for name, t in found.items()}
    pools = bundle.manifest.base_pools[layer]
    if base_id < pools.get("stored", 0):
        base = {name: t[base_id] for name, t in bundle.resident_experts(layer).items()}
        base = {name: t.T.contiguous() if flip and t.ndim == 2 else t for name, t in base.items()}
    else:
        base = _from_pools(bundle, bundle.packed_bases(layer), base_id - pools.get("stored", 0))
    delta_id = -1 if bundle.delta is None else int(bundle.delta[variant, layer, expert])
    if delta_id < 0:
        return {name: t.float() for name, t in base.items()}
    deltas = bundle.packed_deltas(layer)
    exact = sum(n for name, n in bundle.manifest.delta_pools[layer].items() if name != "exact")
    if delta_id >= exact and "exact" in deltas:
        return {name: _changed(parts, delta_id - exact, base[name]).float() for name, parts in deltas["exact"].items()}
    sign = 1 if bundle.sign is None else int(bundle.sign[variant, layer, expert])
    delta = _from_pools(bundle, deltas, delta_id)
    return {name: base[name].float() + sign * delta[name] for name in base}


def _from_pools(bundle: Bundle, pools: dict[str, PackedTensors], index: int) -> dict[str, torch.Tensor]:
    for name, tensors in pools.items():
        size = len(next(iter(next(iter(tensors.values())).values())))
        if index < size:
            shapes = bundle.packed_shapes
            return {
                tensor: decode({p: t[index] for p, t in parts.items()}, get_format(name), shapes[tensor], torch.float32)
                for tensor, parts in tensors.items()
            }
        index -= size
    raise AssertionError("no such id")


def _changed(parts: dict[str, torch.Tensor], index: int, base: torch.Tensor) -> torch.Tensor:
    start, stop = parts["starts"][index : index + 2].tolist()
    return decode_exact({"bitmap": parts["bitmap"][index], "values": parts["values"][start:stop]}, base)


class DecodedFamily(ReferenceFamily):
    """Reference answers of stock models that run with a bundle's decoded experts and non-experts."""

    def __init__(self, original: ReferenceFamily, bundle: Path) -> None:
        self.arch, self.folder, self.paths = original.arch, original.folder, original.paths
        self.original, self.bundle, self.num_requests = original, bundle, original.num_requests

    def load_models(self) -> dict[str, Any]:
        """Not the original's objects: those keep their own weights."""
        models = super().load_models()
        opened = Bundle.open(self.bundle, verify=True)
        with torch.no_grad():
            for index, model in enumerate(models.values()):
                packed = opened.manifest.packed_nonexperts
                put_weights(model, ((name, opened.nonexpert(index, name)) for name in packed))
                for layer, path in enumerate(opened.expert_modules):
                    stacks = decoded_experts(opened, index, layer)
                    put_weights(model, ((f"{path}.{name}", stack) for name, stack in stacks.items()))
        return models
