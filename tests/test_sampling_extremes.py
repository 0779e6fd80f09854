"""Sampling parameters at the ends of their ranges give the greedy answer or a clean error, never token 0."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.engine.sampler import Generators, sample
from polymoe.engine.scheduling.step_record import NO_TOKEN, NOTHING_ALLOWED
from polymoe.errors import RequestError
from polymoe.offline.api import make_plan
from polymoe.protocol.request import sampling_params
from test_sampler import draw, sequence

VOCAB = 50
NEVER = 0  # what argmax gives when everything is NaN


@pytest.fixture
def logits() -> torch.Tensor:
    found = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 20
    found[NEVER] = found.min() - 1
    return found


GREEDY: list[dict[str, Any]] = [
    *({"temperature": t} for t in (0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-6, 1e-5)),
    *({"temperature": t, "top_k": 1} for t in (1e-38, 1.0, 100.0)),
    *({"temperature": t, "top_p": p} for t in (1e-38, 1.0, 100.0) for p in (1e-9, 1e-38, 5e-324)),
    {"temperature": 100.0, "min_p": 1.0},
    {"temperature": 1e-6, "top_p": 1e-9, "top_k": 1, "min_p": 1.0},
]


@pytest.mark.parametrize("sampling", GREEDY)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e30])
def test_the_greedy_answer(logits: torch.Tensor, sampling: dict[str, Any], scale: float) -> None:
    """At 1e-38 every logit became infinite, every probability NaN, and the answer `<s>`."""
    best = int(logits.argmax())
    for seed in range(5):
        assert draw(logits[None] * scale, sequence(seed=seed, **sampling), seed=seed) == [best]
        assert draw(logits[None] * scale, sequence(**sampling), seed=seed) == [best]


@pytest.mark.parametrize("top", [float("inf"), 3.4e38])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 0.01, 1.0])
def test_a_logit_of_any_size_wins(logits: torch.Tensor, top: float, temperature: float) -> None:
    logits[7] = top
    assert draw(logits[None], sequence(temperature=temperature)) == [7]


def test_equal_logits_are_cut_as_argmax_would(logits: torch.Tensor) -> None:
    """bfloat16 logits are often equal; a sort may order those as it likes."""
    ties = logits.round() // 20
    for sampling in ({"top_k": 1}, {"top_p": 1e-9}):
        assert draw(ties[None], sequence(**sampling)) == [int(ties.argmax())]


@pytest.mark.parametrize("penalty", [5e-324, 1e-38, 1e-6, 60.0, 100.0])
def test_extreme_repetition_penalties_keep_the_order(logits: torch.Tensor, penalty: float) -> None:
    """A tiny penalty made every logit of the prompt infinite, and so equal."""
    logits[9], logits[4] = logits.abs().max() + 3, logits.abs().max() + 2
    repeated = [4, 9, 11]
    others = logits.clone()
    others[repeated] = float("-inf")
    want = 9 if penalty < 1 else int(others.argmax())
    for temperature in (0.0, 1e-6, 1e-3):
        sampling: dict[str, Any] = {"repetition_penalty": penalty, "temperature": temperature}
        assert draw(logits[None], sequence(prompt=repeated, **sampling)) == [want]


@pytest.mark.parametrize(("bias", "token"), [(100.0, 6), (-100.0, None)])
def test_the_largest_biases(logits: torch.Tensor, bias: float, token: int | None) -> None:
    target = 6 if token is not None else int(logits.argmax())
    for temperature in (0.0, 1e-38, 1.0):
        (found,) = draw(logits[None], sequence(temperature=temperature, logit_bias={target: bias}, top_p=0.999))
        assert (found == target) is (token is not None)
        assert found != NEVER


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0])
def test_no_usable_logit_is_no_token(logits: torch.Tensor, temperature: float) -> None:
    rows = logits.repeat(4, 1)
    rows[0, 30] = float("nan")
    rows[1] = float("-inf")
    rows[2] = float("nan")
    tokens, reports = sample(
        rows, [sequence(temperature=temperature, logprobs=1) for _ in range(4)], Generators("cpu", 0)
    ).wait()
    assert tokens[:3] == [NO_TOKEN, NOTHING_ALLOWED, NO_TOKEN]
    assert tokens[3] not in (NO_TOKEN, NEVER)
    assert reports[3] is not None


@pytest.mark.parametrize(
    "bad",
    [{name: value} for name, value in itertools.product(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        (float("nan"), float("inf"), float("-inf"), -1e9, 1e9),
    )] + [{"logit_bias": {3: value}} for value in (float("nan"), float("inf"), 1e9)],
)  # fmt: skip
def test_what_is_no_number_or_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**bad)
    assert refused.value.param in bad


def test_a_default_minimum_does_not_make_a_short_request_wrong() -> None:
    assert sampling_params({"min_tokens": 30}, {"max_tokens": 5}).min_tokens == 5
    assert sampling_params({"min_tokens": 30}, {"max_tokens": 50}).min_tokens == 30
    with pytest.raises(RequestError, match="min_tokens"):
        sampling_params({}, {"max_tokens": 5, "min_tokens": 30})


def test_through_the_engine(tmp_path: Path) -> None:
    make_plan(make_family("mixtral", tmp_path / "c", num_variants=2), "separate", None, tmp_path / "b")
    llm = LLM(tmp_path / "b", num_threads=1, kv_cache_bytes=1 << 22)
    greedy = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), variants="v1")
    same = [SamplingParams(max_tokens=12, ignore_eos=True, **extreme) for extreme in GREEDY]
    for output in llm.generate([[5, 6, 7]] * len(same), same, variants="v1"):
        assert output.outputs[0].token_ids == greedy[0].outputs[0].token_ids
