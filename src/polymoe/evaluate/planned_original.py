"""Is a checkpoint the one that a bundle was planned from?"""

from pathlib import Path

from polymoe.bundle.reader import Bundle
from polymoe.offline.checkpoint.checkpoint import Checkpoint
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.source import side_files
from polymoe.offline.similarity.scan import scan_family


def changes_since_plan(bundle: Bundle, variant: int, spec: str | Path) -> list[str]:
    """What is not as it was when `variant` (its index) was planned: "weights", or a file of its config or tokenizer.

    Reads all weights of the checkpoint `spec`. Raises `CheckpointError` when it cannot be read.
    """
    record, kept = bundle.variants[variant], bundle.variant_folder(variant)
    original = Checkpoint.open(spec, record.name)
    scan = scan_family(Family([_as_planned(bundle, variant, original)]))
    changed = [] if scan.weights_hash(0) == record.source_hash else ["weights"]
    files = {path for folder in (kept, original.path) for path in side_files(folder)}
    return changed + [str(file) for file in sorted(files) if _bytes(kept / file) != _bytes(original.path / file)]


def _as_planned(bundle: Bundle, variant: int, checkpoint: Checkpoint) -> Checkpoint:
    """With what its family did to it: a head of its own, other dtypes. The hash was taken after that."""
    if checkpoint.tied and not bundle.manifest.tied:
        checkpoint = checkpoint.untied()
    info, planned = checkpoint.architecture, {}
    for name in set(bundle.nonexpert_names) & set(checkpoint.target_names):
        planned[name] = bundle.nonexpert_dtype(variant, name)
    for tensor, stack in bundle.resident_experts(0).items():  # it has a dtype, if no rows
        if tensor in info.expert_shapes:
            planned |= {info.expert_tensor(layer, tensor): stack.dtype for layer in range(info.num_layers)}
    casts = {name: dtype for name, dtype in planned.items() if checkpoint.dtype(name) != dtype}
    return checkpoint.cast(casts) if casts else checkpoint


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
