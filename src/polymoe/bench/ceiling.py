"""The physical ceilings: of decoding, the bytes a step must read over the bandwidth of the memory they are in; of
prompts, the multiplications of their tokens over what torch's own matmul does a second.

A decode step of R sequences reads every expert that one of them is routed to, the non-experts of every variant that is
present, and the keys and values of R contexts. Compute, prefill and overhead come on top, so no system reaches it.
Routing is taken as uniform, which random weights are near to; a trained router touches fewer experts.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from polymoe.bundle.reader import Bundle
from polymoe.model.stock.kind import kind_of
from polymoe.quant.formats import get_format

_BUFFER_BYTES = 512 << 20  # far beyond any cache
_ROUNDS = 6
_MATMUL = 2048  # rows, columns and inputs
_TABLES = re.compile(r"(embed_tokens|lm_head)\.weight$")
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


def measure_matmul(device: torch.device, threads: int | None, dtype: torch.dtype = torch.bfloat16) -> float:
    """Multiplications a second of torch's product of two large matrices, the best of several rounds."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        left, right = (torch.ones(_MATMUL, _MATMUL, device=device, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            (left @ right)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
        return _MATMUL**3 / best
    finally:
        torch.set_num_threads(before)


def prompt_products(bundle: Bundle) -> float:
    """Multiplications of one token of a prompt by all matrices that it meets but embeddings and head: a prompt's last
    token alone reads the head. Attention's own products are not counted."""
    text_config, num_experts = bundle.config.get_text_config(), bundle.manifest.num_experts
    kind = kind_of(text_config)
    expert = sum(math.prod(shape) for shape in bundle.packed_shapes.values() if len(shape) == 2)
    experts = expert * kind.experts_per_token(text_config, num_experts) * len(bundle.expert_modules)
    met = (name for name in bundle.nonexpert_names if not _TABLES.search(name))
    packed = ((name, bundle.packed_nonexpert(name)) for name in met)
    shapes = [tuple(p.shape if p is not None else bundle.nonexpert(0, name).shape) for name, p in packed]
    return experts + float(sum(math.prod(shape) for shape in shapes if len(shape) == 2))


def step_bytes(bundle: Bundle, rows: Mapping[int, int], context: float, kv_bytes_per_token: float) -> StepBytes:
    """One decode step of `rows` (variant index -> sequences) with `context` tokens each on average.

    An absent expert counts as one that is resident: it must be read from somewhere. A lossless delta counts as a whole
    expert, which it hardly ever is.
    """
    text_config = bundle.config.get_text_config()
    num_experts = bundle.manifest.num_experts
    kind = kind_of(text_config)
    top_k = kind.experts_per_token(text_config, num_experts)
    layers = [i for i, path in enumerate(bundle.expert_modules) if not kind.in_encoder(path)]  # it does not decode
    chance, manifest = top_k / num_experts, bundle.manifest
    experts = 0.0
    absent, no_delta = manifest.expert_bytes, 0
    for table, pools, of_none in (
        (bundle.table, manifest.base_pools, absent), (bundle.delta, manifest.delta_pools, no_delta),
    ):  # fmt: skip
        if table is not None:
            sizes = [[*_entry_bytes(bundle, pools[layer]), of_none] for layer in layers]
            experts += expected_bytes(table[:, layers].tolist(), sizes, rows, chance)
    return StepBytes(
        experts=experts,
        nonexperts=float(_nonexpert_bytes(bundle, list(rows))),
        kv=sum(rows.values()) * context * kv_bytes_per_token,
    )


def expected_bytes(
    table: list[list[list[int]]], sizes: Sequence[Sequence[float]], rows: Mapping[int, int], chance: float
) -> float:
    """Bytes of the physical experts, or deltas, that a step touches in all layers, on average.

    Args:
        table: [V][L][E] -> which of the layer's; below 0 as Python counts, the last of `sizes`.
        sizes: [L] bytes of each of the layer's.
        rows: variant index -> tokens in the step.
        chance: that a token is routed to a given expert, top-k over experts.
    """
    total = 0.0
    for layer, bytes_of in enumerate(sizes):
        untouched: dict[int, float] = {}
        for variant, count in rows.items():
            for physical in table[variant][layer]:
                untouched[physical] = untouched.get(physical, 1.0) * (1.0 - chance) ** count
        total += sum((1.0 - left) * bytes_of[max(physical, -1)] for physical, left in untouched.items())
    return total


def _entry_bytes(bundle: Bundle, pools: Mapping[str, int]) -> list[int]:
    """Bytes of each entry of a layer's pools, in the order of their ids."""
    found: list[int] = []
    for name, count in pools.items():
        fmt = get_format(name, bundle.levels)
        coded = sum(fmt.num_bytes(shape, torch.float32) for shape in bundle.packed_shapes.values())
        found += [coded if fmt.is_coded else bundle.manifest.expert_bytes] * count
    return found


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


class Prompts(msgspec.Struct, frozen=True):
    """Prompts of `tokens` tokens together that came at once. matmul: multiplications a second of torch's own; ttft:
    system -> median seconds to the first token."""

    tokens: int
    matmul: float
    ttft: Mapping[str, float | None]

    def ttft_over_matmul(self, name: str, bundle: Bundle) -> float | None:
        seconds = self.ttft.get(name)
        return None if seconds is None else seconds * self.matmul / (self.tokens * prompt_products(bundle))


def ceiling_of(
    bundles: Mapping[str, Bundle],
    bandwidth: float,
    in_flight: int,
    context: float,
    kv_bytes_per_token: float,
    reached: Mapping[str, float],
    step_seconds: Mapping[str, float | None],
    prompts: Prompts | None = None,
) -> dict[str, Any]:
    """The ceiling of systems that serve one bundle (`mixed`: rows spread over all variants; `single`: all of the first
    one), and the share of it that they reached.

    Args:
        bundles: system -> its bundle.
        bandwidth: bytes a second.
        context: tokens of a sequence, on average over its decode steps.
        reached: system -> measured output tokens a second, prompts and all.
        step_seconds: system -> measured median between two tokens of a sequence: what a step without prompts takes.
        prompts: what the prompts of all `in_flight` sequences at once took; None: not measured.

    Returns: of each system `share_reached`, of the ceiling; `bandwidth_share`: the bytes that a step must read over
        what it took, as a share of the bandwidth; and `ttft_over_matmul`: the median time to the first token over what
        torch's matmul needs for the arithmetic of all prompts. None where it was not measured.
    """
    systems: dict[str, Any] = {}
    for name, bundle in bundles.items():
        count = len(bundle.variants)
        spread = {v: in_flight // count + (v < in_flight % count) for v in range(count)}
        rows = {0: in_flight} if name.startswith("single") else {v: r for v, r in spread.items() if r}
        bytes_read = step_bytes(bundle, rows, context, kv_bytes_per_token)
        speed = in_flight * bandwidth / bytes_read.total
        step = step_seconds.get(name)
        systems[name] = {
            "bytes_per_step": msgspec.structs.asdict(bytes_read) | {"total": bytes_read.total},
            "output_tokens_per_s": speed,
            "share_reached": reached[name] / speed if name in reached else None,
            "bandwidth_share": bytes_read.total / step / bandwidth if step else None,
            "ttft_over_matmul": prompts.ttft_over_matmul(name, bundle) if prompts is not None else None,
        }
    return {
        "memory_bandwidth_bytes_per_s": bandwidth,
        "matmul_products_per_s": prompts.matmul if prompts is not None else None,
        "rows": in_flight,
        "routing": "uniform",
        "systems": systems,
    }
