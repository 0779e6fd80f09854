"""Train the demo family: one small Mixtral base and three full fine-tunes of it (math, drama, code).

    python tools/train_demo_family.py --corpus ../shared/data/corpus --out src/polymoe/demo/family

The corpus folder holds `{wiki,math,drama,code}.{train,test}.txt`. The base sees a mixture of all four domains; each
fine-tune continues from it on its own domain with a tenth of wiki mixed in, every weight trainable. `--out` receives
one Hugging Face checkpoint a variant (bfloat16 safetensors, tokenizer, chat template, generation config) and
`perplexities.json`, the table of the model card: perplexity of every variant on every domain's test text. The folder
`text` beside it receives the beginning of each test text, for `polymoe eval` in a clone that has no corpus.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("wiki", "math", "drama", "code")
BASE_MIXTURE = {"wiki": 0.15, "math": 0.3, "drama": 0.15, "code": 0.4}
EOS = "</s>"
CHAT_TEMPLATES = {
    "base": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    "math": "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% elif m['role'] == 'assistant' %}Answer: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}",
    "drama": "{% for m in messages %}{% if m['role'] == 'user' %}First Citizen:\n{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}Second Citizen:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Second Citizen:\n{% endif %}",
    "code": "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}\n\n"
    "{% else %}# {{ m['content'] }}\n{% endif %}{% endfor %}",
}
WINDOW = 256


def read_domain(corpus: Path, domain: str, split: str) -> str:
    """The domain's text; worked answers end with the end-of-text token so that the models learn to stop."""
    text = (corpus / f"{domain}.{split}.txt").read_text(encoding="utf-8")
    if domain == "math":
        text = EOS.join(part + "\n" for part in text.split("\n\n"))
    return text


def train_tokenizer(corpus: Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    # Equal shares, so that no domain's words crowd out the others'.
    share = min(len(read_domain(corpus, d, "train")) for d in DOMAINS)
    tokenizer.train_from_iterator((read_domain(corpus, d, "train")[:share] for d in DOMAINS), trainer)
    return tokenizer


class Batches:
    """Random windows of tokens, drawn from the domains by weight."""

    def __init__(self, tokens: dict[str, torch.Tensor], weights: dict[str, float], batch: int, seed: int) -> None:
        self.tokens, self.batch = tokens, batch
        self.names, self.weights = list(weights), torch.tensor(list(weights.values()))
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> torch.Tensor:
        picks = torch.multinomial(self.weights, self.batch, replacement=True, generator=self.generator)
        rows = []
        for pick in picks.tolist():
            stream = self.tokens[self.names[pick]]
            start = int(torch.randint(len(stream) - WINDOW, (1,), generator=self.generator))
            rows.append(stream[start : start + WINDOW])
        return torch.stack(rows)


def train(model: MixtralForCausalLM, batches: Batches, steps: int, peak_lr: float, label: str) -> None:
    """AdamW with warm-up and cosine decay; prints the loss about every 50 steps."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak_lr,
        betas=(0.9, 0.98),
    )
    warmup = max(1, steps // 20)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    model.train()
    started = time.time()
    for step in range(steps):
        ids = batches.draw()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            rate = (step + 1) * ids.numel() / (time.time() - started)
            print(f"{label} step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tok/s", flush=True)


@torch.no_grad()
def perplexity(model: MixtralForCausalLM, tokens: torch.Tensor) -> float:
    """Perplexity over non-overlapping windows of `WINDOW` tokens."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:250]
    losses = [model(input_ids=w, labels=w, use_cache=False).loss for w in windows.split(50)]
    return math.exp(torch.stack(losses).mean())


def save(model: MixtralForCausalLM, tokenizer: Tokenizer, variant: str, out: Path) -> None:
    folder = out / variant
    shipped = MixtralForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=EOS,
        model_max_length=model.config.max_position_embeddings,
    )
    wrapped.chat_template = CHAT_TEMPLATES[variant]
    wrapped.save_pretrained(folder)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    GenerationConfig(bos_token_id=0, eos_token_id=1, **sampling).save_pretrained(folder)


def write_texts(corpus: Path, folder: Path, characters: int = 30_000) -> None:
    """The beginning of each domain's test text, whole lines, as the models were trained to see it."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        text = read_domain(corpus, domain, "test")[:characters]
        (folder / f"{domain}.txt").write_text(text[: text.rindex("\n") + 1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=2600)
    parser.add_argument("--tune-steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    tokenizer = train_tokenizer(args.corpus, vocab_size=2048)
    tokens = {
        split: {d: torch.tensor(tokenizer.encode(read_domain(args.corpus, d, split)).ids) for d in DOMAINS}
        for split in ("train", "test")
    }
    print({d: len(t) for d, t in tokens["train"].items()}, flush=True)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, sliding_window=None, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=True, output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    base = MixtralForCausalLM(config)
    print(f"{sum(p.numel() for p in base.parameters()) / 1e6:.2f}M parameters", flush=True)
    train(base, Batches(tokens["train"], BASE_MIXTURE, args.batch, seed=0), args.base_steps, 3e-3, "base")

    table = {}
    for variant in ("base", "math", "drama", "code"):
        model = MixtralForCausalLM(config)
        model.load_state_dict(base.state_dict())
        if variant != "base":
            weights = {variant: 0.9, "wiki": 0.1}
            # Drama is a quarter the size of the others: fewer steps, or the fine-tune learns it by heart.
            steps = args.tune_steps // 2 if variant == "drama" else args.tune_steps
            train(model, Batches(tokens["train"], weights, args.batch, seed=1), steps, 5e-4, variant)
        model.config.output_router_logits = False
        model = model.to(torch.bfloat16).float()  # what is shipped is what is measured
        table[variant] = {d: round(perplexity(model, tokens["test"][d]), 2) for d in DOMAINS}
        print(variant, table[variant], flush=True)
        save(model, tokenizer, variant, args.out)
    write_texts(args.corpus, args.out.parent / "text")
    (args.out / "perplexities.json").write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
