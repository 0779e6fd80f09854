"""A real engine on a synthetic bundle, and the loads that are timed on it. The engine's own step does all the work."""

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from polymoe.bench.ceiling import expected_bytes
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.protocol.request import EngineRequest, SamplingParams, SequenceId
from synthetic_bundle import Layout, SyntheticBundle

_ids = itertools.count()


def load_engine(layout: Layout, **options: Any) -> EngineCore:
    """As `polymoe serve` would, but for where the weights come from."""
    settings: dict[str, Any] = {
        "device": layout.device, "dtype": layout.dtype, "enable_prefix_caching": False, "admission_factor": None,
        "max_num_batched_tokens": 4096, "max_model_len": 8192, "expert_cache_bytes": 0,
    }  # fmt: skip
    backend = None
    if layout.device == "cpu":  # the script's own trial: a GPU's kernels in Triton's interpreter
        from polymoe.model.backends.cuda import CudaBackend

        backend = CudaBackend()
        settings |= {"max_model_len": 256, "max_num_batched_tokens": 64, "kv_cache_bytes": 32 << 20}
    config = EngineConfig(bundle=layout.encode(), **(settings | options))
    return EngineCore(config, bundle=SyntheticBundle(layout), backend=backend)


def add(core: EngineCore, variant: int, prompt_tokens: int, output_tokens: int) -> SequenceId:
    """Queue a random request of these lengths."""
    rng = random.Random(next(_ids))
    vocabulary = core.info.variants[variant].vocab_size
    name = SequenceId(f"bench-{next(_ids)}")
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    prompt = [rng.randrange(vocabulary) for _ in range(prompt_tokens)]
    core.add_request(EngineRequest(request_id=name, variant=variant, prompt_token_ids=prompt, sampling=sampling))
    return name


def decode_seconds(core: EngineCore, variants: Sequence[int], context: int, steps: int) -> float:
    """Median seconds of a decode step with one sequence of about `context` tokens for each entry of `variants`."""
    warm_up = 1 if core.device.type == "cpu" else 3
    names = [add(core, variant, context, steps + warm_up + len(variants) + 8) for variant in variants]
    started: set[SequenceId] = set()
    while len(started) < len(names):
        started |= {output.request_id for output in core.step()}
    times = []
    for step in range(warm_up + steps):
        before = time.perf_counter()
        outputs = core.step()
        times.append(time.perf_counter() - before)
        assert len(outputs) == len(names), f"step {step} decoded {len(outputs)} of {len(names)} sequences"
    core.abort(names)
    return statistics.median(times[warm_up:])


def first_token_seconds(core: EngineCore, variant: int, prompt_tokens: int) -> float:
    """From a request to its first token, with nothing else to do."""
    before = time.perf_counter()
    name = add(core, variant, prompt_tokens, 1)
    while not any(output.request_id == name for output in core.step()):
        pass
    return time.perf_counter() - before


def decode_bytes(core: EngineCore, variants: Sequence[int], context: float) -> float:
    """What such a decode step must read, with near-uniform routing."""
    bundle = core.bundle
    assert isinstance(bundle, SyntheticBundle)
    rows = {variant: variants.count(variant) for variant in dict.fromkeys(variants)}
    text = bundle.config.get_text_config()
    chance = text.num_experts_per_tok / bundle.num_experts
    total = expected_bytes(
        bundle.table.tolist(), _sizes(bundle.table, bundle.base_bytes, bundle.base_bytes), rows, chance
    )
    if bundle.delta is not None:
        total += expected_bytes(bundle.delta.tolist(), _sizes(bundle.delta, bundle.delta_bytes, 0), rows, chance)
    total += len(rows) * (bundle.nonexpert_bytes - bundle.embedding_bytes)
    per_token = core.cache_room.bytes_per_block / core.config.block_size
    return total + len(variants) * context * per_token


def prefill_flops(core: EngineCore, tokens: int) -> float:
    """Of one prompt: products with the active weights, and causal attention."""
    bundle = core.bundle
    assert isinstance(bundle, SyntheticBundle)
    text = bundle.config.get_text_config()
    item = bundle.dtype.itemsize
    dense = (bundle.nonexpert_bytes - 2 * bundle.embedding_bytes) / item  # the head runs for one token
    experts = bundle.num_layers * text.num_experts_per_tok * bundle.manifest.expert_parameters
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * head_dim * tokens**2  # half of 4 · T²
    return 2 * tokens * (dense + experts) + attention


def _sizes(table: torch.Tensor, num_bytes: int, of_none: int) -> list[list[int]]:
    """As `expected_bytes` wants them, of a table [V][L][E] whose entries all have one size."""
    return [[num_bytes] * (int(table.max()) + 1) + [of_none]] * table.shape[1]
