"""What a further variant of a large model costs on the device, from the planner alone: no weights are needed.

    python -m benchmarks.variant_bytes [--kl 0.002] [--distance 0.19]

Qwen3-30B-A3B's shape: the stock model on the meta device says which tensors there are and which may be packed. Variants
are taken to be `--distance` apart everywhere, as those of the far family of docs/quality.md are (fine-tunes of large
models are closer), and the budget is the smallest one whose predicted mean KL is within `--kl`. Predictions are taken
as `MEASURED` times what they say, which is what they were on that family.
"""

import argparse
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig

from polymoe.model.stock.probe import trace
from polymoe.offline.checkpoint.architecture import build_on_meta, check_supported
from polymoe.offline.plan.allocate import position_options, uniform_answers
from polymoe.offline.plan.knapsack import Choices
from polymoe.offline.plan.nonexperts import NonexpertOptions, nonexpert_options, with_nonexperts
from polymoe.offline.plan.quantisation_error import QuantisationErrors
from polymoe.offline.similarity.scan import FamilyScan

QWEN3_30B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip
MEASURED = 0.5
_TOGETHER = 32  # experts of a layer that are chosen for as one: they are alike here
_FEW_ROWS = 16


def synthetic_family(num_variants: int, distance: float) -> tuple[Any, FamilyScan]:
    """(what the planner asks of a `Family`, a scan of it): every pair of variants is `distance` apart."""
    config = Qwen3MoeConfig(**QWEN3_30B)
    model = build_on_meta(config)
    info = check_supported(config, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    products = trace(config).products
    packable = tuple(
        n for n in info.nonexperts if n in products and shapes[n][0] >= _FEW_ROWS and shapes[n][0] != info.num_experts
    )
    # Rows have scales of their own, so that 32 experts cost as much as one with 32 times the rows.
    experts = {name: (shape[0] * _TOGETHER, *shape[1:]) for name, shape in info.expert_shapes.items()}
    count = info.num_experts // _TOGETHER
    checkpoint = SimpleNamespace(
        dtype=lambda _name: torch.bfloat16, shape=lambda name: shapes[name], tied={}, model=model, config=config
    )
    architecture = SimpleNamespace(
        expert_shapes=experts,
        expert_tensor=info.expert_tensor,
        vocab_tensors=info.vocab_tensors,
        expert_modules=info.expert_modules,
        num_experts=count,
        num_layers=info.num_layers,
    )
    family = SimpleNamespace(
        packable=packable, checkpoints=[checkpoint] * num_variants, architecture=architecture, config=config
    )
    same_as = np.broadcast_to(np.arange(num_variants)[:, None, None], (num_variants, info.num_layers, count)).copy()
    expert_bytes = sum(2 * int(np.prod(shape)) for shape in experts.values())
    square = np.full((num_variants, num_variants), distance**2)
    np.fill_diagonal(square, 1.0)
    own = tuple(range(num_variants))
    scan = FamilyScan(
        variant_names=tuple(f"v{v}" for v in own),
        expert_modules=info.expert_modules,
        distance=np.full((info.num_layers, count), distance * num_variants * (num_variants - 1) / 2),
        norm=np.ones((info.num_layers, count)),
        pair_distance=np.sqrt(square),
        pair_square=np.broadcast_to(square, (info.num_layers, count, *square.shape)),
        changed_bytes=np.full(same_as.shape, expert_bytes),
        expert_same_as=same_as,
        expert_hash=np.zeros((*same_as.shape, 32), dtype=np.uint8),
        expert_bytes=expert_bytes,
        nonexpert_same_as=dict.fromkeys(info.nonexperts, own),
        nonexpert_hash={},
        nonexpert_bytes={name: (2 * int(np.prod(shapes[name])),) * num_variants for name in info.nonexperts},
        nonexpert_square=dict.fromkeys(packable, square),
    )
    return family, scan


def device_bytes(num_variants: int, distance: float, kl: float, of_all: bool) -> dict[str, float]:
    """Of the smallest plan of policy `auto` within `kl`: "experts" and "nonexperts"."""
    family, scan = synthetic_family(num_variants, distance)
    errors = QuantisationErrors.of_weights(scan)
    found = position_options(family, scan, errors)
    others = nonexpert_options(family, scan, errors) if of_all else NonexpertOptions({}, {"stored": {}})
    uniform = with_nonexperts(uniform_answers(found), others)
    choices = Choices([*found, *others.options.values()], uniform)
    low, high = choices.least_bytes, choices.most_bytes
    while high - low > low // 500:
        middle = (low + high) // 2
        enough = MEASURED * choices.total(choices.best(middle, trusted=False))[1].mean() <= kl
        low, high = (low, middle) if enough else (middle, high)
    chosen = choices.best(high, trusted=False)
    sizes = choices.bytes[np.arange(len(chosen)), chosen]
    experts = float(sizes[: len(found)].sum())
    exact = scan.nonexpert_bytes_total - others.bytes_as_stored
    return {"experts": experts, "nonexperts": float(sizes[len(found) :].sum()) + exact}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=float, default=0.002)
    parser.add_argument("--distance", type=float, default=0.19)
    given = parser.parse_args()
    few, many = 4, 16
    report: dict[str, Any] = {}
    for name, of_all in (("non-experts as stored", False), ("all weights on the dial", True)):
        sizes = {count: device_bytes(count, given.distance, given.kl, of_all) for count in (few, many)}
        further = {part: (sizes[many][part] - sizes[few][part]) / (many - few) / 1e9 for part in sizes[few]}
        report[name] = {"further_variant_GB": further, "together_GB": sum(further.values())}
        parts = ", ".join(f"{part} {size:.2f} GB" for part, size in further.items())
        print(f"{name}: each further variant {sum(further.values()):.2f} GB ({parts})")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
