"""Many engines told as one, for `/v1/models` and `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from polymoe.protocol.info import EngineInfo, EngineStats, VariantInfo


def renumbered(info: EngineInfo, places: dict[str, int]) -> EngineInfo:
    """With places that mean the same for all replicas, each of which counts for itself, and every name said.

    places: version -> its place; those of new versions are added.
    """
    by_place = {variant.place: variant.version for variant in info.variants}
    own = info.names or {variant.name: variant.place for variant in info.variants}
    variants = [
        msgspec.structs.replace(variant, place=places.setdefault(variant.version, len(places)))
        for variant in info.variants
    ]
    return msgspec.structs.replace(
        info, variants=variants, names={name: places[by_place[place]] for name, place in own.items()}
    )


def merged_info(infos: Mapping[str, EngineInfo]) -> EngineInfo:
    """Pool -> what it says of itself, renumbered. A version of several pools is described as the first one has it."""
    held: dict[str, VariantInfo] = {}
    for info in infos.values():
        for variant in info.variants:
            held.setdefault(variant.version, variant)
    first = next(iter(infos.values()))
    totals = {
        name: sum(getattr(info, name) for info in infos.values())
        for name in ("num_kv_blocks", "experts_resident", "experts_absent", "max_concurrency")
    }
    resident: dict[str, int] = {}
    for info in infos.values():
        for kind, count in info.resident_bytes.items():
            resident[kind] = resident.get(kind, 0) + count
    headrooms = [info.headroom for info in infos.values() if info.headroom is not None]
    return msgspec.structs.replace(
        first,
        variants=list(held.values()),
        names=merged_names(infos.values()),
        slots=sum(info.slots for info in infos.values()),
        resident_bytes=resident,
        max_variants=sum(info.max_variants for info in infos.values()),
        headroom=sum(headrooms) if len(headrooms) == len(infos) else None,
        **totals,
    )


def merged_names(infos: Iterable[EngineInfo]) -> dict[str, int]:
    """What a name means: in the first pool that has it, where several do."""
    names: dict[str, int] = {}
    for info in infos:
        for name, place in info.names.items():
            names.setdefault(name, place)
    return names


def merged_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """Sums over the replicas, by variant where it is by variant; the KV cache's use is the mean.

    parts: of each replica. Raises `ValueError` without any.
    """
    if not parts:
        raise ValueError("no replica answered")
    index = {name: number for number, name in enumerate(dict.fromkeys(n for part in parts for n in part.names))}
    values: dict[str, object] = {}
    for field in msgspec.structs.fields(EngineStats):
        given = [(stats.names, getattr(stats, field.name)) for stats in parts]
        first = given[0][1]
        if field.name == "names":
            values[field.name] = list(index)
        elif field.name == "added_bytes":  # every replica holds all of them
            values[field.name] = max(value for _, value in given)
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
