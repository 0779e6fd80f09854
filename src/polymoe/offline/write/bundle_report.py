"""What a bundle holds, for people: bytes by kind, formats by layer, fidelity by variant."""

from collections import Counter

import numpy as np
from rich.table import Table

from polymoe.bundle.layer_names import layer_names
from polymoe.bundle.manifest import Manifest
from polymoe.bundle.reader import Bundle
from polymoe.config import format_bytes
from polymoe.console import Console
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.quant.formats import get_format

_KINDS = {
    "resident_experts": "experts",
    "deltas": "deltas of single variants",
    "nonexperts_shared": "non-experts, shared by all",
    "nonexperts_own": "non-experts of single variants",
    "tables": "tables",
}


def print_bundle(bundle: Bundle, console: Console) -> None:
    """Bytes by kind, how positions are shared, and the formats where there are several."""
    manifest = bundle.manifest
    console.print(_bytes_table(manifest, f"{bundle.path.name}: policy {manifest.policy} {manifest.memory}".rstrip()))
    counts = manifest.positions
    console.print(
        f"{sum(counts.values())} expert positions: {counts['shared']} shared by all variants, "
        f"{counts['separate']} separate, {counts['absent']} absent (fetched from the host).",
        soft_wrap=True,
    )
    if manifest.packed_nonexperts:
        ways = Counter(f"{p.base} + {p.delta}" if p.delta else p.base for p in manifest.packed_nonexperts.values())
        console.print(
            f"{len(manifest.packed_nonexperts)} matrices beside the experts packed: "
            f"{', '.join(f'{count} in {way}' for way, count in ways.most_common())}.",
            soft_wrap=True,
        )
    if any(get_format(name).is_packed for name in manifest.format_counts()):
        console.print(_format_table(manifest))


def print_variants(bundle: Bundle, console: Console) -> None:
    """How close each served variant is to its original, as measured and as predicted."""
    table = Table(title="Fidelity of each variant (KL in nats a token)", title_justify="left")
    columns = ("variant", "KL", "predicted", "top-1", "ppl original", "ppl served", "tokens", "text")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "text") else "right")
    for variant in bundle.variants:
        predicted = "" if variant.predicted_error is None else f"{variant.predicted_error:.5f}"
        measured = variant.fidelity
        if measured is None:
            table.add_row(variant.name, "–", predicted, "–", "–", "–", "–", "not measured")
            continue
        table.add_row(
            variant.name, f"{measured.kl:.5f}", predicted, f"{measured.top1:.3f}",
            f"{measured.perplexity_original:.2f}", f"{measured.perplexity_served:.2f}", f"{measured.tokens:,}",
            measured.text,
        )  # fmt: skip
    console.print(table)


def print_sharing(bundle: Bundle, scan: FamilyScan, plan: Plan, console: Console) -> None:
    """What each variant gets, as a plan decided it."""
    table = Table(title="Experts of each variant", title_justify="left")
    columns = ("variant", "its own", "another variant's", "merged", "with a delta", "from the host", "version")
    for column in columns:
        table.add_column(column, justify="left" if column in ("variant", "version") else "right")
    for index, record in enumerate(bundle.variants):
        merged = (plan.merge != "own") & plan.resident[index]
        own = (plan.serving[index] == scan.expert_same_as[index]) & ~merged
        resident = plan.resident[index]
        delta = plan.delta_owner[index] >= 0
        numbers = (own & resident, ~own & ~merged & resident, merged, delta, ~resident)
        table.add_row(record.name, *(str(int(np.sum(n))) for n in numbers), record.version[:12])
    console.print(table)


def _bytes_table(manifest: Manifest, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("on the device")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    one_model = manifest.expert_bytes * manifest.num_experts * len(manifest.expert_modules)
    held = manifest.resident_bytes
    for kind, count in held.by_kind.items():
        note = f"{count / one_model:.2f}x one model's" if kind in ("resident_experts", "deltas") and count else ""
        if kind != "deltas" or count:
            table.add_row(_KINDS.get(kind, kind), format_bytes(count), note)
    table.add_section()
    experts = held.resident_experts + held.deltas
    table.add_row("together", format_bytes(held.total))
    if held.deltas:
        table.add_row("experts and deltas", format_bytes(experts), f"{experts / one_model:.2f}x one model's")
    table.add_row("host tier: absent experts", format_bytes(manifest.host_bytes))
    return table


def _format_table(manifest: Manifest) -> Table:
    """Bases and deltas by layer and format."""
    table = Table(title="Bases and deltas by layer", title_justify="left")
    table.add_column("layer", justify="right")
    names = list(manifest.format_counts())
    for name in names:
        table.add_column(name, justify="right")
    layers = layer_names(manifest.expert_modules)
    for layer, bases, deltas in zip(layers, manifest.base_pools, manifest.delta_pools, strict=True):
        table.add_row(layer, *(str((bases | deltas).get(name, "")) for name in names))
    return table
