"""Every kernel beside its float32 reference, at real shapes, on random and skewed inputs.

The error of a check is |kernel − reference| / |reference| over the whole output, the reference computed in float32 from
the same (rounded) inputs. A kernel in bfloat16 rounds its inputs' products once or twice: 1 % is generous, a wrong row
or a wrong expert is 100 %.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from polymoe.kernels.gpu import experts as kernels
from polymoe.kernels.gpu.experts import expert_matrices
from polymoe.kernels.gpu.paged_attention import paged_attention, paged_attention_torch
from polymoe.kernels.gpu.rms_norm import rms_norm_gpu, rms_norm_torch
from polymoe.kernels.gpu.segmented_linear import segmented_linear, segmented_linear_torch
from polymoe.model.backends.context import ForwardContext
from polymoe.model.experts.pool import ExpertPool
from polymoe.model.stock.skeleton import build_skeleton, expert_modules
from polymoe.model.transfer.staging import Staging
from synthetic_bundle import Layout, SyntheticBundle

experts_gpu: Any = kernels.experts_gpu  # their inputs are handed on with *, of a length that mypy does not know
experts_torch: Any = kernels.experts_torch
LIMIT = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
Check = tuple[str, float]


class Place:
    """Device, dtype and sizes of the checks."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tokens = (1, 5) if tiny else (1, 7, 64, 513)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


# First what the timed parts run, whose configurations are then known to them; of other formats one length each, since
# every one is compiled.
_LAYERS = (
    ("mixtral-8x7b", "int4", "d3", (1, 64, 513)),
    ("qwen3-30b-a3b", "stored", "", (1, 64, 513)),
    ("qwen3-30b-a3b", "int4", "d2", (1, 64)),
    ("mixtral-8x7b", "int4", "d1", (1, 64)),
    ("qwen3-30b-a3b", "int4", "d4", (7,)),
    ("qwen3-30b-a3b", "int8", "", (7,)),
    ("qwen3-30b-a3b", "fp8", "d1", (7,)),
)
_TINY = (("tiny-mixtral", "stored", "", (1, 5)), ("tiny-mixtral", "int4", "d3", (1, 5)))


def experts(place: Place) -> Iterator[Check]:
    device, dtype = place.device, place.dtype
    for shape, base, delta, lengths in _TINY if place.tiny else _LAYERS:
        layout = Layout(shape, 4, base, delta, device=str(device), dtype=str(dtype).removeprefix("torch."), layers=1)
        bundle = SyntheticBundle(layout)
        module: Any = expert_modules(build_skeleton(bundle.config))[0][1]
        pool = ExpertPool(bundle, ForwardContext(), device, dtype, 0, Staging(device), lambda _fraction: None)
        layer = pool.layers[0]
        weights = layer.compressed or layer.resident
        matrices = expert_matrices(weights, dtype, module.is_transposed)
        wide_matrices = expert_matrices(_wide(weights), torch.float32, module.is_transposed)
        tables = layer.table, layer.delta, layer.sign
        for tokens in lengths:
            for routing in ("random", "skewed"):
                inputs: Any = _routed(place, bundle, tokens, routing)
                found = experts_gpu(*inputs, *tables, matrices)
                wide: Any = inputs[0].float(), *inputs[1:]
                wanted = experts_torch(*wide, *tables, wide_matrices)
                yield f"experts {shape} {base} {delta} T={tokens} {routing}", error(found, wanted)


def _routed(place: Place, bundle: SyntheticBundle, tokens: int, routing: str) -> tuple[torch.Tensor, ...]:
    """Hidden states, experts and their weights, variants. Skewed: all to the first experts, nearly all of a variant."""
    count = bundle.config.num_experts_per_tok
    scores = torch.rand(tokens, bundle.num_experts, generator=place.generator, device=place.device)
    variant = torch.arange(tokens, device=place.device) * 4 // tokens
    if routing == "skewed":
        scores -= torch.arange(bundle.num_experts, device=place.device)
        variant = (torch.arange(tokens, device=place.device) >= tokens - 1).long() * 3
    weight, index = scores.topk(count)
    return place.randn(tokens, bundle.config.hidden_size), index, torch.softmax(weight, -1), variant


def _wide(weights: Any) -> Any:
    if isinstance(weights, dict):
        return {name: tensor.float() for name, tensor in weights.items()}
    return replace(weights, stored={name: tensor.float() for name, tensor in weights.stored.items()})


def linears(place: Place) -> Iterator[Check]:
    for inputs, outputs in ((64, 96),) if place.tiny else ((4096, 4096), (4096, 1024), (2048, 4096), (4096, 8)):
        stack = place.randn(3, outputs, inputs)
        for tokens in place.tokens:
            x = place.randn(tokens, inputs)
            # Four variants, two of which share a row; random runs, then everything in the last one.
            row = torch.tensor([2, 0, 0, 1], dtype=torch.int32, device=place.device)
            for name, bounds in (
                ("random", [0, tokens // 3, tokens // 3, tokens * 2 // 3, tokens]),
                ("skewed", [0, 0, 0, 0, tokens]),
            ):
                starts = torch.tensor(bounds, dtype=torch.int32, device=place.device)
                found = segmented_linear(x, stack, None, row, starts)
                wanted = segmented_linear_torch(x.float(), stack.float(), None, row, starts)
                yield f"linear {inputs}x{outputs} T={tokens} {name}", error(found, wanted)


def attention(place: Place) -> Iterator[Check]:
    heads = (4, 2, 16) if place.tiny else (32, 8, 128)
    block_size = 16
    longest = 40 if place.tiny else 3000
    for name, lens, queries in (
        ("decode", [1, longest, 17], [1, 1, 1]),
        ("prefill", [longest // 2], [longest // 2]),
        ("mixed", [5, longest, 33], [5, 1, 12]),
    ):
        q_heads, kv_heads, dim = heads
        needed = [-(-length // block_size) for length in lens]
        key, value = (place.randn(sum(needed) + 1, block_size, kv_heads, dim) for _ in range(2))
        order = torch.randperm(sum(needed)).tolist()
        table = torch.zeros(len(lens), max(needed), dtype=torch.int64)
        for i, count in enumerate(needed):
            table[i, :count] = torch.tensor([order.pop() for _ in range(count)])
        starts = torch.tensor([0, *queries], device=place.device).cumsum(0).int()
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=place.device)
        query = place.randn(sum(queries), q_heads, dim)
        given = table.to(place.device), starts, seq_lens
        options: dict[str, Any] = {"max_query_len": max(queries), "scaling": dim**-0.5}
        for window in (None, 16):
            found = paged_attention(query, key, value, *given, window=window, **options)
            wide = query.float(), key.float(), value.float()
            wanted = paged_attention_torch(*wide, *given, window=window, **options)
            yield f"attention {name} window={window}", error(found, wanted)


def norms(place: Place) -> Iterator[Check]:
    for width in (64,) if place.tiny else (128, 2048, 4096):
        weights = place.randn(3, width)
        version = torch.tensor([2, 0, 0, 1], device=place.device)
        x = place.randn(8, width)
        found, wanted = (kind(x, weights, version, 2, 1e-5) for kind in (rms_norm_gpu, rms_norm_torch))
        yield f"norm {width}", error(found, wanted)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="real")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    place = Place(arguments.device, arguments.shape == "tiny")
    worst: dict[str, float] = {}
    failed: dict[str, Any] = {}
    count = 0
    for group in (norms, linears, attention, experts):
        try:
            for name, found in group(place):
                count += 1
                worst[group.__name__] = max(worst.get(group.__name__, 0.0), found)
                if not found <= LIMIT[place.dtype]:
                    failed[name] = found
        except Exception as problem:  # the other kernels are checked all the same
            failed[group.__name__] = f"{type(problem).__name__}: {problem}"
        # After each group: what is there when the time is over counts.
        arguments.out.write_text(json.dumps({"checks": count, "worst": worst, "failed": failed}))
    print(json.dumps(failed, indent=1) if failed else f"{count} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
