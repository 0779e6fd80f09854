"""Try every architecture of transformers' experts registry: which ones does polymoe serve exactly?

For each one, three tiny random checkpoints go the way a user's go (plan, bundle, engine) and a batch that mixes them,
with chunked prefill and small KV blocks, is compared with each model alone in stock transformers, in float32:

- exact     the same greedy tokens and all logits within 1e-4, or no further from float64's than twice stock's float32
- refused   polymoe says, before anything is served, that it cannot and why
- differs   it serves something else: a bug of polymoe
- fails     anything else: a bug of polymoe, of transformers or of the tiny config made here

    python tools/try_architectures.py                    # all, a table
    python tools/try_architectures.py --only mixtral     # one, with its traceback
    python tools/try_architectures.py --markdown         # the README's table
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.engine.core import EngineCore
from polymoe.errors import UnsupportedModelError
from polymoe.model.stock.kind import kind_of
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.plan import separate_plan
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle
from polymoe.protocol.request import EngineRequest, SamplingParams, SequenceId

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from families import randomize

TOLERANCE = 1e-4
NUM_VARIANTS = 3
NUM_LAYERS = 4
PLAIN = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
COLOURS = {"exact": "green", "refused": "yellow", "differs": "bold red", "fails": "red"}

# Small values for the config fields that architectures share, each used where the config has the field.
SMALL: dict[str, Any] = {
    **{"vocab_size": 112, "vocab_size_per_layer_input": 112, "max_position_embeddings": 256, "sliding_window": 8},
    **{"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 40},
    **{"shared_intermediate_size": 20, "dense_intermediate_size": 24, "hidden_size_per_layer_input": 8},
    **{"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **{"n_group": 2, "topk_group": 1, "num_expert_group": 2, "first_k_dense_replace": 1, "num_dense_layers": 1},
    **{"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    **{"linear_num_heads": 4, "linear_head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"mamba_d_state": 8, "mamba_n_heads": 4, "n_groups": 2, "block_size": 5, "chunk_size": 5, "mamba_chunk_size": 5},
    **{"index_topk": 6, "index_head_dim": 16, "index_n_heads": 16, "index_block_size": 4, "index_topk_blocks": 2},
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 8},
    **{"rel_extent": 12, "d_rel": 4},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "eod_token_id": 1, "sep_token_id": None},
}

# The same for what reads images and sound, which is built and saved, and left out when it is served.
TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 16, "out_hidden_size": 32, "output_dim": 32, "d_model": 32},
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **{"encoder_ffn_dim": 16, "num_mel_bins": 16, "downsample_hidden_size": 8, "projection_intermediate_size": 16},
    **{"image_size": 28, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "layer_types": None},
    **{"mlp_dim": 16, "output_channels": 8, "downsample_channels": [8, 32], "head_dim": 16, "vocab_size": 16},
}

# What shrinking alone does not get right, by model_type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    # the published rate of heavy compression is 128, which these sequences would not reach
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "deepseek_ocr2_text": {
        **{"num_experts_per_tok": 2, "topk_group": None, "n_group": None},
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_shared_experts": 1, "layer_types": PLAIN},
    "ernie4_5_vl_moe_text": {
        **{"moe_intermediate_size": [16, 8], "mlp_layer_types": ["dense", "sparse"] * 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
        **{
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 24,
            "num_kv_shared_layers": 2,
        },
        **{"final_logit_softcapping": 30.0},
    },
    "glm4v_moe_text": {
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next_text": {"index_topk": 8, "index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "mamba_d_head": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8], "layer_types": PLAIN},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    # as the published model, which has one index head for each of keys and values
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_n_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
        **{"indexer_compress_ratio": 4, "ngram_vocab_size_base": 100, "split_ngram_parts": 2, "hc_lowrank": 4},
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 109, "audio_start_token_id": 108},
    "unlimited_ocr_text": {"num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture. `error`: the largest difference of a logit, where there is one."""

    name: str
    model_type: str
    result: str
    note: str = ""
    error: float | None = None


def architectures() -> dict[str, str]:
    """Every folder of transformers/models with a registered experts class -> the model_type to try.

    That is the type whose own config class belongs to the folder's causal LM, else to its multimodal one, else the
    folder's composite type.
    """
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        classes = set(re.findall(r"^class (\w+)\(", source, re.MULTILINE))
        text = [t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in classes and "ForCausalLM" in name]
        text.sort(key=lambda t: not t.endswith("_text"))
        whole = [t for t, name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items() if name in classes]
        found[path.parent.name] = [*text, *whole, path.parent.name][0]
    return found


# What no other size can change.
FIXED: dict[str, dict[str, Any]] = {"zaya": {"num_experts_per_tok": 1}}


def small_config(model_type: str, sizes: Mapping[str, Any] = SMALL) -> Any:
    """The architecture's own config class with every size made small: where `sizes` has the field, from there."""
    default = CONFIG_MAPPING[model_type]()
    if default.get_text_config() is default:
        return AutoConfig.for_model(model_type, **small_fields(default, sizes))
    parts = {name: part for name, part in vars(default).items() if isinstance(part, PreTrainedConfig)}
    small = {name: small_tower(part) for name, part in parts.items()}
    text = parts["text_config"]
    small["text_config"] = {"model_type": text.model_type, **small_fields(text, sizes)}
    own = OVERRIDES.get(model_type, {})
    return AutoConfig.for_model(model_type, **{**small, "tie_word_embeddings": False, **own})


def small_tower(default: Any) -> dict[str, Any]:
    """The fields of a config that reads images or sound."""
    own = vars(default)
    values = {name: value for name, value in TOWER.items() if name in own and own[name] is not None}
    inner: dict[str, Any] = {
        name: small_tower(part) for name, part in own.items() if isinstance(part, PreTrainedConfig)
    }
    for name, value in own.items():
        if isinstance(value, list | tuple) and len(value) == own.get("num_hidden_layers"):
            inner[name] = list(value[:1])
    return {"model_type": default.model_type, **values, **inner}


def small_fields(default: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text model's config."""
    fields = {key: value for key, value in default.to_dict().items() if not isinstance(value, dict)}
    values = {k: v for k, v in sizes.items() if k in fields and (fields[k] is not None or k.endswith("_id"))}
    depth = getattr(default, "num_hidden_layers", None)
    for key, value in fields.items():
        if isinstance(value, list | tuple) and len(value) == depth:  # one entry a layer: every kind, in turn
            kinds = list(dict.fromkeys(value))
            values[key] = [kinds[i % len(kinds)] for i in range(NUM_LAYERS)]
    if "kv_lora_rank" in fields:  # latent attention has no grouped heads, and its own head sizes
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    more = OVERRIDES.get(default.model_type, {})
    if sizes is not SMALL:
        changed = {k: v for k, v in sizes.items() if v != SMALL.get(k)}
        more = {k: changed.get(k, v) for k, v in more.items()}
    return {**values, **more, **FIXED.get(default.model_type, {})}


@torch.no_grad()
def make_checkpoints(config: Any, folder: Path) -> dict[str, Path]:
    """Unrelated random models of one config, saved as users' checkpoints are."""
    paths = {}
    for index in range(NUM_VARIANTS):
        model = kind_of(config).auto.from_config(config, dtype=torch.float32).eval()
        randomize(model, seed=index)
        for name, tensor in model.state_dict().items():
            if tensor.ndim and not tensor.is_floating_point():  # tables of ids
                tensor.copy_(torch.randint(0, 8, tensor.shape))
            elif name.endswith(("scale", "scalar")):  # about one, as norms: small ones multiply rounding errors
                tensor.add_(1)
            elif name.endswith("balancing_biases"):
                tensor[-1] = -1  # transformers puts it there whenever it loads a checkpoint
        paths[f"v{index}"] = folder / f"v{index}"
        model.save_pretrained(paths[f"v{index}"])
    return paths


def make_requests(vocab_size: int) -> list[EngineRequest]:
    """Two of one length for each variant, which a step computes together, then some of any length."""
    rng = random.Random(0)
    pairs = [(i // 2, 5, 8) for i in range(2 * NUM_VARIANTS)]
    others = [(rng.randrange(NUM_VARIANTS), rng.choice((1, 2, 5, 12, 19, 30)), rng.randrange(1, 14)) for _ in range(8)]
    return [
        EngineRequest(
            request_id=SequenceId(str(i)),
            variant=variant,
            prompt_token_ids=[rng.randrange(3, vocab_size) for _ in range(length)],
            sampling=SamplingParams(temperature=0, max_tokens=max_tokens),
        )
        for i, (variant, length, max_tokens) in enumerate(pairs + others)
    ]


Answers = tuple[dict[SequenceId, list[int]], list[torch.Tensor]]  # tokens by request, logits of all


def serve(bundle: Path, slots: int, requests: list[EngineRequest]) -> Answers:
    """Greedy tokens of each request from one engine, and all logits of the finished sequences from one mixed pass."""
    config = EngineConfig(
        bundle=str(bundle), device="cpu", dtype="float32", slots=slots, block_size=4, num_kv_blocks=150,
        max_model_len=64, max_num_seqs=8, max_num_batched_tokens=13, num_threads=1,
    )  # fmt: skip
    engine = EngineCore(config)
    tokens: dict[SequenceId, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work():
        for output in engine.step():
            tokens[output.request_id] += output.new_token_ids
    engine.check_integrity()
    sequences = [(r.variant, r.prompt_token_ids + tokens[r.request_id]) for r in requests]
    if slots == NUM_VARIANTS:
        return tokens, engine.prompt_logits(sequences)
    return tokens, [engine.prompt_logits([sequence])[0] for sequence in sequences]


@torch.no_grad()
def reference(paths: dict[str, Path], requests: list[EngineRequest]) -> Answers:
    """The same from each model alone, with transformers' plainest code paths."""
    models = [
        kind_of(AutoConfig.from_pretrained(path))
        .auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        .eval()
        for path in paths.values()
    ]
    tokens: dict[SequenceId, list[int]] = {}
    logits = []
    for request in requests:
        model, prompt = models[request.variant], torch.tensor([request.prompt_token_ids])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.sampling.max_tokens,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        tokens[request.request_id] = out[0, prompt.shape[1] :].tolist()
        logits.append(model(input_ids=out, use_cache=False).logits[0].float())
    return tokens, logits


@torch.no_grad()
def beyond_rounding(
    paths: dict[str, Path], requests: list[EngineRequest], tokens: Mapping[SequenceId, list[int]],
    stock: list[torch.Tensor], served: list[list[torch.Tensor]],
) -> list[SequenceId]:  # fmt: skip
    """Of requests whose logits differ by more than the tolerance, those that are further from float64 than twice what
    stock transformers is in float32: some definitions multiply rounding errors."""
    found: list[SequenceId] = []
    for variant, path in enumerate(paths.values()):
        model = kind_of(AutoConfig.from_pretrained(path)).auto.from_pretrained(
            path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        ).eval()  # fmt: skip
        for i, request in enumerate(requests):
            worst = max(float((logits[i] - stock[i]).abs().max()) for logits in served)
            if request.variant == variant and not worst <= TOLERANCE:
                ids = torch.tensor([request.prompt_token_ids + tokens[request.request_id]])
                exact = model(input_ids=ids, use_cache=False).logits[0]
                allowed = 2 * float((stock[i] - exact).abs().max())
                if not all(float((logits[i] - exact).abs().max()) <= allowed for logits in served):
                    found.append(request.request_id)
    return found


def try_one(name: str, model_type: str) -> Outcome:
    """Raises what the way through polymoe raises, except refusals."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if model_type not in CONFIG_MAPPING_NAMES:
        return Outcome(name, model_type, "refused", "transformers has no config of this type")
    config = small_config(model_type)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        classes = kind_of(config).classes
        if type(config) not in classes or "Diffusion" in classes[type(config)].__name__:
            paths = {"v0": root / "v0"}
            config.save_pretrained(paths["v0"])
            save_file({"weight": torch.zeros(1)}, paths["v0"] / "model.safetensors")  # never gets that far
        else:
            paths = make_checkpoints(config, root)
        try:
            family = Family.open(paths)
            scan = scan_family(family, Console(quiet=True))
            write_bundle(family, scan, separate_plan(scan.expert_same_as), root / "bundle", console=Console(quiet=True))
        except UnsupportedModelError as error:
            return Outcome(name, model_type, "refused", str(error))
        requests = make_requests(config.get_text_config().vocab_size)
        want_tokens, want_logits = reference(paths, requests)
        worst = 0.0
        wrong = 0
        served: list[list[torch.Tensor]] = []
        for slots in (NUM_VARIANTS, 1):
            tokens, logits = serve(root / "bundle", slots, requests)
            served.append(logits)
            wrong += sum(tokens[r.request_id] != want_tokens[r.request_id] for r in requests)
            for request, got, want in zip(requests, logits, want_logits, strict=True):
                if tokens[request.request_id] == want_tokens[request.request_id]:
                    worst = max(worst, float((got - want).abs().max()))
        beyond = (
            [] if wrong or worst <= TOLERANCE else beyond_rounding(paths, requests, want_tokens, want_logits, served)
        )
    if wrong or beyond or not math.isfinite(worst):
        note = f"{wrong} of {2 * len(requests)} sequences have other tokens, logits differ by {worst:.1e}"
        return Outcome(name, model_type, "differs", note, worst)
    return Outcome(name, model_type, "exact", "", worst)


def run_child(name: str, model_type: str, timeout: float) -> Outcome:
    """`try_one` in a process of its own."""
    command = [sys.executable, __file__, "--child", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, model_type, "fails", f"no result after {timeout:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Outcome(**json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return Outcome(name, model_type, "fails", f"exit status {done.returncode}: {last}")


def child(name: str) -> None:
    model_type = architectures()[name]
    try:
        outcome = try_one(name, model_type)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(name, model_type, "fails", f"{type(error).__name__}: {str(error).strip().splitlines()[0:1]}")
    print(json.dumps(asdict(outcome)))


def short_note(outcome: Outcome) -> str:
    """The reason of a refusal, without what only says that this is a tiny model."""
    if outcome.result == "exact":
        return f"logits within {outcome.error:.0e}"
    note = re.sub(r"^.*?cannot be served: ", "", outcome.note).partition(". ")[0].rstrip(".")
    note = re.sub(r"^\d+ of its \d+ layers are (.*) layers, whose", r"it has \1 layers, whose", note)
    return re.sub(r"^\S+ is an? (\w+), a state-space.*layer, whose", r"it has \1 layers, whose", note)


def show(outcomes: list[Outcome], markdown: bool) -> None:
    counts = {result: sum(o.result == result for o in outcomes) for result in COLOURS}
    summary = ", ".join(f"{count} {result}" for result, count in counts.items() if count)
    if markdown:
        print("| architecture | model_type | result | note |\n|---|---|---|---|")
        for o in sorted(outcomes, key=lambda o: (list(COLOURS).index(o.result), o.name)):
            print(f"| {o.name} | `{o.model_type}` | {o.result} | {short_note(o).replace('|', '/')} |")
        print(f"\n{summary}; transformers {transformers.__version__}")
        return
    table = Table(
        "architecture", "model_type", "result", "note", title=f"transformers {transformers.__version__}: {summary}"
    )
    for o in outcomes:
        table.add_row(o.name, o.model_type, Text(o.result, style=COLOURS[o.result]), short_note(o))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="try this one (repeatable), with tracebacks")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one architecture")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    known = architectures()
    if unknown := set(args.only or ()) - set(known):
        parser.error(f"no such architecture: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    names = args.only or list(known)
    with Progress(console=Console(stderr=True), transient=True) as progress, ThreadPoolExecutor(args.jobs) as pool:
        task = progress.add_task("Trying architectures", total=len(names))
        futures = [pool.submit(run_child, name, known[name], args.timeout) for name in names]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        outcomes = [future.result() for future in futures]
    show(outcomes, args.markdown)
    return int(any(o.result in ("differs", "fails") for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
