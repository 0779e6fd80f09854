"""A plan with its weights on disk, ready to serve. Read through memory maps: opening is cheap, tensors come when asked.

`polymoe.offline.write.bundle_writer.write_bundle` makes one; `polymoe.bundle.manifest` draws the folder.
"""

import copy
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymoe.bundle.bundle_checks import FIX, check_headers, check_ids, damaged, damages
from polymoe.bundle.manifest import (
    MANIFEST,
    SHARED,
    TABLES,
    Manifest,
    PackedNonexpert,
    VariantRecord,
    WeightBytes,
    delta_file,
    host_file,
    nonexpert_format,
    own_file,
    packed_name,
    read_manifest,
    resident_file,
    variant_folder,
)
from polymoe.bundle.manifest_checks import check_manifest
from polymoe.errors import BundleError
from polymoe.machine import drop_mapped_pages
from polymoe.quant.formats import get_format

logger = logging.getLogger(__name__)

PackedTensors = dict[str, dict[str, Tensor]]  # tensor name -> part -> [P, …]


class Bundle:
    """An opened bundle. V variants, L expert layers, E experts a layer, P physical bases of one layer, D its deltas.

    `path`, `manifest`; `table` int32 [V, L, E]: >= 0 a physical base of the layer, −1 − h its host expert h.
    `delta` int32 [V, L, E]: a physical delta of the layer, −1 for none. `sign` int8 [V, L, E] of the deltas. Both are
    None where no variant has any. `faults`: variant name -> why its own small files cannot be used (see `open`).
    """

    def __init__(self, path: Path, manifest: Manifest, faults: Mapping[str, str] | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.faults = dict(faults or {})
        self._configs: dict[int, Any] = {}  # reading one takes milliseconds, and each is asked for several times
        # All at once: a file opened later could belong to a bundle that has replaced this one meanwhile.
        self._handles = {r.path: self._map(r.path) for r in manifest.files if r.path.endswith(".safetensors")}
        tables = self._handles[TABLES].keys()
        self.table = self._tensor(TABLES, "table")
        self.delta = self._tensor(TABLES, "delta") if "delta" in tables else None
        self.sign = self._tensor(TABLES, "sign") if "sign" in tables else None

    @classmethod
    def open(cls, path: str | Path, verify: bool = False, tolerant: bool = False) -> Self:
        """Open the bundle in folder `path`. All but the weights is hashed and compared with what was planned; with
        `verify` the weights are too.

        With `tolerant` damage to one variant's config, tokenizer or template is noted in `faults`, so that the others
        can be served. Raises `BundleError`, naming the file, for anything else that is not a whole bundle of this
        format version.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        check_manifest(str(folder / MANIFEST), manifest)
        faults: dict[str, str] = {}
        for owner, error in damages(folder, manifest, verify):
            if owner is None or not tolerant:
                raise error
            faults.setdefault(owner, str(error))
        check_headers(folder, manifest)
        bundle = cls(folder.resolve(), manifest, faults)
        check_ids(folder / TABLES, manifest, bundle.table, bundle.delta, bundle.sign)
        if tolerant:
            bundle._try_configs()
        if read_manifest(folder) != manifest:
            raise BundleError(f"{folder} was replaced while it was being opened; open it again.")
        if not manifest.digest:
            logger.warning(
                "%s was planned before manifests had a hash of their own; plan it again to have it checked too.",
                folder / MANIFEST,
            )
        return bundle

    def _try_configs(self) -> None:
        """Note which variants' configs cannot be read. Raises `BundleError` when no variant is left."""
        for index, variant in enumerate(self.manifest.variants):
            if variant.name not in self.faults:
                try:
                    self.variant_config(index)
                except BundleError as error:
                    self.faults[variant.name] = str(error)
        if len(self.faults) == len(self.manifest.variants):
            raise BundleError(next(iter(self.faults.values())))

    @property
    def variants(self) -> tuple[VariantRecord, ...]:
        return tuple(self.manifest.variants)

    def variant_index(self, name: str) -> int:
        """Raises `KeyError` for a name that no variant has."""
        for index, variant in enumerate(self.manifest.variants):
            if variant.name == name:
                return index
        raise KeyError(name)

    def variant_folder(self, variant: int) -> Path:
        """Config, generation config, tokenizer and chat template of one variant."""
        return self.path / variant_folder(self.manifest.variants[variant].name)

    def tokenizer_dir(self, variant: int) -> Path | None:
        """None for a variant that came without a tokenizer and takes token ids only."""
        return self.variant_folder(variant) if self.manifest.variants[variant].has_tokenizer else None

    def variant_config(self, variant: int) -> Any:
        """The transformers config of one variant, the caller's own. Raises `BundleError` when it cannot be read."""
        from polymoe.bundle.config_checks import load_config

        folder = self.variant_folder(variant)
        try:
            if variant not in self._configs:
                self._configs[variant] = load_config(folder)
        except Exception as error:  # transformers raises many kinds
            raise BundleError(f"{folder / 'config.json'} cannot be read: {error}; plan the bundle again.") from error
        return copy.deepcopy(self._configs[variant])

    @cached_property
    def config(self) -> Any:
        """The transformers config to build the family's model from: room for the largest vocabulary and context, and
        an output head of its own where any variant has one."""
        readable = (v for v, variant in enumerate(self.variants) if variant.name not in self.faults)
        config = self.variant_config(next(readable, 0))  # all that the model is built from is the same in each
        text = config.get_text_config()
        if "lm_head.weight" in self.manifest.nonexperts:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        text.vocab_size = max(variant.vocab_size for variant in self.variants)
        if getattr(text, "max_position_embeddings", None) is not None:
            text.max_position_embeddings = max(variant.max_model_len for variant in self.variants)
        return config

    @property
    def expert_modules(self) -> list[str]:
        """Module path of the routed experts, one an expert layer."""
        return list(self.manifest.expert_modules)

    @property
    def expert_tensor_names(self) -> list[str]:
        """The tensors of one expert, as its module names them."""
        return list(self.manifest.expert_shapes)

    @property
    def resident_bytes(self) -> WeightBytes:
        """What the plan promises to hold on the device, in the dtypes as stored."""
        return self.manifest.resident_bytes

    def resident_experts(self, layer: int) -> dict[str, Tensor]:
        """{tensor name: [P, *shape]}: one layer's bases in format "stored", which have the lowest ids; P may be 0."""
        return {name: self._tensor(resident_file(layer), name) for name in self.manifest.expert_shapes}

    @property
    def levels(self) -> str:
        """Which levels the packed formats have: see `get_format`."""
        return self.manifest.levels

    @property
    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor name: [out, in] (or [out])} that packed tensors stand for."""
        flip = -1 if self.manifest.transposed else 1
        return {name: tuple(shape[::flip]) for name, shape in self.manifest.expert_shapes.items()}

    def packed_bases(self, layer: int) -> dict[str, PackedTensors]:
        """Format -> packed bases of one layer, in the order of their ids, which follow those of `resident_experts`."""
        pools = self.manifest.base_pools[layer]
        return {name: self._packed(resident_file(layer), name) for name in pools if get_format(name).is_packed}

    def packed_deltas(self, layer: int) -> dict[str, PackedTensors]:
        """Format -> deltas of one layer, in the order of their ids. Exact ones: the values of delta d are
        `values[starts[d] : starts[d + 1]]`."""
        pools = self.manifest.delta_pools[layer]
        return {name: self._packed(delta_file(layer), name) for name in pools}

    def _packed(self, file: str, format_name: str) -> PackedTensors:
        fmt = get_format(format_name)
        found: PackedTensors = {}
        for tensor, shape in self.packed_shapes.items():
            names = fmt.pool_parts(1, shape)
            found[tensor] = {part: self._tensor(file, packed_name(format_name, tensor, part)) for part in names}
            if (wrong := fmt.contradiction(found[tensor])) is not None:
                raise damaged(self.path, file, f"has {format_name} deltas of {tensor} that {wrong}")
        return found

    def host_experts(self, layer: int) -> int:
        """How many experts the layer has in the host tier."""
        return self.manifest.host_experts[layer]

    def host_expert(self, layer: int, index: int) -> dict[str, Tensor]:
        """{tensor name: [*shape]} of host expert `index` of one expert layer, memory-mapped."""
        return {name: self._tensor(host_file(layer), f"{index}.{name}") for name in self.manifest.expert_shapes}

    @property
    def nonexpert_names(self) -> tuple[str, ...]:
        """Every parameter and persistent buffer that is not an expert's; tied ones once (see `manifest.tied`)."""
        return tuple(self.manifest.nonexperts)

    def nonexpert_sources(self, name: str) -> tuple[int, ...]:
        """Per variant, the lowest variant that has the identical tensor."""
        return tuple(self.manifest.nonexperts[name])

    def nonexpert(self, variant: int, name: str) -> Tensor:
        """One tensor as the variant stores it, or what a packed one stands for. A smaller vocabulary's embeddings have
        fewer rows than `config` says."""
        if (packed := self.packed_nonexpert(name)) is not None:
            return self._decoded(variant, name, packed)
        source = self._nonexpert_source(variant, name)
        return self._tensor(SHARED if source is None else own_file(self.manifest.variants[source].name), name)

    def nonexpert_dtype(self, variant: int, name: str) -> torch.dtype:
        """The dtype of `nonexpert`: of packed ones that of the experts."""
        if name in self.manifest.packed_nonexperts:
            packed: torch.dtype = getattr(torch, self.manifest.variants[variant].dtype)
            return packed
        return self.nonexpert(variant, name).dtype

    def packed_nonexpert(self, name: str) -> PackedNonexpert | None:
        """How a non-expert is packed; None for one as the variants store it."""
        return self.manifest.packed_nonexperts.get(name)

    def nonexpert_parts(self, variant: int | None, name: str) -> dict[str, Tensor]:
        """Part -> tensor of a packed non-expert: a variant's own base or delta, or (None) the base that all share."""
        fmt = nonexpert_format(self.manifest, name, variant)
        packed = self.packed_nonexpert(name)
        assert fmt is not None
        assert packed is not None
        file = SHARED if variant is None else own_file(self.manifest.variants[variant].name)
        parts = get_format(fmt).parts(tuple(packed.shape), torch.float32)
        return {part: self._tensor(file, packed_name(fmt, name, part)) for part in parts}

    def own_parts(self, variant: int, name: str) -> dict[str, Tensor]:
        """The same of what a variant has of its own: its delta, or its version."""
        packed = self.packed_nonexpert(name)
        assert packed is not None
        alone = packed.delta is None and not any(self.manifest.nonexperts[name])
        return self.nonexpert_parts(None if alone else self.manifest.nonexperts[name][variant], name)

    def _nonexpert_source(self, variant: int, name: str) -> int | None:
        """The variant whose file has it; None: the file of all together."""
        sources = self.manifest.nonexperts[name]
        return sources[variant] if any(sources) else None

    def _decoded(self, variant: int, name: str, packed: PackedNonexpert) -> Tensor:
        shape, source = tuple(packed.shape), self._nonexpert_source(variant, name)
        base = get_format(packed.base, self.levels)
        if packed.delta is None:
            weight = base.decode(self.nonexpert_parts(source, name), shape, torch.float32)
        else:
            delta = self.nonexpert_parts(self.manifest.nonexperts[name][variant], name)
            weight = base.decode(self.nonexpert_parts(None, name), shape, torch.float32)
            weight = get_format(packed.delta, self.levels).corrected(weight, delta)
        return weight.to(self.nonexpert_dtype(variant, name))

    def drop_pages(self) -> None:
        """Let go of what was read: tensors stay valid, and are read again where they are looked at again."""
        drop_mapped_pages(self.path)

    def _map(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{self.path / file} cannot be read ({error}); {FIX}.") from error

    def _tensor(self, file: str, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise BundleError(f"{self.path / file} does not hold {name} ({error}); plan the bundle again.") from error
        return tensor
