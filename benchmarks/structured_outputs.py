"""Tokens a second of requests that follow a JSON schema against those of free ones, on the demo family.

    python benchmarks/structured_outputs.py [--requests 32] [--tokens 128] [--rounds 4]

Both have the same prompts, numbers of tokens and variants; rounds alternate, so that a slower moment of the machine
hits both. Ends with one line of JSON.
"""

import argparse
import json
import time
from statistics import median

from polymoe import LLM, SamplingParams, StructuredOutputsParams
from polymoe.demo import family_paths

# Long enough that no answer ends before its last token.
SCHEMA = {
    "type": "array",
    "minItems": 500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["a", "b", "c"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
}


def rate(llm: LLM, sampling: SamplingParams, requests: int) -> float:
    """Tokens a second."""
    names = [llm.variants[i % len(llm.variants)] for i in range(requests)]
    prompts = [f"Question {i}: what is there to say?\nAnswer:" for i in range(requests)]
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, names, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = [len(output.outputs[0].token_ids) for output in outputs]
    assert set(tokens) == {sampling.max_tokens}, "an answer ended early"
    return sum(tokens) / seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("requests", 32), ("tokens", 128), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    free = SamplingParams(temperature=0.8, seed=1, max_tokens=arguments.tokens, ignore_eos=True)
    structured = SamplingParams(
        temperature=0.8, seed=1, max_tokens=arguments.tokens, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    rates: dict[str, list[float]] = {"free": [], "structured": []}
    with LLM({name: str(path) for name, path in family_paths().items()}) as llm:
        for sampling in (free, structured):  # kernels, caches, the grammar
            rate(llm, sampling, arguments.requests)
        for round_ in range(arguments.rounds):
            pairs = [("free", free), ("structured", structured)]
            for name, sampling in pairs if round_ % 2 == 0 else pairs[::-1]:
                rates[name].append(rate(llm, sampling, arguments.requests))
    for name, found in rates.items():
        print(f"{name:10s} {median(found):8.0f} tokens/s  (" + ", ".join(f"{rate:.0f}" for rate in found) + ")")
    ratio = median(rates["structured"]) / median(rates["free"])
    print(json.dumps({"benchmark": "structured_outputs", "ratio": round(ratio, 3), **arguments.__dict__}))


if __name__ == "__main__":
    main()
