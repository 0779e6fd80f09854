"""How far a checkpoint is from what a bundle could share with it, by a sample of its experts."""

import math

import numpy as np

from polymoe.bundle.reader import Bundle
from polymoe.offline.addition.new_variant import open_new
from polymoe.offline.addition.planned import Entry, Expert, PlannedLayer
from polymoe.offline.checkpoint.matrices import as_matrix

_LAYERS, _EXPERTS = 3, 4  # that are looked at, of a layer so many


def distance(bundle: Bundle, name: str, spec: str) -> float:
    """sqrt(Σ min_b ‖W − B_b‖² / Σ ‖W‖²) over experts W and the bases B that serve planned variants at their positions:
    what corrections would have to make up for. Raises `CheckpointError` and `FamilyError` as `open_new`."""
    checkpoint = open_new(bundle, name, spec).checkpoint
    info, error, square = checkpoint.architecture, 0.0, 0.0
    for layer in _spread(info.num_layers, _LAYERS):
        planned = PlannedLayer(bundle, layer)
        stacks = {tensor: checkpoint.tensor(info.expert_tensor(layer, tensor)) for tensor in info.expert_shapes}
        for expert in _spread(info.num_experts, _EXPERTS):
            weights = {name: as_matrix(s[expert], bundle.manifest.transposed) for name, s in stacks.items()}
            square += sum(float(weight.float().square().sum()) for weight in weights.values())
            error += min(_square_distance(weights, _base(planned, entry)) for entry in planned.entries(expert))
    return math.sqrt(error / max(square, 1e-30))


def _spread(count: int, most: int) -> list[int]:
    found: list[int] = np.unique(np.linspace(0, count - 1, most).round().astype(int)).tolist()
    return found


def _base(planned: PlannedLayer, entry: Entry) -> Expert:
    found = planned.exact(entry)
    return planned.base(entry.table) if found is None else found


def _square_distance(weights: Expert, other: Expert) -> float:
    return sum(float((weight.float() - other[name].float()).square().sum()) for name, weight in weights.items())
