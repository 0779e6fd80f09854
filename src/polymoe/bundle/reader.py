"""A plan with its weights on disk, ready to serve. Read through memory maps: opening is cheap, tensors come when asked.

`polymoe.offline.write.bundle_writer.write_bundle` makes one; `polymoe.bundle.manifest` draws the folder.
"""

import copy
import fcntl
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymoe.bundle.bundle_checks import FIX, check_headers, check_ids, damaged, damages
from polymoe.bundle.manifest import (
    MANIFEST,
    SHARED,
    TABLES,
    UNFINISHED_MANIFEST,
    Fidelity,
    Manifest,
    VariantRecord,
    WeightBytes,
    delta_file,
    encode_manifest,
    host_file,
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
        """One tensor as the variant stores it; a smaller vocabulary's embeddings have fewer rows than `config` says."""
        sources = self.manifest.nonexperts[name]
        if not any(sources):  # all variants have variant 0's
            return self._tensor(SHARED, name)
        return self._tensor(own_file(self.manifest.variants[sources[variant]].name), name)

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


def record_fidelity(path: str | Path, fidelity: Mapping[str, Fidelity]) -> None:
    """Write how close variants were measured to be into the bundle's manifest, in one step.

    Variants that are not named keep what they have. What the planner predicted is added where it is missing.
    Raises `BundleError` for a name that no variant has or a bundle that cannot be written.
    """
    folder = Path(path).expanduser()
    temporary = folder / UNFINISHED_MANIFEST
    try:
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two measurements at a time must not lose each other's figures
            manifest = read_manifest(folder)
            names = [variant.name for variant in manifest.variants]
            for name in fidelity:
                if name not in names:
                    raise BundleError(f"{folder} has no variant {name}; there are {', '.join(names)}.")
            variants = [_measured(variant, fidelity.get(variant.name)) for variant in manifest.variants]
            with temporary.open("wb") as file:
                file.write(encode_manifest(msgspec.structs.replace(manifest, variants=variants)))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / MANIFEST)
            os.fsync(lock)
        finally:
            os.close(lock)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _measured(variant: VariantRecord, fidelity: Fidelity | None) -> VariantRecord:
    if fidelity is None:
        return variant
    if fidelity.predicted_error is None:
        fidelity = msgspec.structs.replace(fidelity, predicted_error=variant.predicted_error)
    return msgspec.structs.replace(variant, fidelity=fidelity)
