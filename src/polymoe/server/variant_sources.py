"""Where a new variant may come from: the operator's folder of variants, and what is served already."""

from pathlib import Path

from polymoe.bundle.manifest import Manifest
from polymoe.client.versions import Versions
from polymoe.errors import ChangeRefusedError
from polymoe.protocol.info import VariantInfo


def resolve_source(spec: str, root: Path | None, manifest: Manifest, versions: Versions) -> str:
    """`PATH`, `BASE+ADAPTER` or `BASE+PATCH` -> the same with real paths. BASE may be the name of a variant, or
    `name@version`; paths are below `root`, relative to it or absolute.

    Raises `ChangeRefusedError`; its message repeats what was asked for and tells nothing else of the machine.
    """
    if root is None:
        raise ChangeRefusedError("variants can only be added where the server was started with --variants-root.")
    parts = spec.split("+")
    if not all(parts) or "\0" in spec:
        raise ChangeRefusedError(
            f"{spec[:200]!r} names no checkpoint; give PATH, BASE+ADAPTER or BASE+PATCH.", param="source"
        )
    first = versions.find(parts[0])
    found = [source_of(first, manifest)] if first is not None else [str(_inside(parts[0], root, spec))]
    return "+".join([*found, *(str(_inside(part, root, spec)) for part in parts[1:])])


def _inside(part: str, root: Path, spec: str) -> Path:
    """A path whose real place is below `root`."""
    try:
        base = root.resolve(strict=True)
        real = (base / part).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ChangeRefusedError(
            f"{part[:200]!r} of {spec[:200]!r} is neither a variant nor below the server's --variants-root.",
            status=404, param="source", code="source_not_found",
        ) from error  # fmt: skip
    if not real.is_relative_to(base):
        raise ChangeRefusedError(
            f"{part[:200]!r} of {spec[:200]!r} is not below the server's --variants-root.",
            status=404, param="source", code="source_not_found",
        )  # fmt: skip
    return real


def source_of(variant: VariantInfo, manifest: Manifest) -> str:
    """The checkpoint of a variant that is held. Raises `ChangeRefusedError` where that is gone."""
    paths = {record.version: record.source_path for record in manifest.variants}
    paths |= {addition.version: addition.source_path for addition in manifest.live_state.additions}
    path = paths[variant.version]
    if not all(Path(part).exists() for part in path.split("+")):
        raise ChangeRefusedError(
            f"the checkpoint of {variant.name}, which it was planned from, is gone; give the base by its path.",
            param="source",
        )
    return path
