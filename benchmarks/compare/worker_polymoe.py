"""polymoe's offline class, all variants in one batch; runs in polymoe's environment. See `worker_protocol.py`."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from worker_protocol import Load, serve


def load(models: list[str], options: dict[str, int]) -> Load:
    """One bundle; a model's index is its variant's."""
    from polymoe import LLM, SamplingParams

    llm = LLM(models[0], device="cpu", dtype="bfloat16", enable_prefix_caching=False, **options)  # type: ignore[arg-type]

    def run(prompts: list[tuple[int, list[int]]], output_tokens: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        variants = [llm.variants[index] for index, _ in prompts]
        outputs = llm.generate([ids for _, ids in prompts], params, variants)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


if __name__ == "__main__":
    sys.exit(serve(load))
