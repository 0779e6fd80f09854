"""How close variants were measured to be to their originals, written into a bundle that is there already."""

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from polymoe.bundle.manifest import (
    MANIFEST,
    UNFINISHED_MANIFEST,
    Fidelity,
    VariantRecord,
    encode_manifest,
    read_manifest,
)
from polymoe.errors import BundleError


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
