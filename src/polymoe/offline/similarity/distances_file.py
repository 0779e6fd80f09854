"""The distances of a family as a JSON file, for `polymoe place` and other programs."""

from pathlib import Path

import msgspec

from polymoe.bundle.atomic import whole_file
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import FamilyScan


def write_distances(family: Family, scan: FamilyScan, path: Path) -> None:
    """Raises `PlanError` for a file that cannot be written."""
    info, first = family.architecture, family.checkpoints[0]
    nonexperts = [sum(sizes[v] for sizes in scan.nonexpert_bytes.values()) for v in range(len(scan.variant_names))]
    dtype = first.dtype(info.expert_tensor(0, next(iter(info.expert_shapes))))
    content = {
        "architecture": family.architecture.class_name,
        "variants": list(scan.variant_names),
        "sources": {checkpoint.name: str(checkpoint.path) for checkpoint in family.checkpoints},
        "expert_bytes": scan.expert_bytes * info.num_layers * info.num_experts,  # all experts of one variant
        "nonexpert_bytes": max(nonexperts),  # of one variant
        "bits": 8 * dtype.itemsize,  # of an expert's weight
        # Of a pair's experts, relative to the root mean square of their norms.
        "distance": [[round(float(value), 6) for value in row] for row in scan.pair_distance],
    }
    with whole_file(path) as unfinished:
        unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
