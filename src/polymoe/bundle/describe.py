"""A bundle as the dashboard and the reports draw it: who shares what, at what cost. From its small files; no torch."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from polymoe.bundle.layer_names import layer_names
from polymoe.bundle.manifest import (
    SHARED,
    TABLES,
    Manifest,
    delta_file,
    nonexpert_format,
    own_file,
    read_manifest,
    resident_file,
)
from polymoe.errors import BundleError

_STORED = "stored"  # the format of experts as the checkpoints have them
_MOST_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_DTYPES = {"I32": "<i4", "I8": "i1"}

Ids = NDArray[np.int64]


def describe_bundle(folder: str | Path) -> dict[str, Any]:
    """Everything about a bundle that a picture of it needs; sizes are bytes, errors nats a token.

    `table` and `delta` are int32 [V, L, E] in base64, as in the bundle's tables. `base_bytes` and `delta_bytes` say for
    each layer what one of each format takes, in the order of the physical ids (exact deltas: on average). `added_bytes`
    [V] is what a variant needs beside those before it, `separate_bytes` [V] what its whole model takes by itself.
    Raises `BundleError`.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    tables = _tables(folder)
    num_layers = len(manifest.expert_modules)
    base_bytes = [_each(folder / resident_file(n), manifest.base_pools[n], manifest) for n in range(num_layers)]
    delta_bytes = [_each(folder / delta_file(n), manifest.delta_pools[n], manifest) for n in range(num_layers)]
    return {
        "name": folder.resolve().name,
        "policy": manifest.policy,
        "memory": manifest.memory,
        "architecture": manifest.architecture,
        "polymoe_version": manifest.polymoe_version,
        "layers": layer_names(manifest.expert_modules),
        "num_experts": manifest.num_experts,
        "expert_bytes": manifest.expert_bytes,
        "positions": manifest.positions,
        "variants": [msgspec.to_builtins(variant) for variant in manifest.variants],
        "base_pools": manifest.base_pools,
        "delta_pools": manifest.delta_pools,
        "base_bytes": base_bytes,
        "delta_bytes": delta_bytes,
        "table": _text(tables["table"]),
        "delta": _text(tables["delta"]) if "delta" in tables else None,
        "position_errors": manifest.position_errors or None,
        "dial_of": manifest.dial_of,
        "dial": [msgspec.to_builtins(point) for point in manifest.dial],
        "resident_bytes": manifest.resident_bytes.by_kind,
        "host_bytes": manifest.host_bytes,
        **_costs(folder, manifest, tables, base_bytes, delta_bytes),
    }


def _text(ids: Ids) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file; `Bundle.open` has checked it before anything is served."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}); plan the bundle again.") from error
    header.pop("__metadata__", None)
    return header


def _size(entry: Mapping[str, Any]) -> int:
    first, last = entry["data_offsets"]
    return int(last) - int(first)


def _tables(folder: Path) -> dict[str, Ids]:
    path = folder / TABLES
    found = {}
    header = _header(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in header.items():
        first, last = (start + offset for offset in entry["data_offsets"])
        ids = np.frombuffer(data[first:last], dtype=_DTYPES[entry["dtype"]])
        found[name] = ids.reshape(entry["shape"]).astype(np.int64)
    return found


def _each(path: Path, pools: Mapping[str, int], manifest: Manifest) -> dict[str, int]:
    """Format -> bytes of one expert (or delta) of a layer's pool."""
    if not pools:
        return {}
    header = _header(path)
    found = {}
    for name, count in pools.items():
        total = sum(_size(entry) for key, entry in header.items() if key.startswith(f"{name}."))
        found[name] = manifest.expert_bytes if name == _STORED else total // max(count, 1)
    return found


def _by_id(pools: Mapping[str, int], each: Mapping[str, int]) -> Ids:
    """Bytes of each physical id of a layer."""
    return np.repeat(np.array([each[name] for name in pools], dtype=np.int64), list(pools.values()))


def _costs(
    folder: Path,
    manifest: Manifest,
    tables: Mapping[str, Ids],
    base_bytes: Sequence[Mapping[str, int]],
    delta_bytes: Sequence[Mapping[str, int]],
) -> dict[str, list[int]]:
    table, delta = tables["table"], tables.get("delta")
    num_variants, num_layers, num_experts = table.shape
    added, separate = _nonexpert_bytes(folder, manifest)
    one_model = num_layers * num_experts * manifest.expert_bytes
    kinds = [(table, manifest.base_pools, base_bytes)]
    if delta is not None:
        kinds.append((delta, manifest.delta_pools, delta_bytes))
    for ids, pools, each in kinds:
        for layer in range(num_layers):
            sizes, seen = _by_id(pools[layer], each[layer]), np.zeros(0, dtype=np.int64)
            for variant in range(num_variants):
                own = ids[variant, layer]
                new = np.setdiff1d(own[own >= 0], seen)
                added[variant] += int(sizes[new].sum())
                seen = np.union1d(seen, new)
    return {"added_bytes": added, "separate_bytes": [one_model + own for own in separate]}


def _nonexpert_bytes(folder: Path, manifest: Manifest) -> tuple[list[int], list[int]]:
    """(what each variant's non-experts add to those before it, what they take as the checkpoint stores them)."""
    shared = _header(folder / SHARED)
    own = [_header(folder / own_file(variant.name)) for variant in manifest.variants]
    added, separate = [0] * len(own), [0] * len(own)

    def packed_bytes(name: str, variant: int | None) -> int:
        """Of the parts in one variant's file, or in that of all together."""
        start = f"{nonexpert_format(manifest, name, variant)}.{name}"
        header = shared if variant is None else own[variant]
        return sum(_size(entry) for key, entry in header.items() if key == start or key.startswith(f"{start}."))

    for name, sources in manifest.nonexperts.items():
        packed = manifest.packed_nonexperts.get(name)
        if packed is not None:
            added[0] += packed_bytes(name, None)
        for variant, source in enumerate(sources):
            if packed is not None:
                separate[variant] += math.prod(packed.shape) * _ITEM_BYTES[manifest.variants[variant].dtype]
                added[variant] += packed_bytes(name, variant) if source == variant else 0
            else:
                size = _size(shared[name] if not any(sources) else own[source][name])
                separate[variant] += size
                added[variant] += size if source == variant else 0
    return added, separate
