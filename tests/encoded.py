"""What an encoder's packed experts stand for, without a bundle."""

import torch

from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import as_matrix, is_transposed
from polymoe.offline.encode.encode import make_encoder
from polymoe.offline.encode.encoded_layer import EncodedLayer
from polymoe.offline.encode.position_codec import Group, PackedTensor, groups_of, served_weights
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import scan_family


def packed_tensor(encoded: EncodedLayer, group: Group, tensor: str) -> PackedTensor:
    base = encoded.bases.get((group.leader, group.expert))
    deltas = {v: encoded.deltas[v, group.expert] for v in group.members if (v, group.expert) in encoded.deltas}
    return PackedTensor(None if base is None else base[tensor], {v: parts[tensor] for v, parts in deltas.items()})


def flat(encoded: EncodedLayer) -> dict[str, torch.Tensor]:
    return {
        f"{kind} {owner} {tensor} {part}": value
        for kind, owners in (("base", encoded.bases), ("delta", encoded.deltas))
        for owner, packed in owners.items()
        for tensor, parts in packed.items()
        for part, value in parts.items()
    }


def served_experts(
    family: Family, plan: Plan, calibration: Calibration | None = None
) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """(variant, layer) -> {tensor: float32 [E, *stock shape]} of what `plan` serves."""
    info, transposed = family.architecture, is_transposed(family)
    encoder = make_encoder(family, scan_family(family), plan, calibration)
    served: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for layer in range(info.num_layers):
        encoded = encoder.layer(layer)
        for tensor in info.expert_shapes:
            stacks = [c.tensor(info.expert_tensor(layer, tensor)) for c in family.checkpoints]
            for v, stack in enumerate(stacks):
                served.setdefault((v, layer), {})[tensor] = stack.float().clone()
            for group in groups_of(plan, layer):
                own = {v: as_matrix(stacks[v][group.expert], transposed) for v in group.members}
                for v, weight in served_weights(group, own, packed_tensor(encoded, group, tensor)).items():
                    served[v, layer][tensor][group.expert] = as_matrix(weight, transposed)
    return served
