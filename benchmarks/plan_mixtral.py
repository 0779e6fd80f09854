"""How long and in how much memory `polymoe plan` plans a family of two with the shape of Mixtral-8x7B.

    python benchmarks/plan_mixtral.py --layers 1 --threads 4

Makes a checkpoint of the first layers with random weights, tensor by tensor, plans it for real (policy auto, weights
only) in a process of its own, and extrapolates to 32 layers: the start of the process (measured with a tiny family) and
what the family has outside of its layers are counted once, the rest is proportional. The last line is one JSON object.

Peak memory is the process's own (RssAnon); pages of checkpoint files that are mapped, which the system takes back
whenever it needs them, are listed beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import MixtralConfig

from polymoe.bundle.tensor_file import TensorFileWriter

LAYERS = 32
NOISE = 0.02  # of a weight's spread: about what real fine-tunes differ by
GIB = 1 << 30


def shapes(config: MixtralConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape, as Mixtral's own checkpoints have them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    found = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
    }
    for layer in range(config.num_hidden_layers):
        root = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            found[f"{root}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{root}.{norm}.weight"] = (hidden,)
        found[f"{root}.block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                found[f"{root}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return found


def make_family(folder: Path, config: MixtralConfig, num_variants: int = 2) -> dict[str, Path]:
    """Checkpoints that differ by `NOISE`; one tensor of each is in memory."""
    paths = {f"v{i}": folder / f"v{i}" for i in range(num_variants)}
    declared = {name: (torch.bfloat16, shape) for name, shape in shapes(config).items()}
    writers = []
    for path in paths.values():
        config.save_pretrained(path)
        writers.append(TensorFileWriter(path / "model.safetensors", declared))
    generator = torch.Generator().manual_seed(0)
    for name in writers[0].names:
        shape = declared[name][1]
        base = torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5 if len(shape) > 1 else 1)
        spread = float(base.std()) if base.numel() > 1 else 0.0
        for writer in writers:
            noise = torch.randn(shape, generator=generator).mul_(NOISE * spread)
            writer.append(name, noise.add_(base).to(torch.bfloat16))
    for writer in writers:
        writer.close()
    return paths


def watched(command: list[str], environment: dict[str, str]) -> tuple[float, int, int]:
    """(seconds, most anonymous bytes, most bytes of mapped files) of a process that must succeed."""
    started, most = time.monotonic(), {"RssAnon": 0, "RssFile": 0}
    process = subprocess.Popen(command, env={**os.environ, **environment})
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        time.sleep(0.05)
        for line in status.read_text().splitlines() if status.exists() else ():
            key, _, value = line.partition(":")
            if key in most:
                most[key] = max(most[key], int(value.split()[0]) << 10)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return time.monotonic() - started, most["RssAnon"], most["RssFile"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1, help="layers that are planned for real")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", default="1.0x", help="the plan's budget")
    parser.add_argument("--folder", type=Path, help="where 14 GB a layer are free; default the system's for files")
    parser.add_argument("--hidden", type=int, default=4096, help="smaller: to try the script")
    options = parser.parse_args()

    def config_of(hidden: int) -> MixtralConfig:
        return MixtralConfig(num_hidden_layers=options.layers, hidden_size=hidden, intermediate_size=hidden * 7 // 2)

    def planned(folder: Path, hidden: int) -> tuple[float, int, int]:
        paths = make_family(folder, config_of(hidden))
        specs = [f"{name}={path}" for name, path in paths.items()]
        plan = [sys.executable, "-m", "polymoe", "plan", *specs, "--memory", options.memory, "--out", str(folder / "b")]
        return watched(plan, {"OMP_NUM_THREADS": str(options.threads)})

    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        start, _, _ = planned(Path(scratch), 64)  # the interpreter, imports, the table at the end
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder, config = Path(scratch), config_of(options.hidden)
        seconds, own, mapped = planned(folder, options.hidden)
        sizes = json.loads((folder / "b" / "manifest.json").read_text())["resident_bytes"]
    outside = sum(torch.Size(shape).numel() for name, shape in shapes(config).items() if ".layers." not in name)
    inside = sum(torch.Size(shape).numel() for name, shape in shapes(config).items() if ".layers." in name)
    # Hashing and writing what is outside of the layers takes about what it takes inside, a byte.
    layer = (seconds - start) * inside / (inside + outside) / options.layers
    total = layer * LAYERS + seconds - layer * options.layers
    print(f"{options.layers} of {LAYERS} layers planned in {seconds:.0f} s with {options.threads} threads,")
    print(f"of which {start:.0f} s to start;")
    print(f"peak memory {own / GIB:.2f} GiB of its own, {mapped / GIB:.2f} GiB of mapped files;")
    print(f"{LAYERS} layers: {total / 60:.1f} minutes at {layer:.1f} s a layer.")
    result = {"benchmark": "plan_mixtral", "layers": options.layers, "threads": options.threads, "seconds": seconds,
              "seconds_to_start": start,
              "seconds_32_layers": total, "peak_own_bytes": own, "peak_mapped_bytes": mapped,
              "memory": options.memory, "resident_bytes": sizes}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
