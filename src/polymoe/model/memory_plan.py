"""One plan for all of a GPU's memory, made before anything is allocated.

|-- experts, deltas, tables --|-- non-experts --|-- expert cache, headroom --|-- workspace --|- KV cache -|- reserve -|

The weights follow from the manifest and the number of slots, the workspace from the largest step. The KV cache gets
what was asked for, or what remains. What does not fit is an error that names what to change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import torch

from polymoe.bundle.manifest import WeightBytes
from polymoe.bundle.reader import Bundle
from polymoe.config import format_bytes
from polymoe.errors import BundleError, ConfigError
from polymoe.model.backends.device_facts import DeviceFacts, check_capability
from polymoe.quant.formats import STORED, get_format

# Of the device, for what nobody plans: the libraries' own buffers, compiled kernels, the allocator's rounding.
_RESERVE_BYTES = 1 << 30
_RESERVE_SHARE = 0.01
_OTHERS_SHARE = 0.1  # of the device, held by others: more than a context and a desktop


@dataclass(frozen=True)
class MemoryRequest:
    """What the engine wants beside the weights. `kv_bytes` None: all that remains."""

    facts: DeviceFacts
    kv_bytes: int | None
    kv_minimum: int  # of one sequence of full length
    kv_maximum: int  # more than this is of no use
    expert_cache_bytes: int
    workspace_bytes: int
    headroom_bytes: int = 0  # for variants that come


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part; together with `reserve` at most what was free."""

    weights: WeightBytes
    expert_cache: int
    workspace: int
    kv_cache: int
    reserve: int
    headroom: int = 0

    def __str__(self) -> str:
        parts: Mapping[str, int] = {
            "experts": self.weights.resident_experts + self.weights.tables,
            "deltas": self.weights.deltas,
            "non-experts": self.weights.nonexperts_shared + self.weights.nonexperts_own,
            "expert cache": self.expert_cache,
            "headroom": self.headroom,
            "workspace": self.workspace,
            "KV cache": self.kv_cache,
            "reserve": self.reserve,
        }
        return ", ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)


def weight_bytes(
    bundle: Bundle, shapes: Mapping[str, torch.Size], num_rows: int, itemsize: int, max_variants: int = 0
) -> WeightBytes:
    """What `ServedModel` will hold, from the manifest alone.

    Args:
        shapes: non-expert name -> shape in the stock model.
        num_rows: rows of slot-managed stacks.
        itemsize: bytes of the dtype that stored experts and non-experts are computed in.
        max_variants: versions that may be held at once, each of which has a row in every stack.
    """
    manifest = bundle.manifest
    stored = sum(pools.get(STORED.name, 0) for pools in manifest.base_pools)
    # Packed pools stay as they are; stored experts are converted to the dtype of the computation.
    packed = manifest.resident_bytes.resident_experts - stored * manifest.expert_bytes
    shared = own = 0
    for name in bundle.nonexpert_names:
        distinct = len(set(bundle.nonexpert_sources(name)))
        size = math.prod(shapes[name]) * itemsize
        if (found := bundle.packed_nonexpert(name)) is not None:  # stays as it is
            size = get_format(found.delta or found.base).num_bytes(tuple(found.shape), torch.float32)
            shared += get_format(found.base).num_bytes(tuple(found.shape), torch.float32) if found.delta else 0
        if distinct == 1:
            shared += size
        else:
            own += (min(distinct, num_rows) if found is not None else max(min(distinct, num_rows), max_variants)) * size
    return msgspec.structs.replace(
        manifest.resident_bytes,
        resident_experts=packed + stored * manifest.expert_parameters * itemsize,
        nonexperts_shared=shared,
        nonexperts_own=own,
    )


def workspace_bytes(
    *, tokens: int, seqs: int, hidden: int, expert_width: int, top_k: int, vocabulary: int, itemsize: int
) -> int:
    """The largest step's intermediate results: an upper estimate, since the allocator reuses what is dropped.

    Args:
        tokens, seqs: most of one step; a row of logits for each sequence is sampled from in float32.
        expert_width: I, of one expert.
    """
    residual = 12 * tokens * hidden  # residual stream, norms in float32, queries, keys, values and their output
    experts = tokens * top_k * (2 * hidden + 3 * expert_width)
    logits = seqs * vocabulary * (itemsize + 6 * 4 + 8)  # probabilities, noise, and a sort with its int64 order
    return (residual + experts) * itemsize + logits


def plan_memory(weights: WeightBytes, request: MemoryRequest) -> MemoryPlan:
    """Divide the device.

    Raises: `BundleError` for weights that no setting makes fit this device, `ConfigError` for a GPU that is too old,
    too small for what was asked, or taken by another process.
    """
    facts = request.facts
    check_capability(facts)
    reserve = _RESERVE_BYTES + int(_RESERVE_SHARE * facts.total_bytes)
    beside_kv = weights.total + request.expert_cache_bytes + request.headroom_bytes + request.workspace_bytes + reserve
    if weights.total + reserve > facts.total_bytes:
        raise BundleError(
            f"the bundle was planned for a larger device: its weights take {format_bytes(weights.total)} and "
            f"{facts} has room for {format_bytes(max(facts.total_bytes - reserve, 0))}. Plan it again with a smaller "
            f"--memory or a quantised base (--base int4), or serve with fewer --slots if non-experts "
            f"({format_bytes(weights.nonexperts_own)}) are most of it."
        )
    wanted = request.kv_minimum if request.kv_bytes is None else request.kv_bytes
    room = facts.free_bytes - beside_kv
    if wanted > room:
        raise ConfigError(_shortage(weights, request, beside_kv, wanted))
    kv = min(room, request.kv_maximum) if request.kv_bytes is None else request.kv_bytes
    return MemoryPlan(weights, request.expert_cache_bytes, request.workspace_bytes, kv, reserve, request.headroom_bytes)


def _shortage(weights: WeightBytes, request: MemoryRequest, beside_kv: int, wanted: int) -> str:
    """What is missing, and which setting to change."""
    facts = request.facts
    others = facts.taken_bytes > _OTHERS_SHARE * facts.total_bytes
    if others and beside_kv + wanted <= facts.total_bytes:
        return (
            f"{format_bytes(facts.taken_bytes)} of {facts} are taken by another process, and "
            f"{format_bytes(beside_kv + wanted)} are needed of the {format_bytes(facts.free_bytes)} that are free; end "
            "it (nvidia-smi lists who it is) or use another GPU with --device cuda:N."
        )
    advice = []
    if request.kv_bytes is not None and request.kv_bytes > request.kv_minimum:
        most = max(facts.free_bytes - beside_kv, 0)
        if most >= request.kv_minimum:
            advice.append(f"a smaller --kv-cache (up to {format_bytes(most)})")
    else:
        advice.append("a smaller --max-model-len")
    if request.headroom_bytes:
        advice.append(f"a smaller --headroom (now {format_bytes(request.headroom_bytes)})")
    if request.expert_cache_bytes:
        advice.append(f"a smaller --expert-cache (now {format_bytes(request.expert_cache_bytes)})")
    if weights.nonexperts_own:
        advice.append("fewer --slots")
    advice.append("a bundle planned with a smaller --memory or a quantised base (--base int4)")
    return (
        f"{facts} is too small: weights {format_bytes(weights.total)}, expert cache "
        f"{format_bytes(request.expert_cache_bytes)}, workspace {format_bytes(request.workspace_bytes)} and a KV cache "
        f"of at least {format_bytes(wanted)} are needed, {format_bytes(facts.free_bytes)} are free. Give "
        f"{', or '.join(advice)}."
    )
