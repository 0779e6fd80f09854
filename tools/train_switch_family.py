"""Train a small Switch Transformers family: one multi-task base and three full fine-tunes (math, code, drama).

    python tools/train_switch_family.py --corpus ../shared/data/corpus --out FOLDER

The corpus folder holds `{wiki,math,drama,code}.{train,test}.txt`. `switch_tasks.py` says what each task is. The base
learns to fill spans left out of all four texts and a little of every task; each fine-tune continues from it on its own
task, every weight trainable. `--out` receives one Hugging Face checkpoint a variant (bfloat16 safetensors, tokenizer),
`data/<variant>.{train,test}.jsonl`, `rouge.json` (ROUGE-1 of every variant on every task) and a model card. Variants
that are there already are kept, so that an interrupted run goes on. About 45 minutes on one core.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from switch_tasks import MARKERS, TASKS, TEXTS, Pair, make_pairs, read, write_jsonl

PAD, EOS = 0, 1
VOCAB = 2048
MAX_INPUT, MAX_TARGET = 128, 64
OWN_TASK = {"base": "fill", "math": "math", "code": "code", "drama": "drama"}
BASE_MIXTURE = {"fill": 0.4, "math": 0.25, "code": 0.15, "drama": 0.2}


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a number is its digits, so that any number can be copied. Ends every text like T5's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKERS),
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(len(read(corpus, text, "train")) for text in TEXTS)
    tokenizer.train_from_iterator((read(corpus, text, "train")[:share] for text in TEXTS), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=MAX_INPUT
    )


def make_config() -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=128, d_kv=32, d_ff=384, num_heads=4, num_layers=4, num_decoder_layers=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=8, expert_capacity=64,
        router_jitter_noise=0.0, router_aux_loss_coef=0.01, n_positions=MAX_INPUT, pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=PAD, dropout_rate=0.0,
    )  # fmt: skip


def encode_pairs(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """Token ids of input and target. Inputs are cut to what the model reads, its last token the end-of-text."""
    sources = tokenizer([source for source, _ in pairs], truncation=True, max_length=MAX_INPUT).input_ids
    return list(zip(sources, tokenizer([target for _, target in pairs]).input_ids, strict=True))


def fitting(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair], split: str) -> list[Pair]:
    """Those whose target the model can write and, where they are not cut, whose input it can read."""
    sources, targets = (tokenizer([pair[side] for pair in pairs], verbose=False).input_ids for side in (0, 1))
    return [
        pair
        for pair, source, target in zip(pairs, sources, targets, strict=True)
        if len(target) <= MAX_TARGET and (split == "train" or len(source) <= MAX_INPUT)
    ]


def pad(rows: list[list[int]], value: int) -> Tensor:
    """int64 [B, longest]"""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class Batches:
    """Pairs drawn from the tasks by weight, those of similar length together."""

    def __init__(
        self, pairs: dict[str, list[tuple[list[int], list[int]]]], weights: dict[str, float], batch: int, seed: int
    ) -> None:
        self.pairs, self.weights, self.batch = pairs, weights, batch
        self.generator = torch.Generator().manual_seed(seed)

    def _pool(self, batches: int = 16) -> list[tuple[list[int], list[int]]]:
        names, weights = list(self.weights), torch.tensor(list(self.weights.values()))
        picks = torch.multinomial(weights, batches * self.batch, replacement=True, generator=self.generator)
        tasks = [self.pairs[names[pick]] for pick in picks.tolist()]
        return [task[int(torch.randint(len(task), (1,), generator=self.generator))] for task in tasks]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(input ids, attention mask, labels), for ever."""
        while True:
            pool = sorted(self._pool(), key=lambda pair: len(pair[0]) + 2 * len(pair[1]))
            for start in (torch.randperm(16, generator=self.generator) * self.batch).tolist():
                sources, targets = zip(*pool[start : start + self.batch], strict=True)
                ids = pad(list(sources), PAD)
                yield ids, (ids != PAD).long(), pad(list(targets), -100)


def train(
    model: SwitchTransformersForConditionalGeneration, batches: Batches, steps: int, rate: float, label: str
) -> None:
    """AdamW with warm-up and cosine decay; each tensor's learning rate is `rate` times the RMS it begins with, as T5's
    initialisation of very different scales needs (Adafactor's relative step; nanoT5, 2309.02373)."""
    groups = [{"params": [p], "lr": rate * max(1e-3, p.detach().square().mean().sqrt().item())}
              for p in model.parameters()]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    bar = tqdm(zip(range(steps), batches, strict=False), total=steps, desc=label, mininterval=5, ascii=True)
    smooth = 0.0
    for step, (ids, mask, labels) in bar:
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = out.loss.item() if step == 0 else 0.98 * smooth + 0.02 * out.loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)


@torch.inference_mode()
def routing_spread(model: SwitchTransformersForConditionalGeneration, batches: Batches) -> dict[str, list[float]]:
    """Sparse layer -> share of the tokens that each expert was chosen for, over one batch."""
    model.eval()
    ids, mask, labels = next(iter(batches))
    out = model(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True)
    shares = {}
    for side, routed, real in (
        ("encoder", out.encoder_router_logits, mask.bool()),
        ("decoder", out.decoder_router_logits, labels != -100),
    ):
        for i, logits in enumerate(routed):
            counts = logits.argmax(dim=-1)[real].bincount(minlength=logits.shape[-1])
            shares[f"{side} {i}"] = [round(x, 2) for x in (counts / counts.sum()).tolist()]
    return shares


@torch.inference_mode()
def rouge1(
    model: SwitchTransformersForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]
) -> float:
    """Mean ROUGE-1 F of greedy answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, total = RougeScorer(["rouge1"]), 0.0
    model.eval()
    for start in range(0, len(pairs), 50):
        sources, targets = zip(*pairs[start : start + 50], strict=True)
        batch = tokenizer(list(sources), truncation=True, max_length=MAX_INPUT, padding=True, return_tensors="pt")
        written = model.generate(**batch, max_new_tokens=MAX_TARGET, do_sample=False, num_beams=1)
        for text, target in zip(tokenizer.batch_decode(written, skip_special_tokens=True), targets, strict=True):
            total += scorer.score(target, text)["rouge1"].fmeasure
    return total / len(pairs)


def save(model: SwitchTransformersForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """bfloat16; the folder appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(partial)
    GenerationConfig(
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, max_new_tokens=MAX_TARGET
    ).save_pretrained(partial)
    partial.rename(folder)


def load(folder: Path, dropout: float = 0.0) -> SwitchTransformersForConditionalGeneration:
    return SwitchTransformersForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, dropout_rate=dropout
    )


def model_card(table: dict[str, dict[str, float]], spread: dict[str, dict[str, list[float]]]) -> str:
    rows = [f"| {variant} | {' | '.join(f'{table[variant][t]:.3f}' for t in TASKS)} |" for variant in table]
    shares = [f"| {variant}, {layer} | {' '.join(f'{x:.2f}' for x in s)} |"
              for variant, layers in spread.items() for layer, s in layers.items()]  # fmt: skip
    return "\n".join([
        "# A small Switch Transformers family", "",
        "Encoder–decoder, 4 + 4 layers, every other one sparse with 8 experts, `d_model` 128; trained by polymoe's "
        "`tools/train_switch_family.py` on one core, to test and to measure. It knows nothing of use.", "",
        "Trained on WikiText-2 (CC BY-SA 3.0), GSM8K (MIT), tiny Shakespeare (public domain) and Python's standard "
        "library (PSF).", "", "ROUGE-1 on held-out pairs of each task, greedy:", "",
        f"| variant | {' | '.join(TASKS)} |", f"|---|{'---|' * len(TASKS)}", *rows, "",
        "Share of the tokens for each expert:", "", "| variant, sparse layer | experts 0 … 7 |", "|---|---|", *shares,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=2200)
    parser.add_argument("--tune-steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32, help="pairs a step")
    parser.add_argument("--rate", type=float, default=2e-2, help="learning rate of the base, relative to the weights")
    parser.add_argument("--tune-rate", type=float, default=8e-3, help="of the fine-tunes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    base = args.out / "base"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base) if base.exists() else train_tokenizer(args.corpus)
    pairs = {
        split: {t: fitting(tokenizer, make_pairs(args.corpus, t, split), split) for t in TASKS}
        for split in ("train", "test")
    }
    encoded = {task: encode_pairs(tokenizer, found) for task, found in pairs["train"].items()}
    print({split: {task: len(found) for task, found in pairs[split].items()} for split in pairs}, flush=True)
    for variant, task in OWN_TASK.items():
        for split in pairs:
            write_jsonl(pairs[split][task], args.out / "data" / f"{variant}.{split}.jsonl")

    for number, (variant, task) in enumerate(OWN_TASK.items()):
        folder = args.out / variant
        if folder.exists():
            continue
        if variant == "base":
            model = SwitchTransformersForConditionalGeneration(
                make_config()
            )  # without dropout: it never sees a pair often
            print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
            for name, parameter in model.named_parameters():
                if name.endswith("router.classifier.weight"):
                    parameter.data.mul_(0.1)  # or one expert takes all before any has learnt something
            batches = Batches(encoded, BASE_MIXTURE, args.batch, seed=0)
            train(model, batches, args.base_steps, args.rate, variant)
        else:
            model = load(base, dropout=0.1)
            batches = Batches(encoded, {task: 1.0}, args.batch, seed=number)
            train(model, batches, args.tune_steps, args.tune_rate, variant)
        save(model, tokenizer, folder)

    table, spread = {}, {}
    for variant, task in OWN_TASK.items():
        model = load(args.out / variant)
        table[variant] = {t: round(rouge1(model, tokenizer, pairs["test"][t][:200]), 4) for t in TASKS}
        spread[variant] = routing_spread(model, Batches(encoded, {task: 1.0}, 64, seed=9))
        print(variant, table[variant], spread[variant], flush=True)
    (args.out / "README.md").write_text(model_card(table, spread), encoding="utf-8")
    (args.out / "rouge.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
