"""Schemas that others wrote to test validators and grammars: whatever is written for them holds."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from polymoe import LLM, SamplingParams, StructuredOutputsParams
from servers import make_bundle

SCHEMAS = [json.loads(line) for line in (Path(__file__).parent / "json_schemas/schemas.jsonl").read_text().splitlines()]
# What ends a value, so that a random model comes to an end; the more the nearer.
ENDS = {'"': 7.0, "}": 9.0, "]": 9.0}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    bundle = make_bundle(tmp_path_factory.mktemp("schemas"), all_bytes=True)
    with LLM(str(bundle), device="cpu", num_threads=1, kv_cache_bytes=1 << 24) as llm:
        yield llm


@pytest.mark.slow
def test_every_answer_follows_its_schema(llm: LLM) -> None:
    """Two variants and draws of high temperature; what is cut off is no answer, and nearly all come to an end."""
    assert len(SCHEMAS) >= 300
    tokenizer = llm.processor.tokenizer("base")
    assert tokenizer is not None
    bias: dict[int, float] = {}
    for text, value in ENDS.items():
        (token,) = tokenizer.encode(text, add_special_tokens=False)
        bias[token] = value
    sampling = [
        SamplingParams(
            temperature=1.5, seed=seed, max_tokens=160, logit_bias=bias,
            structured_outputs=StructuredOutputsParams(json=entry["schema"], disable_any_whitespace=True),
        )
        for seed, entry in enumerate(SCHEMAS)
    ]  # fmt: skip
    variants = ["base" if seed % 2 else "v1" for seed in range(len(SCHEMAS))]
    outputs = llm.generate(["the fox"] * len(SCHEMAS), sampling, variants, use_tqdm=False)
    ended, wrong = 0, []
    for entry, output in zip(SCHEMAS, outputs, strict=True):
        answer = output.outputs[0]
        if answer.finish_reason != "stop":
            assert answer.finish_reason == "length", entry
            continue
        ended += 1
        value = json.loads(answer.text, parse_constant=lambda text: math.nan)  # noqa: ARG005  (no JSON, so wrong)
        if not Draft202012Validator(entry["schema"]).is_valid(value):
            wrong.append((entry, answer.text))
    assert not wrong, wrong[:3]
    assert ended >= 0.95 * len(SCHEMAS), f"{ended} of {len(SCHEMAS)}"
