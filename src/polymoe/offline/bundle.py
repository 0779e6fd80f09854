"""A plan with its weights on disk, ready to serve. Read through memory maps: opening is cheap, tensors come when asked.

`polymoe.offline.bundle_writer.write_bundle` makes one; `polymoe.offline.manifest` draws the folder.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polymoe.errors import BundleError
from polymoe.offline.manifest import (
    SHARED,
    TABLES,
    Manifest,
    VariantRecord,
    host_file,
    own_file,
    read_manifest,
    resident_file,
    variant_folder,
)


class Bundle:
    """An opened bundle. V variants, L expert layers, E experts a layer, P physical experts of one layer.

    `path`, `manifest`; `table` int32 [V, L, E]: >= 0 an index of the layer's resident stack, −1 − h its host expert h.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        # All at once: a file opened later could belong to a bundle that has replaced this one meanwhile.
        self._handles = {r.path: self._map(r.path) for r in manifest.files if r.path.endswith(".safetensors")}
        self.table = self._tensor(TABLES, "table")
        shape = (len(manifest.variants), len(manifest.expert_modules), manifest.num_experts)
        if tuple(self.table.shape) != shape or self.table.dtype != torch.int32:
            raise BundleError(
                f"{path / TABLES} has shape {list(self.table.shape)}, expected {list(shape)}; plan it again."
            )

    @classmethod
    def open(cls, path: str | Path, verify: bool = False) -> Self:
        """Open the bundle in folder `path`; with `verify` every file is read and its hash compared.

        Raises `BundleError` for anything that is not a whole bundle of this format version.
        """
        folder = Path(path).expanduser()
        manifest = read_manifest(folder)
        for record in manifest.files:
            file = folder / record.path
            if not file.is_file():
                raise BundleError(f"{folder} is damaged: {record.path} is missing; plan it again or copy it again.")
            if (size := file.stat().st_size) != record.size:
                raise BundleError(
                    f"{folder} is damaged: {record.path} has {size} bytes, not {record.size}; plan or copy it again."
                )
            if verify:
                with file.open("rb") as stream:
                    if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
                        raise BundleError(
                            f"{folder} is damaged: {record.path} has changed; plan it again or copy it again."
                        )
        bundle = cls(folder.resolve(), manifest)
        if read_manifest(folder) != manifest:
            raise BundleError(f"{folder} was replaced while it was being opened; open it again.")
        return bundle

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
        """The transformers config of one variant."""
        from transformers import AutoConfig  # here, since it takes seconds to load

        return AutoConfig.from_pretrained(self.variant_folder(variant), local_files_only=True, trust_remote_code=False)

    @cached_property
    def config(self) -> Any:
        """The transformers config to build the family's model from: room for the largest vocabulary and context."""
        config = self.variant_config(0)
        text = config.get_text_config()
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
    def resident_bytes(self) -> dict[str, int]:
        """Bytes that the plan promises to hold on the device, by kind, in the dtypes as stored."""
        return dict(self.manifest.resident_bytes)

    def resident_experts(self, layer: int) -> dict[str, Tensor]:
        """{tensor name: [P, *shape]} of one expert layer; P may be 0."""
        return {name: self._tensor(resident_file(layer), name) for name in self.manifest.expert_shapes}

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

    def _map(self, file: str) -> Any:
        try:
            return safe_open(self.path / file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{self.path / file} cannot be read ({error}); plan the bundle again.") from error

    def _tensor(self, file: str, name: str) -> Tensor:
        try:
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise BundleError(f"{self.path / file} does not hold {name} ({error}); plan the bundle again.") from error
        return tensor
