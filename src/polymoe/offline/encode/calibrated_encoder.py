"""Encoding fitted to text: sequential, each layer sees what the compressed layers before it put out.

For every expert its first projection is packed with the second moments of its inputs, then the down projection with
those of the activations that the packed first projection gives. One layer's experts are in memory V times.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymoe.bundle.atomic import whole_file
from polymoe.console import Console
from polymoe.offline.calibrate.calibrate import (
    Calibration,
    down_projection,
    first_projection,
    second_moments,
    weighted_sum,
)
from polymoe.offline.calibrate.family_run import FamilyRun, Routed
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.matrices import as_matrix, is_transposed, mlp_order
from polymoe.offline.encode.encoded_layer import EncodedLayer
from polymoe.offline.encode.position_codec import Group, PackedTensor, encode_tensor, groups_of, served_weights
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import FamilyScan

FEW_TOKENS = 32  # an expert with fewer is packed as without text: their moments would be noise


class CalibratedEncoder:
    """Finished layers are kept in `calibration.folder` and read back by a later run with the same inputs."""

    def __init__(
        self, family: Family, scan: FamilyScan, plan: Plan, calibration: Calibration, console: Console | None = None
    ) -> None:
        self.family, self.scan, self.plan, self.calibration = family, scan, plan, calibration
        self.console = console
        self.transposed = is_transposed(family)
        self.run = FamilyRun(family, calibration.texts)
        self.folder = None if calibration.folder is None else calibration.folder / self._key()

    def layer(self, layer: int) -> EncodedLayer:
        try:
            return self._layer(layer)
        except BaseException:
            self.run.__exit__()
            raise

    def _layer(self, layer: int) -> EncodedLayer:
        assert layer == self.run.arrived, "layers are encoded in order"
        routed = self.run.arrive()
        found = self._read(layer)
        if found is not None and self.console is not None:
            self.console.print(f"Layer {self.scan.layer_names[layer]}: encoded by an earlier, interrupted run")
        encoded, outputs = EncodedLayer(), [dict[int, tuple[Tensor, Tensor, Tensor]]() for _ in routed]
        info = self.family.architecture
        stacks = {
            tensor: [checkpoint.tensor(info.expert_tensor(layer, tensor)) for checkpoint in self.family.checkpoints]
            for tensor in mlp_order(list(info.expert_shapes))
        }
        for group in groups_of(self.plan, layer):
            own = {
                tensor: {v: as_matrix(rows[v][group.expert], self.transposed) for v in group.members}
                for tensor, rows in stacks.items()
            }
            packed = self._pack(layer, group, own, routed, found, outputs)
            for tensor, parts in packed.items():
                encoded.add(group.leader, group.expert, tensor, parts)
        self.run.proceed([weighted_sum(r, pieces) for r, pieces in zip(routed, outputs, strict=True)])
        if found is None:
            self._write(layer, encoded)
        if layer == self.run.num_layers - 1:
            self.run.__exit__()
        return encoded

    def _pack(
        self,
        layer: int,
        group: Group,
        own: dict[str, dict[int, Tensor]],
        routed: list[Routed],
        found: EncodedLayer | None,
        outputs: list[dict[int, tuple[Tensor, Tensor, Tensor]]],
    ) -> dict[str, PackedTensor]:
        """One group's tensors, packed (or as `found`), and its members' outputs into `outputs`."""
        same_as = self.scan.expert_same_as[:, layer, group.expert].tolist()
        tokens = {v: routed[v].tokens_of(group.expert) for v in group.members}
        inputs = {v: routed[v].hidden[rows].float() for v, (rows, _) in tokens.items()}
        weights: dict[int, dict[str, Tensor]] = {v: {} for v in group.members}
        packed: dict[str, PackedTensor] = {}
        seen = inputs
        for tensor, each in own.items():
            if tensor == "down_proj" or (tensor.startswith("down_proj") and seen is inputs):
                seen = {v: first_projection(routed[v].module, inputs[v], weights[v]) for v in group.members}
            if found is not None:
                packed[tensor] = _found(found, group, tensor)
            else:
                moments = None
                if each[group.leader].ndim == 2 and not group.is_lossless:
                    moments = self._moments(group, seen, tokens, routed)
                packed[tensor] = encode_tensor(group, each, same_as, moments)
            for v, weight in served_weights(group, each, packed[tensor]).items():
                weights[v][tensor] = weight
        for v in group.members:
            rows, gates = tokens[v]
            outputs[v][group.expert] = rows, gates, down_projection(seen[v], weights[v])
        return packed

    def _moments(
        self,
        group: Group,
        seen: dict[int, Tensor],
        tokens: dict[int, tuple[Tensor, Tensor]],
        routed: list[Routed],
    ) -> dict[int, Tensor]:
        enough = {v: len(seen[v]) >= FEW_TOKENS for v in group.members}
        found = second_moments(
            [seen[v] if enough[v] else seen[v][:0] for v in group.members],
            [tokens[v][1] if enough[v] else tokens[v][1][:0] for v in group.members],
            [len(routed[v].hidden) for v in group.members],
        )
        return dict(zip(group.members, found.values(), strict=True))

    def _key(self) -> str:
        """A folder name over everything that decides the result."""
        plan = self.plan
        digest = hashlib.sha256(self.calibration.hash().encode())
        for v in range(len(self.family.names)):
            digest.update(self.scan.weights_hash(v).encode())
        digest.update(plan.serving.tobytes() + plan.resident.tobytes())
        digest.update(repr([field.tolist() for field in (plan.base, plan.merge, plan.delta)]).encode())
        return digest.hexdigest()[:24]

    def _file(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{layer}.safetensors"

    def _read(self, layer: int) -> EncodedLayer | None:
        path = self._file(layer)
        if path is None or not path.exists():
            return None
        encoded = EncodedLayer()
        for name, value in load_file(path).items():
            kind, variant, expert, tensor, part = name.split("/")
            owners = encoded.bases if kind == "base" else encoded.deltas
            owners.setdefault((int(variant), int(expert)), {}).setdefault(tensor, {})[part] = value
        return encoded

    def _write(self, layer: int, encoded: EncodedLayer) -> None:
        path = self._file(layer)
        if path is None:
            return
        flat = {
            f"{kind}/{variant}/{expert}/{tensor}/{part}": value.clone(memory_format=torch.contiguous_format)
            for kind, owners in (("base", encoded.bases), ("delta", encoded.deltas))
            for (variant, expert), packed in owners.items()
            for tensor, parts in packed.items()
            for part, value in parts.items()
        }
        with whole_file(path) as unfinished:
            save_file(flat, unfinished)


def _found(encoded: EncodedLayer, group: Group, tensor: str) -> PackedTensor:
    base = encoded.bases.get((group.leader, group.expert))
    deltas = {v: encoded.deltas[v, group.expert] for v in group.members if (v, group.expert) in encoded.deltas}
    return PackedTensor(None if base is None else base[tensor], {v: parts[tensor] for v, parts in deltas.items()})
