"""Is what a manifest says possible? A hash finds accidents; this finds what was written wrong."""

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

import msgspec

from polymoe.bundle.live import OWN
from polymoe.bundle.manifest import (
    SHARED,
    TABLES,
    VARIANT_NAME,
    Manifest,
    delta_file,
    host_file,
    own_file,
    resident_file,
    variant_folder,
)
from polymoe.errors import BundleError
from polymoe.quant.formats import BASE_FORMATS, DELTA_FORMATS, Format

_POSITIONS = ("shared", "separate", "absent")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 62  # of any number


def check_manifest(path: str, manifest: Manifest) -> None:
    """Raise `BundleError`, naming the manifest's `path` and the field, for what no bundle can have."""

    def broken(field: str, reason: str) -> BundleError:
        return BundleError(f"{path} is damaged: {field} {reason}; plan or copy the bundle again.")

    def check(allowed: bool, field: str, reason: str) -> None:
        if not allowed:
            raise broken(field, reason)

    m = manifest
    layers, variants = len(m.expert_modules), len(m.variants)
    check(variants > 0, "variants", "is empty")
    names = [variant.name for variant in m.variants]
    for name in names:
        check(VARIANT_NAME.fullmatch(name) is not None, "variants", f"has {name!r}, which is no name of a variant")
    check(len({name.casefold() for name in names}) == variants, "variants", "has a name twice")
    for v in m.variants:
        check(0 < v.max_model_len < _MOST, "max_model_len", f"of {v.name} is {v.max_model_len}")
        check(0 < v.vocab_size < _MOST, "vocab_size", f"of {v.name} is {v.vocab_size}")
        check(v.dtype in _DTYPES, "dtype", f"of {v.name} is {v.dtype!r}")
    check(layers > 0, "expert_modules", "is empty")
    check(len(set(m.expert_modules)) == layers, "expert_modules", "has a path twice")
    check(0 < m.num_experts < 1 << 31, "num_experts", f"is {m.num_experts}")
    check(bool(m.expert_shapes), "expert_shapes", "is empty")
    for name, shape in m.expert_shapes.items():
        right = 0 < len(shape) <= 2 and all(0 < size < 1 << 31 for size in shape)
        check(right, "expert_shapes", f"of {name} is {shape}")
    for field, pools, formats in (
        ("base_pools", m.base_pools, BASE_FORMATS),
        ("delta_pools", m.delta_pools, DELTA_FORMATS),
    ):
        check(len(pools) == layers, field, f"has {len(pools)} layers, expert_modules {layers}")
        for layer in pools:
            check(_are_pools(layer, formats), field, f"has {layer}")
    check(len(m.host_experts) == layers, "host_experts", f"has {len(m.host_experts)} layers, expert_modules {layers}")
    check(all(0 <= count < 1 << 31 for count in m.host_experts), "host_experts", "has a number below 0")
    for name, sources in m.nonexperts.items():
        right = len(sources) == variants and all(
            0 <= source <= v and sources[source] == source for v, source in enumerate(sources)
        )
        check(right, "nonexperts", f"of {name} is {sources}, which are not the variants with the same tensor")
    coded = {fmt.name for fmt in (*BASE_FORMATS, *DELTA_FORMATS) if fmt.is_coded}
    for name, packed in m.packed_nonexperts.items():
        known = name in m.nonexperts and packed.base in coded and (packed.delta is None or packed.delta in coded)
        right = known and len(packed.shape) == 2 and all(0 < size < 1 << 31 for size in packed.shape)
        check(right, "packed_nonexperts", f"of {name} is {msgspec.structs.asdict(packed)}")
    check(set(_POSITIONS) <= set(m.positions), "positions", f"lacks one of {', '.join(_POSITIONS)}")
    for field, found in (("resident_bytes", m.resident_bytes.by_kind), ("positions", m.positions)):
        check(all(0 <= count < _MOST for count in found.values()), field, "has a number below 0")
    for count_field in ("expert_bytes", "expert_parameters"):
        check(0 < getattr(m, count_field) < _MOST, count_field, f"is {getattr(m, count_field)}")
    check(0 <= m.host_bytes < _MOST, "host_bytes", f"is {m.host_bytes}")

    _check_live(m, check)
    paths = [record.path for record in m.files]
    check(len(set(paths)) == len(paths), "files", "has a path twice")
    for record in m.files:
        check(_is_inside(record.path), "files", f"has the path {record.path!r}, which leads out of the bundle")
        check(0 <= record.size < _MOST, "files", f"has {record.size} as the size of {record.path}")
        check(_SHA256.fullmatch(record.sha256) is not None, "files", f"has no SHA-256 of {record.path}")
    missing = sorted(set(files_of(m)) - set(paths))
    check(not missing, "files", f"lacks {', '.join(missing[:4])}")
    added = {addition.folder for addition in m.live_state.additions}
    strange = sorted(
        p
        for p in set(paths) - set(files_of(m))
        if p.endswith(".safetensors") and "/".join(p.split("/")[:2]) not in added
    )
    check(not strange, "files", f"has {', '.join(strange[:4])}, which no table leads to")


def _check_live(m: Manifest, check: Callable[[bool, str, str], None]) -> None:
    if m.live is None:
        return
    known = {v.version for v in m.variants} | {a.version for a in m.live.additions}
    added = {a.version for a in m.live.additions}
    check(len(added) == len(m.live.additions), "live", "has a version twice")
    check(m.live.wanted | set(m.live.removed) <= known, "live", "has a version that does not exist")
    for name in (*m.live.names, *(a.name for a in m.live.additions)):
        check(VARIANT_NAME.fullmatch(name) is not None, "live", f"has {name!r}, which is no name of a variant")
    for a in m.live.additions:
        check(_SHA256.fullmatch(a.version) is not None, "live", f"has the version {a.version[:80]!r}")
        layers = len(m.expert_modules)
        check(len(a.own_experts) == len(a.deltas) == layers, "live", f"has other layers in {a.folder}")
        check(a.nonexperts.keys() == m.nonexperts.keys(), "live", f"has other non-experts in {a.folder}")
        check(all(-1 <= v < len(m.variants) for v in a.nonexperts.values()), "live", "names no planned variant")
        coded = {fmt.name for fmt in DELTA_FORMATS if fmt.is_coded}
        for name, delta in a.packed.items():
            fits = name in m.packed_nonexperts and delta.delta in coded and 0 <= delta.base < len(m.variants)
            check(fits and a.nonexperts.get(name) == OWN, "live", f"has no such delta of {name} in {a.folder}")
        check(all(_are_pools(d, DELTA_FORMATS) for d in a.deltas), "live", f"has no such deltas in {a.folder}")
        check(all(0 <= n < 1 << 31 for n in a.own_experts), "live", "has a number below 0")
        check(0 < a.max_model_len < _MOST and 0 < a.vocab_size < _MOST, "live", f"has sizes below 1 in {a.folder}")


def files_of(manifest: Manifest) -> list[str]:
    """The files that a bundle with these tables has at least: weights in the order in which they are loaded, then each
    variant's config."""
    layers = range(len(manifest.expert_modules))
    deltas = [delta_file(layer) for layer in layers] if any(manifest.delta_pools) else []
    return [
        TABLES,
        SHARED,
        *(own_file(variant.name) for variant in manifest.variants),
        *(resident_file(layer) for layer in layers),
        *deltas,
        *(host_file(layer) for layer in layers),
        *(f"{variant_folder(variant.name)}/config.json" for variant in manifest.variants),
    ]


def _are_pools(pools: dict[str, int], formats: Sequence[Format]) -> bool:
    """Known formats, in the order in which physical ids run through them."""
    order = [fmt.name for fmt in formats]
    known = [order.index(name) for name in pools if name in order]
    return len(known) == len(pools) and known == sorted(known) and all(0 < n < 1 << 31 for n in pools.values())


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and "\0" not in path and "\\" not in path
    return bool(parts) and plain and not path.startswith("/") and ".." not in parts
