"""Fine-tune a small checkpoint gently, several times: a family as close together as real fine-tunes are.

    python tools/make_gentle_family.py --base BASE --out FAMILY math=math.train.txt code=code.train.txt \
        mixed=math.train.txt+code.train.txt

Every variant trains all weights on its own text (files joined by `+` are drawn from in equal shares) until its experts
have moved so far that two such variants are `--distance` apart, relative to the norm of the weights. `--out` receives
one bfloat16 checkpoint a variant and a copy of the base; variants that are there already are kept, so that an
interrupted run goes on. The last line is one JSON object: steps, losses and distances.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polymoe.offline.checkpoint.source import side_files

WINDOW = 256
CHECK_EVERY = 5  # steps between two looks at the distance


def experts_of(model: Any) -> list[torch.Tensor]:
    """All stacks of routed experts."""
    return [p for name, p in model.named_parameters() if ".experts." in name and p.ndim >= 3]


def distance(experts: list[torch.Tensor], start: list[torch.Tensor]) -> float:
    """‖W − W₀‖ / ‖W₀‖ over all experts together."""
    moved = sum(float((a.detach() - b).square().sum()) for a, b in zip(experts, start, strict=True))
    return math.sqrt(moved / sum(float(b.square().sum()) for b in start))


def draw(streams: list[torch.Tensor], batch: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [batch, WINDOW]: random windows, each stream as often as the others."""
    rows = []
    for i in range(batch):
        stream = streams[i % len(streams)]
        start = int(torch.randint(len(stream) - WINDOW, (1,), generator=generator))
        rows.append(stream[start : start + WINDOW])
    return torch.stack(rows)


def fine_tune(
    model: Any, streams: list[torch.Tensor], target: float, lr: float, batch: int, seed: int, label: str
) -> dict[str, float]:
    """AdamW at a constant small rate until the experts are `target` from where they were."""
    experts = experts_of(model)
    start = [p.detach().clone() for p in experts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    began, moved, step, losses = time.time(), 0.0, 0, []
    while moved < target:
        ids = draw(streams, batch, generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        step += 1
        if step % CHECK_EVERY == 0:
            moved = distance(experts, start)
            print(
                f"{label} step {step} loss {losses[-1]:.3f} moved {moved:.4f} {time.time() - began:.0f} s", flush=True
            )
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return {"steps": step, "loss_first": first, "loss_last": last, "from_base": moved}


def save(model: Any, base: Path, folder: Path) -> None:
    """bfloat16 weights, with the base's tokenizer and generation config; the folder appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    for file in side_files(base):
        if not (partial / file).exists():
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / file, partial / file)
    partial.rename(folder)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)


def pair_distances(folders: dict[str, Path]) -> dict[str, float]:
    """ "a–b" -> ‖W_a − W_b‖ / ‖W_a‖ of the saved experts."""
    experts = {name: [p.detach() for p in experts_of(load(path))] for name, path in folders.items()}
    names = list(experts)
    return {f"{a}–{b}": distance(experts[b], experts[a]) for i, a in enumerate(names) for b in names[i + 1 :]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME=FILE[+FILE…]")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--distance", type=float, default=0.033, help="between two variants, relative")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {WINDOW} tokens a step")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base, local_files_only=True)
    args.out.mkdir(parents=True, exist_ok=True)
    folders = {"base": args.out / "base"}
    if not folders["base"].exists():
        shutil.copytree(args.base, folders["base"])
    runs = {}
    for seed, spec in enumerate(args.variants):
        name, _, files = spec.partition("=")
        folders[name] = args.out / name
        if folders[name].exists():
            continue
        texts = [Path(file).read_text(encoding="utf-8") for file in files.split("+")]
        streams = [torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        model = load(args.base)
        # Variants go their ways in nearly orthogonal directions: two that moved d are about √2 d apart.
        runs[name] = fine_tune(model, streams, args.distance / math.sqrt(2), args.lr, args.batch, seed, name)
        save(model, args.base, folders[name])
    pairs = pair_distances(folders)
    print(json.dumps({"runs": runs, "distances": pairs, "mean_distance": sum(pairs.values()) / len(pairs)}))


if __name__ == "__main__":
    main()
