"""What stock transformers says: each variant alone, loaded by transformers itself from its own checkpoint."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, CompressedTensorsConfig

from families import WITH_STATES, make_family
from hub_layouts import as_on_the_hub
from polymoe.engine.core import EngineCore
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.plan import separate_plan
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle


@dataclass(frozen=True)
class Case:
    """One greedy request and its reference: tokens, and the logits `[max_tokens, vocabulary]` they were drawn from."""

    variant: str
    prompt: list[int]
    max_tokens: int
    tokens: list[int]
    logits: torch.Tensor


class ReferenceFamily:
    """A tiny family of one architecture, its lossless bundle, and reference answers."""

    def __init__(self, arch: str, folder: Path, num_requests: int = 10, **options: Any) -> None:
        self.arch, self.folder = arch, folder
        self.paths = make_family(arch, folder / "checkpoints", num_variants=3, **options)
        for path in self.paths.values():
            as_on_the_hub(arch, path)
        self.bundle = self.write(folder / "bundle")
        self.num_requests = num_requests

    def write(self, out: Path, capacity: int | None = None) -> Path:
        """A lossless bundle; `capacity` experts resident, the rest absent."""
        family = Family.open(self.paths)
        scan = scan_family(family)
        return write_bundle(family, scan, separate_plan(scan.expert_same_as, capacity), out).path

    @property
    def is_encoder_decoder(self) -> bool:
        return self.arch == "switch_transformers"

    @property
    def reuses_prefixes(self) -> bool:
        return self.arch not in WITH_STATES

    @cached_property
    def models(self) -> dict[str, Any]:
        return self.load_models()

    def load_models(self) -> dict[str, Any]:
        """Variant -> its stock model; others give it other weights."""
        auto = AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM
        return {
            name: auto.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager", **dequantised(path)
            ).eval()
            for name, path in self.paths.items()
        }

    @cached_property
    def cases(self) -> list[Case]:
        """Random variants, prompt lengths and output lengths; two prompts share a prefix within and across variants."""
        return [self.case(*request) for request in self._requests()]

    def forced_cases(self) -> list[Case]:
        """The same requests with answers that are given, not drawn: what one pass of the stock models says of them."""
        rng, cases = random.Random(self.arch), []
        for variant, prompt, count in self._requests():
            model = self.models[variant]
            tokens = [rng.randrange(model.config.vocab_size) for _ in range(count)]
            with torch.no_grad():
                if self.is_encoder_decoder:
                    decoded = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])
                    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoded).logits[0]
                else:
                    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            cases.append(Case(variant, prompt, count, tokens, logits.float()))
        return cases

    def _requests(self) -> Iterator[tuple[str, list[int], int]]:
        """(variant, prompt, tokens to generate). The last two are of one variant and length, which a step may
        compute in one call where others are calls of their own."""
        rng = random.Random(self.arch)
        names = list(self.paths)
        vocab = next(iter(self.models.values())).config.vocab_size
        shared = [rng.randrange(vocab) for _ in range(13)]
        variant, prompt, count = names[0], shared, 1
        for i in range(self.num_requests):
            if i == self.num_requests - 1:
                yield variant, [rng.randrange(vocab) for _ in prompt], count
                return
            prompt = [rng.randrange(vocab) for _ in range(rng.randrange(1, 25))]
            if i % 2 == 0:
                prompt = shared + prompt[:5]
            variant, count = names[i % 3] if i < 6 else rng.choice(names), rng.randrange(1, 14)
            yield variant, prompt, count

    def case(self, variant: str, prompt: list[int], max_tokens: int) -> Case:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            output = self.models[variant].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, eos_token_id=None,
                pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        logits = torch.cat(output.logits).float()
        start = 1 if self.is_encoder_decoder else len(prompt)
        return Case(variant, prompt, max_tokens, output.sequences[0, start:].tolist(), logits)


def dequantised(path: Path) -> dict[str, Any]:
    """What `from_pretrained` has to be told where it would not dequantise by itself."""
    found = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    if found.get("quant_method") != "compressed-tensors":
        return {}
    return {"quantization_config": CompressedTensorsConfig(**found, dequantize=True)}


def served_logits(engine: EngineCore, cases: list[Case]) -> list[torch.Tensor]:
    """The served model's logits for each case's generated tokens, all cases in one mixed pass."""
    index = {v.name: i for i, v in enumerate(engine.info.variants)}
    start = engine.info.variants[0].decoder_start_token_id
    if start is not None:
        pairs = [(index[c.variant], [*c.prompt, start, *c.tokens[:-1]]) for c in cases]
        return engine.prompt_logits(pairs, [len(c.prompt) for c in cases])
    prompts = [(index[c.variant], c.prompt + c.tokens[:-1]) for c in cases]
    return [out[len(c.prompt) - 1 :] for c, out in zip(cases, engine.prompt_logits(prompts), strict=True)]
