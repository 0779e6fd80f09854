"""The physical ceiling of decoding: the bytes a step must read over the bandwidth of the memory they are in.

A decode step of R sequences reads every expert that one of them is routed to, the non-experts of every variant that is
present, and the keys and values of R contexts. Compute, prefill and overhead come on top, so no system reaches it.
Routing is taken as uniform, which random weights are near to; a trained router touches fewer experts.
"""

import re
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from polymoe.bundle.reader import Bundle
from polymoe.model.stock.kind import kind_of
from polymoe.quant.formats import get_format

_BUFFER_BYTES = 512 << 20  # far beyond any cache
_ROUNDS = 6
_ENCODER, _ENCODED = "encoder.", re.compile(r"\.EncDecAttention\.[kv]\.")


class StepBytes(msgspec.Struct, frozen=True):
    """What one decode step reads, expected value."""

    experts: float
    nonexperts: float
    kv: float

    @property
    def total(self) -> float:
        return self.experts + self.nonexperts + self.kv


def measure_bandwidth(device: torch.device, threads: int | None) -> float:
    """Bytes a second that reading a large array reaches, the best of several kernels and rounds."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        array = torch.ones(_BUFFER_BYTES // 4, device=device)
        best = float("inf")
        for _ in range(_ROUNDS):
            for kernel in (torch.sum, torch.amax, lambda x: torch.dot(x, x)):
                started = time.perf_counter()
                kernel(array).item()  # waits for the device
                best = min(best, time.perf_counter() - started)
        return _BUFFER_BYTES / best
    finally:
        torch.set_num_threads(before)


def step_bytes(bundle: Bundle, rows: Mapping[int, int], context: float, kv_bytes_per_token: float) -> StepBytes:
    """One decode step of `rows` (variant index -> sequences) with `context` tokens each on average.

    An absent expert counts as one that is resident: it must be read from somewhere.
    """
    text_config = bundle.config.get_text_config()
    num_experts = bundle.manifest.num_experts
    kind = kind_of(text_config)
    top_k = kind.experts_per_token(text_config, num_experts)
    layers = [i for i, path in enumerate(bundle.expert_modules) if not kind.in_encoder(path)]  # it does not decode
    touched = expected_touched(bundle.table[:, layers].tolist(), rows, top_k / num_experts)
    return StepBytes(
        experts=touched * bundle.manifest.expert_bytes,
        nonexperts=float(_nonexpert_bytes(bundle, list(rows))),
        kv=sum(rows.values()) * context * kv_bytes_per_token,
    )


def expected_touched(table: list[list[list[int]]], rows: Mapping[int, int], chance: float) -> float:
    """Physical experts that a step touches in all layers, on average.

    Args:
        table: [V][L][E] -> physical expert of the layer.
        rows: variant index -> tokens in the step.
        chance: that a token is routed to a given expert, top-k over experts.
    """
    total = 0.0
    for layer in range(len(table[0])):
        untouched: dict[int, float] = {}
        for variant, count in rows.items():
            for physical in table[variant][layer]:
                untouched[physical] = untouched.get(physical, 1.0) * (1.0 - chance) ** count
        total += sum(1.0 - u for u in untouched.values())
    return total


def _nonexpert_bytes(bundle: Bundle, variants: list[int]) -> int:
    """Bytes of the non-experts of these variants, shared ones once; of input embeddings only a few rows are read, and
    an encoder and the projections of its output not at all."""
    tied = set(bundle.manifest.tied.values())
    total = 0
    for name in bundle.nonexpert_names:
        if (
            name.startswith(_ENCODER)
            or _ENCODED.search(name)
            or (name.endswith("embed_tokens.weight") and name not in tied)
        ):
            continue
        sources = {bundle.nonexpert_sources(name)[variant] for variant in variants}
        if (packed := bundle.packed_nonexpert(name)) is not None:
            base, own = (
                get_format(fmt).num_bytes(tuple(packed.shape), torch.float32) if fmt else 0
                for fmt in (packed.base, packed.delta)
            )
            total += base + own * len(sources) if packed.delta else base * len(sources)
            continue
        for source in sources:
            tensor = bundle.nonexpert(source, name)
            total += tensor.numel() * tensor.element_size()
    return total


def ceiling_of(
    bundle: Bundle,
    bandwidth: float,
    in_flight: int,
    context: float,
    kv_bytes_per_token: float,
    reached: Mapping[str, float],
) -> dict[str, Any]:
    """The ceiling of `mixed` (rows spread over all variants) and `single`, and the share of it that they reached.

    Args:
        bandwidth: bytes a second.
        context: tokens of a sequence, on average over its decode steps.
        reached: system -> measured output tokens a second.
    """
    count = len(bundle.variants)
    spread = {v: in_flight // count + (v < in_flight % count) for v in range(count)}
    systems: dict[str, Any] = {}
    for name, rows in (("mixed", {v: r for v, r in spread.items() if r}), ("single", {0: in_flight})):
        bytes_read = step_bytes(bundle, rows, context, kv_bytes_per_token)
        speed = in_flight * bandwidth / bytes_read.total
        systems[name] = {
            "bytes_per_step": msgspec.structs.asdict(bytes_read) | {"total": bytes_read.total},
            "output_tokens_per_s": speed,
            "share_reached": reached[name] / speed if name in reached else None,
        }
    return {"memory_bandwidth_bytes_per_s": bandwidth, "rows": in_flight, "routing": "uniform", "systems": systems}
