"""Is a checkpoint the one that a bundle was planned from?"""

from pathlib import Path

from polymoe.bundle.reader import Bundle
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.source import side_files
from polymoe.offline.similarity.scan import scan_family


def changes_since_plan(bundle: Bundle, variant: int, checkpoint: Path) -> list[str]:
    """What is not as it was when `variant` (its index) was planned: "weights", or a file of its config or tokenizer.

    Reads all weights of `checkpoint`. Raises `CheckpointError` when it cannot be read.
    """
    record, kept = bundle.variants[variant], bundle.variant_folder(variant)
    scan = scan_family(Family.open({record.name: checkpoint}))
    changed = [] if scan.weights_hash(0) == record.source_hash else ["weights"]
    files = {path for folder in (kept, checkpoint) for path in side_files(folder)}
    return changed + [str(file) for file in sorted(files) if _bytes(kept / file) != _bytes(checkpoint / file)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
