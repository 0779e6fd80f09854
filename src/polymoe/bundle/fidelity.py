"""How close variants were measured to be to their originals, written into a bundle that is there already."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from polymoe.bundle.manifest import Fidelity, Manifest, VariantRecord
from polymoe.bundle.rewrite import rewrite_manifest
from polymoe.errors import BundleError


def record_fidelity(path: str | Path, fidelity: Mapping[str, Fidelity]) -> None:
    """Write how close variants were measured to be into the bundle's manifest, in one step.

    Variants that are not named keep what they have. What the planner predicted is added where it is missing.
    Raises `BundleError` for a name that no variant has or a bundle that cannot be written.
    """
    folder = Path(path).expanduser()

    def measured(manifest: Manifest) -> Manifest:
        names = [variant.name for variant in manifest.variants]
        for name in fidelity:
            if name not in names:
                raise BundleError(f"{folder} has no variant {name}; there are {', '.join(names)}.")
        variants = [_measured(variant, fidelity.get(variant.name)) for variant in manifest.variants]
        return msgspec.structs.replace(manifest, variants=variants)

    try:
        rewrite_manifest(folder, measured)
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _measured(variant: VariantRecord, fidelity: Fidelity | None) -> VariantRecord:
    if fidelity is None:
        return variant
    if fidelity.predicted_error is None:
        fidelity = msgspec.structs.replace(fidelity, predicted_error=variant.predicted_error)
    return msgspec.structs.replace(variant, fidelity=fidelity)
