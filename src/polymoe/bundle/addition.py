"""The files of an added variant, read through memory maps; `polymoe.bundle.live` draws its folder."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymoe.bundle.live import ADDED_NONEXPERTS, ADDED_TABLES, ADDED_VARIANT, OWN, Addition, added_layer
from polymoe.bundle.manifest import Manifest, packed_name
from polymoe.bundle.tensor_file import read_header
from polymoe.errors import BundleError, CheckpointError
from polymoe.quant.formats import get_format

PackedTensors = dict[str, dict[str, Tensor]]  # tensor name -> part -> [D, …]


class AddedFiles:
    """An opened addition. L expert layers, E experts a layer.

    `table`, `delta` int32 [L, E], `sign` int8 [L, E] as `polymoe.bundle.live` says. Raises `BundleError`, naming the
    file, for one that is missing, truncated, or not what `addition` and the planned bundle's `manifest` say.
    """

    def __init__(self, folder: Path, addition: Addition, manifest: Manifest) -> None:
        self.folder, self.addition, self.manifest = folder, addition, manifest
        files = [ADDED_TABLES, ADDED_NONEXPERTS, *map(added_layer, range(len(manifest.expert_modules)))]
        self._handles: dict[str, Any] = {file: self._open(file) for file in files}
        self.table = self._tensor(ADDED_TABLES, "table")
        self.delta = self._tensor(ADDED_TABLES, "delta")
        self.sign = self._tensor(ADDED_TABLES, "sign")
        self._check_ids()

    @property
    def variant_folder(self) -> Path:
        return self.folder / ADDED_VARIANT

    @cached_property
    def config(self) -> Any:
        """The transformers config. Raises `BundleError`."""
        from polymoe.bundle.config_checks import load_config

        try:
            return load_config(self.variant_folder)
        except Exception as error:  # transformers raises many kinds
            raise BundleError(f"{self.variant_folder / 'config.json'} cannot be read: {error}") from error

    @property
    def own_nonexperts(self) -> list[str]:
        return [name for name, source in self.addition.nonexperts.items() if source == OWN]

    def nonexpert(self, name: str) -> Tensor:
        """One of `own_nonexperts` that is stored as it is."""
        return self._tensor(ADDED_NONEXPERTS, name)

    def num_bytes(self, name: str) -> int:
        """Of what one of `own_nonexperts` has stored."""
        tensors = self.packed_nonexpert(name).values() if name in self.addition.packed else [self.nonexpert(name)]
        return sum(tensor.nbytes for tensor in tensors)

    def packed_nonexpert(self, name: str) -> dict[str, Tensor]:
        """Part -> tensor of the delta that one of `addition.packed` is."""
        delta, shape = self.addition.packed[name].delta, tuple(self.manifest.packed_nonexperts[name].shape)
        wanted = get_format(delta, self.manifest.levels).parts(shape, torch.float32)
        found = {part: self._tensor(ADDED_NONEXPERTS, packed_name(delta, name, part)) for part in wanted}
        if any((found[part].dtype, tuple(found[part].shape)) != like for part, like in wanted.items()):
            raise BundleError(f"{self.folder / ADDED_NONEXPERTS} has a {delta} delta of {name} that is not {shape}.")
        return found

    def own_experts(self, layer: int) -> dict[str, Tensor]:
        """Tensor name -> `[n, *shape]` as stored; empty without own ones."""
        if not self.addition.own_experts[layer]:
            return {}
        return {name: self._tensor(added_layer(layer), name) for name in self.manifest.expert_shapes}

    def own_deltas(self, layer: int) -> dict[str, PackedTensors]:
        """Format -> own deltas of one layer, as `Bundle.packed_deltas`."""
        found: dict[str, PackedTensors] = {}
        flip = -1 if self.manifest.transposed else 1
        for format_name in self.addition.deltas[layer]:
            fmt = get_format(format_name, self.manifest.levels)
            found[format_name] = {}
            for tensor, shape in self.manifest.expert_shapes.items():
                parts: Mapping[str, object] = fmt.pool_parts(1, tuple(shape[::flip]))
                own = {part: self._tensor(added_layer(layer), packed_name(format_name, tensor, part)) for part in parts}
                if (wrong := fmt.contradiction(own)) is not None:
                    raise BundleError(f"{self.folder / added_layer(layer)} has {format_name} deltas that {wrong}.")
                found[format_name][tensor] = own
        return found

    def _open(self, file: str) -> Any:
        path = self.folder / file
        try:
            read_header(path, "add the variant again")
            return safe_open(path, framework="pt", device="cpu")
        except (CheckpointError, OSError, SafetensorError) as error:
            raise BundleError(f"{path} cannot be read ({error}); add the variant again.") from error

    def _tensor(self, file: str, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise BundleError(f"{self.folder / file} does not hold {name} ({error}); add it again.") from error
        return tensor

    def _check_ids(self) -> None:
        shape = (len(self.manifest.expert_modules), self.manifest.num_experts)
        bases, deltas = self.manifest.resident_experts, [sum(pools.values()) for pools in self.manifest.delta_pools]
        for layer in range(shape[0]):
            last = bases[layer] + self.addition.own_experts[layer]
            last_delta = deltas[layer] + sum(self.addition.deltas[layer].values())
            rows = [t[layer] if tuple(t.shape) == shape else None for t in (self.table, self.delta, self.sign)]
            table, delta, sign = rows
            right = table is not None and delta is not None and sign is not None
            if right:
                assert table is not None
                assert delta is not None
                assert sign is not None
                right = bool((table < last).all() and (-1 - table < self.manifest.host_experts[layer]).all())
                right = right and bool(((delta >= -1) & (delta < last_delta) & ((delta < 0) | (table >= 0))).all())
                right = right and bool((sign.abs() == 1).all()) and table.dtype == delta.dtype == torch.int32
            if not right:
                raise BundleError(f"{self.folder / ADDED_TABLES} names what does not exist in layer {layer}.")
