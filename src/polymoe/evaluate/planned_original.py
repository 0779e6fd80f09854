"""Is a checkpoint the one that a bundle was planned from?"""

from pathlib import Path

from polymoe.offline.bundle import Bundle
from polymoe.offline.checkpoint import Checkpoint
from polymoe.offline.family import Family
from polymoe.offline.source import side_files


def changes_since_plan(bundle: Bundle, variant: int, checkpoint: Path) -> list[str]:
    """What is not as it was when `variant` (its index) was planned: "weights", or a file of its config or tokenizer.

    Reads all weights of `checkpoint`. Raises `CheckpointError` when it cannot be read.
    """
    record, kept = bundle.variants[variant], bundle.variant_folder(variant)
    scan = Family([_as_planned(bundle, variant, Checkpoint.open(checkpoint, record.name))]).scan()
    changed = [] if scan.weights_hash(0) == record.source_hash else ["weights"]
    files = {path for folder in (kept, checkpoint) for path in side_files(folder)}
    return changed + [str(file) for file in sorted(files) if _bytes(kept / file) != _bytes(checkpoint / file)]


def _as_planned(bundle: Bundle, variant: int, checkpoint: Checkpoint) -> Checkpoint:
    """With what its family did to it: a head of its own, other dtypes. The hash was taken after that."""
    if checkpoint.tied and not bundle.manifest.tied:
        checkpoint = checkpoint.untied()
    info, planned = checkpoint.architecture, {}
    for name in set(bundle.nonexpert_names) & set(checkpoint.target_names):
        planned[name] = bundle.nonexpert(variant, name).dtype
    for tensor, stack in bundle.resident_experts(0).items():  # it has a dtype, if no rows
        if tensor in info.expert_shapes:
            planned |= {info.expert_tensor(layer, tensor): stack.dtype for layer in range(info.num_layers)}
    casts = {name: dtype for name, dtype in planned.items() if checkpoint.dtype(name) != dtype}
    return checkpoint.cast(casts) if casts else checkpoint


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
