"""Does a checkpoint fit a bundle that is being served? What `Family` asks of several checkpoints, asked of one and of
what the bundle keeps of those that it was planned from."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from polymoe.bundle.reader import Bundle
from polymoe.errors import CheckpointError, FamilyError
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.configs import check_same_model
from polymoe.offline.checkpoint.serving_check import check_variant
from polymoe.offline.checkpoint.source import some
from polymoe.offline.checkpoint.vocabulary import check_vocabularies


@dataclass(frozen=True)
class NewVariant:
    """`checkpoint`: in the bundle's dtypes and with its way to tie the head. `notes`: what a user should know."""

    checkpoint: Checkpoint
    vocab_size: int
    notes: list[str]


def open_new(bundle: Bundle, name: str, spec: str) -> NewVariant:
    """Raises `CheckpointError` for what cannot be read, `FamilyError` for what does not belong to the bundle."""
    checkpoint = Checkpoint.open(spec, name)
    manifest, first = bundle.manifest, bundle.variants[0]
    planned = SimpleNamespace(
        name=first.name, path=bundle.variant_folder(0), config=bundle.variant_config(0),
        architecture=SimpleNamespace(model_type=manifest.model_type, class_name=manifest.architecture),
    )  # fmt: skip
    check_same_model(cast(Checkpoint, planned), checkpoint)
    if checkpoint.tied and not manifest.tied:
        checkpoint = checkpoint.untied()
    elif manifest.tied and not checkpoint.tied:
        raise FamilyError(
            f"{name} has an output head of its own, and the heads of those that are served are tied to their "
            f"embeddings ({checkpoint.path}); plan a new bundle with it."
        )
    vocab_size = int(checkpoint.config.get_text_config().vocab_size)
    largest = max(variant.vocab_size for variant in bundle.variants)
    if vocab_size > largest:
        raise FamilyError(
            f"{name} has {vocab_size} rows of vocabulary ({checkpoint.path}), those that are served have at most "
            f"{largest}; plan a new bundle with it."
        )
    check_vocabularies([first.name, name], [bundle.variant_folder(0), checkpoint.path], [first.vocab_size, vocab_size])
    _check_tensors(bundle, checkpoint)
    try:
        notes = check_variant(checkpoint, vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return NewVariant(checkpoint.cast(_casts(bundle, checkpoint)), vocab_size, [*checkpoint.notes, *notes])


def _check_tensors(bundle: Bundle, checkpoint: Checkpoint) -> None:
    info, manifest = checkpoint.architecture, bundle.manifest
    wanted = set(manifest.nonexperts)
    if odd := sorted(wanted ^ set(info.nonexperts)):
        raise FamilyError(
            f"{checkpoint.name} has other tensors than those that are served: {some(odd)} ({checkpoint.path}). Is it a "
            "fine-tune of the same model?"
        )
    shapes: dict[str, tuple[Any, Any]] = {
        name: (_planned_shape(bundle, name), checkpoint.shape(name)) for name in wanted
    }
    experts = tuple(info.expert_modules), info.num_experts, {n: list(s) for n, s in info.expert_shapes.items()}
    planned = tuple(manifest.expert_modules), manifest.num_experts, manifest.expert_shapes
    if experts != planned:
        raise FamilyError(
            f"{checkpoint.name} has other experts than those that are served ({checkpoint.path}); plan it as a family "
            "of its own."
        )
    for name, (mine, its) in shapes.items():
        skip = 1 if name in info.vocab_tensors else 0
        if mine[skip:] != its[skip:]:
            raise FamilyError(
                f"{name} has shape {list(its)} in {checkpoint.name} ({checkpoint.path}) and {list(mine)} in those that "
                "are served. Is it a fine-tune of the same model?"
            )


def _planned_shape(bundle: Bundle, name: str) -> tuple[int, ...]:
    packed = bundle.packed_nonexpert(name)
    return tuple(bundle.nonexpert(0, name).shape if packed is None else packed.shape)


def _casts(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """What takes the dtypes of the bundle."""
    info = checkpoint.architecture
    found = {name: bundle.nonexpert_dtype(0, name) for name in info.nonexperts}
    experts = getattr(torch, bundle.variants[0].dtype)
    found |= {info.expert_tensor(layer, t): experts for layer in range(info.num_layers) for t in info.expert_shapes}
    return {name: dtype for name, dtype in found.items() if checkpoint.dtype(name) != dtype}
