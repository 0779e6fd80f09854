"""transformers' `generate` in batches, one model after the other; runs in polymoe's environment. See
`worker_protocol.py`."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from worker_protocol import Load, serve


def load(models: list[str], _options: dict[str, int]) -> Load:
    """All models in memory; a run takes the prompts of each in one batch, all of the same length."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval() for path in models]

    def run(prompts: list[tuple[int, list[int]]], output_tokens: int) -> int:
        made = 0
        for index in dict.fromkeys(model for model, _ in prompts):
            batch = torch.tensor([ids for model, ids in prompts if model == index])
            with torch.inference_mode():
                output = loaded[index].generate(
                    batch, attention_mask=torch.ones_like(batch), do_sample=False, eos_token_id=None, pad_token_id=0,
                    min_new_tokens=output_tokens, max_new_tokens=output_tokens,
                )  # fmt: skip
            made += output[:, batch.shape[1] :].numel()
        return made

    return run


if __name__ == "__main__":
    sys.exit(serve(load))
