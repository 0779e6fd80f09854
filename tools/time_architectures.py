"""Time packed experts against stored ones in every architecture that is served, and say what each runs on.

For each one a small bfloat16 family (a base and a copy with 2 % noise, as a fine-tune) is planned twice: by the default
policy in the memory of one model (`auto`, 1.0x), and with every variant's own experts as they are (`separate`). Both
are served by real engines in this process, in turn, with the same requests; the best of several runs counts.

    python tools/time_architectures.py --out docs/architectures.md     # all that are served, a few minutes
    python tools/time_architectures.py --only granitemoe               # one
"""

import argparse
import gc
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.engine.core import EngineCore
from polymoe.errors import UnsupportedModelError
from polymoe.model.stock.probe import trace
from polymoe.offline.api import make_plan
from polymoe.protocol.request import EngineRequest, SamplingParams, SequenceId

sys.path.insert(0, str(Path(__file__).resolve().parent))
from try_architectures import SMALL, architectures, small_config

NUM_VARIANTS = 2
AIM = 0.5  # packed ÷ stored
NOISE = 0.02  # of a fine-tune, relative to the base
# Large enough that experts outgrow a processor's caches and take most of a step: 25 to 50 million values of a variant.
SIZES: dict[str, Any] = {
    **SMALL,
    **{"vocab_size": 2048, "vocab_size_per_layer_input": 2048, "sliding_window": 128, "hidden_size": 512},
    **{"intermediate_size": 512, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    **{"shared_intermediate_size": 256, "dense_intermediate_size": 512, "hidden_size_per_layer_input": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 64},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 16),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 4),
    **{"q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64},
    **{"index_head_dim": 64, "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_num_heads": 16, "mamba_head_dim": 64},
}


@dataclass(frozen=True)
class Timing:
    """Output tokens a second of one architecture; `runs_on`: what its packed experts run on. Or what went wrong."""

    name: str
    stored: float = 0.0
    packed: float = 0.0
    runs_on: str = ""
    failure: str = ""

    @property
    def ratio(self) -> float:
        return self.packed / self.stored


@torch.no_grad()
def make_family(config: Any, folder: Path) -> dict[str, Path]:
    """Variant name -> bfloat16 checkpoint: a random base and a copy with noise."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    paths = {}
    for index in range(NUM_VARIANTS):
        for tensor in model.state_dict().values() if index else ():
            if tensor.ndim > 1 and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=NOISE * float(tensor.float().std()))
        paths[f"v{index}"] = folder / f"v{index}"
        model.save_pretrained(paths[f"v{index}"])
    return paths


def output_rate(engine: EngineCore, in_flight: int, input_tokens: int, output_tokens: int) -> float:
    """Output tokens a second of requests that take the variants in turn, all at once.

    Of this process's own time, so that others on the same core do not count.
    """
    rng = random.Random(0)
    for i in range(in_flight):
        prompt = [rng.randrange(3, SIZES["vocab_size"]) for _ in range(input_tokens)]
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        engine.add_request(
            EngineRequest(
                request_id=SequenceId(str(i)), variant=i % NUM_VARIANTS, prompt_token_ids=prompt, sampling=sampling
            )
        )
    started = time.process_time()
    count = 0
    while engine.has_work():
        count += sum(len(output.new_token_ids) for output in engine.step())
    assert count == in_flight * output_tokens
    return count / (time.process_time() - started)


def time_one(name: str, model_type: str, args: argparse.Namespace) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        paths = make_family(small_config(model_type, SIZES), Path(folder))
        engines = {}
        for policy, memory in (("separate", None), ("auto", "1.0x")):
            bundle = Path(folder) / policy
            make_plan(paths, policy, memory, bundle, console=Console(quiet=True))
            config = EngineConfig(
                bundle=str(bundle), device="cpu", dtype="bfloat16", kv_cache_bytes=64 << 20, num_threads=1,
                enable_prefix_caching=False, max_model_len=args.input_tokens + args.output_tokens,
            )  # fmt: skip
            engines[policy] = EngineCore(config)
        best = dict.fromkeys(engines, 0.0)
        for _ in range(1 + args.repeats):  # the first run is there to warm up
            for policy, engine in engines.items():
                rate = output_rate(engine, args.requests, args.input_tokens, args.output_tokens)
                best[policy] = max(best[policy], rate)
        runs_on = ", ".join(str(path) for path in engines["auto"].info.fast_paths if path.part == "experts")
    return Timing(name, best["separate"], best["auto"], runs_on)


def is_served(model_type: str) -> bool:
    if model_type not in CONFIG_MAPPING_NAMES or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    config = small_config(model_type)
    try:
        trace(config)
    except UnsupportedModelError:
        return False
    return getattr(config, "vision_config", None) is None


def markdown(timings: list[Timing], args: argparse.Namespace) -> str:
    done = [t for t in timings if not t.failure]
    below = [t.name for t in done if t.ratio < AIM]
    lines = [
        "# Packed experts in every architecture",
        "",
        f"Output tokens a second of a small bfloat16 family of each architecture that is served (hidden size "
        f"{SIZES['hidden_size']}, {SIZES['num_experts']} experts of {SIZES['moe_intermediate_size']} to "
        f"{SIZES['intermediate_size']}, {SIZES['num_experts_per_tok']} used, {SIZES['num_hidden_layers']} layers; "
        f"{NUM_VARIANTS} variants), {args.requests} requests in flight of {args.input_tokens} tokens in and "
        f"{args.output_tokens} out, a second of CPU time on one thread, best of {args.repeats}. Packed: policy `auto` "
        f"in the memory of one model. Stored: policy `separate`. `make architectures` writes this file; transformers "
        f"{transformers.__version__}.",
        "",
        f"Aim: packed at least {AIM} of stored. {'Missed by ' + ', '.join(below) if below else 'Met by all'}; "
        f"{min(t.ratio for t in done):.2f} to {max(t.ratio for t in done):.2f}."
        if done
        else "Nothing was timed.",
        "",
        "| architecture | stored tok/s | packed tok/s | packed ÷ stored | layers of packed experts, on what |",
        "|---|--:|--:|--:|---|",
        *(f"| `{t.name}` | {t.stored:.0f} | {t.packed:.0f} | {t.ratio:.2f} | {t.runs_on} |" for t in done),
        *(f"| `{t.name}` | | | | failed: {t.failure} |" for t in timings if t.failure),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="this one (repeatable)")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--requests", type=int, default=8, help="in flight")
    parser.add_argument("--input-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = architectures()
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    timings = []
    for name in args.only or known:
        if not is_served(known[name]):
            continue
        try:
            timings.append(time_one(name, known[name], args))
            print(f"{name}: {timings[-1].ratio:.2f} of stored, {timings[-1].runs_on}", file=sys.stderr)
        except Exception as error:  # one architecture must not keep the others from being timed
            timings.append(Timing(name, failure=f"{type(error).__name__}: {error}"))
            print(f"{name}: {timings[-1].failure}", file=sys.stderr)
        gc.collect()
    table = markdown(timings, args)
    print(table)
    if args.out is not None:
        args.out.write_text(table, encoding="utf-8")
    return int(any(t.failure or t.ratio < AIM for t in timings))


if __name__ == "__main__":
    sys.exit(main())
