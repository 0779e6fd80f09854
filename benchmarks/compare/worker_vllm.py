"""One vLLM process of the comparison; runs in an environment of its own. See `worker_protocol.py`."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process: one process, one result

from worker_protocol import Load, serve


def load(models: list[str], options: dict[str, int]) -> Load:
    """One model behind vLLM's offline class, which batches continuously."""
    from vllm import LLM, SamplingParams

    engine = LLM(models[0], skip_tokenizer_init=True, dtype="bfloat16", max_model_len=options["max_model_len"],
                 max_num_seqs=options["max_num_seqs"], enable_prefix_caching=False, disable_log_stats=True)  # fmt: skip

    def run(prompts: list[tuple[int, list[int]]], output_tokens: int) -> int:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        batch = [{"prompt_token_ids": ids} for _, ids in prompts]
        outputs = engine.generate(batch, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


if __name__ == "__main__":
    sys.exit(serve(load))
