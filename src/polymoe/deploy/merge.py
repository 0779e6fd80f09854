"""Many engines told as one, for `/v1/models` and `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo


def merged_info(infos: Mapping[str, EngineInfo]) -> EngineInfo:
    """Pool -> what it says of itself. A variant of several pools is described as the first one has it."""
    variants: dict[str, VariantInfo] = {}
    for info in infos.values():
        for variant in info.variants:
            variants.setdefault(variant.name, variant)
    first = next(iter(infos.values()))
    totals = {
        name: sum(getattr(info, name) for info in infos.values())
        for name in ("num_kv_blocks", "experts_resident", "experts_absent", "max_concurrency")
    }
    resident: dict[str, int] = {}
    for info in infos.values():
        for kind, count in info.resident_bytes.items():
            resident[kind] = resident.get(kind, 0) + count
    return msgspec.structs.replace(
        first,
        variants=list(variants.values()),
        slots=sum(info.slots for info in infos.values()),
        resident_bytes=resident,
        max_variants=0,  # nothing adds one to all replicas at once
        headroom=None,
        **totals,
    )


def merged_stats(info: EngineInfo, parts: Sequence[tuple[EngineInfo, EngineStats]]) -> EngineStats:
    """Sums over the replicas, by variant where it is by variant; the KV cache's use is the mean.

    info: of all; parts: of each replica. Raises `ValueError` without any.
    """
    if not parts:
        raise ValueError("no replica answered")
    index = {variant.name: number for number, variant in enumerate(info.variants)}
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(EngineStats):
        given = [(stats.names, getattr(stats, field.name)) for _, stats in parts]
        first = given[0][1]
        if field.name == "names":
            values[field.name] = list(index)
        elif field.name == "kv_usage":
            values[field.name] = sum(value for _, value in given) / len(given)
        elif field.name == "routing":
            values[field.name] = None
        elif field.name == "loaded":
            names = {known[v] for known, value in given for v in value}
            values[field.name] = sorted(index[name] for name in names)
        elif isinstance(first, list):
            total = [0] * len(index)
            for known, value in given:
                for name, count in zip(known, value, strict=True):
                    total[index[name]] += count
            values[field.name] = total
        elif isinstance(first, tuple):
            values[field.name] = [sum(counts) for counts in zip(*(value for _, value in given), strict=True)]
        elif isinstance(first, dict):
            kinds = dict.fromkeys(kind for _, value in given for kind in value)
            values[field.name] = {kind: sum(value.get(kind, 0) for _, value in given) for kind in kinds}
        else:
            values[field.name] = sum(value for _, value in given)
    return msgspec.convert(values, EngineStats)
