"""The sampler against plain definitions, row by row."""

from typing import Any

import pytest
import torch

from polymoe.engine.sampler import Generators, sample
from polymoe.engine.scheduling.sequence import Sequence
from polymoe.engine.scheduling.step_record import ScheduledSequence
from polymoe.errors import RequestError
from polymoe.protocol.request import EngineRequest, SamplingParams, SequenceId

VOCAB = 20
GENERATORS = Generators("cpu", 0)


def sequence(
    prompt: list[int] | None = None, output: list[int] | None = None, stop: list[int] | None = None, **sampling: Any
) -> ScheduledSequence:
    request = EngineRequest(
        request_id=SequenceId("r"),
        variant=0,
        prompt_token_ids=prompt or [1],
        sampling=SamplingParams(**sampling),
        stop_token_ids=stop or [],
    )
    made = Sequence(request, b"")
    made.token_ids += output or []
    return made.scheduled(made.num_uncomputed)


def draw(logits: torch.Tensor, *sequences: ScheduledSequence, seed: int = 0) -> list[int]:
    GENERATORS.shared.manual_seed(seed)
    return sample(logits.clone(), list(sequences), GENERATORS).wait()[0]


def frequencies(logits: torch.Tensor, count: int = 4000, **sampling: Any) -> torch.Tensor:
    tokens = draw(logits.expand(count, -1), *(sequence(**sampling) for _ in range(count)))
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB) / count


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2


def test_greedy_rows_among_random_ones(logits: torch.Tensor) -> None:
    rows = torch.stack([logits, logits.flip(0), logits])
    tokens = draw(rows, sequence(temperature=0), sequence(temperature=1), sequence(temperature=0))
    assert tokens[0] == tokens[2] == int(logits.argmax())


def test_temperature_one_draws_from_the_softmax(logits: torch.Tensor) -> None:
    assert (frequencies(logits) - torch.softmax(logits, 0)).abs().max() < 0.03


def test_temperature_sharpens(logits: torch.Tensor) -> None:
    assert (frequencies(logits, temperature=0.5) - torch.softmax(logits / 0.5, 0)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("sampling", "keeps"),
    [
        ({"top_k": 3}, lambda p: p >= p.sort(descending=True).values[2]),
        ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
        ({"top_p": 0.7}, lambda p: torch.tensor([float(p[p > x].sum()) < 0.7 for x in p])),
    ],
)
def test_truncation_keeps_exactly_the_right_tokens(logits: torch.Tensor, sampling: dict[str, Any], keeps: Any) -> None:
    kept = keeps(torch.softmax(logits, 0))
    expected = torch.softmax(logits.masked_fill(~kept, float("-inf")), 0)
    seen = frequencies(logits, **sampling)
    assert not seen[~kept].any()
    assert (seen - expected).abs().max() < 0.03


def test_a_seed_gives_the_same_tokens_in_any_company(logits: torch.Tensor) -> None:
    def eight(company: int) -> list[int]:
        mine = sequence(seed=42)
        return [
            draw(logits.expand(company + 1, -1), *(sequence() for _ in range(company)), mine, seed=step)[-1]
            for step in range(8)
        ]

    assert eight(0) == eight(3)
    assert len(set(eight(0))) > 1


def test_penalties(logits: torch.Tensor) -> None:
    best = int(logits.argmax())
    second = int(logits.topk(2).indices[1])
    gap = float(logits[best] - logits[second])
    assert draw(logits[None], sequence(output=[best], temperature=0, presence_penalty=min(2.0, gap + 0.1))) == [second]
    assert draw(
        logits[None], sequence(output=[best] * 4, temperature=0, frequency_penalty=min(2.0, gap / 4 + 0.1))
    ) == [second]
    assert draw(logits[None], sequence(prompt=[best], temperature=0, repetition_penalty=100.0)) == [second]
    assert draw(logits[None], sequence(prompt=[best], temperature=0, presence_penalty=2.0)) == [best]  # output only


def test_logit_bias_and_minimum_length(logits: torch.Tensor) -> None:
    best, second = logits.topk(2).indices.tolist()
    assert draw(logits[None], sequence(temperature=0, logit_bias={7: 100.0})) == [7]
    assert draw(logits[None], sequence(temperature=0, stop=[best], min_tokens=1, max_tokens=3)) == [second]
    assert draw(logits[None], sequence(temperature=0, stop=[best], min_tokens=1, max_tokens=3, output=[3])) == [best]


def test_logprobs_are_of_the_raw_logits_with_ranks(logits: torch.Tensor) -> None:
    expected = torch.log_softmax(logits, 0)
    first = sequence(temperature=0, logprobs=3, logit_bias={7: 100.0})
    report, none = sample(logits[None].repeat(2, 1), [first, sequence()], GENERATORS).wait()[1]
    assert report is not None
    assert report.token_ids == [7, *expected.topk(3).indices.tolist()]
    assert report.logprobs == pytest.approx([float(expected[i]) for i in report.token_ids])
    assert report.rank == int((expected > expected[7]).sum()) + 1
    assert none is None


def test_the_greedy_token_has_exactly_the_top_logprob(logits: torch.Tensor) -> None:
    """Log-likelihood clients compare the two floats for equality."""
    report = sample(logits[None].clone(), [sequence(temperature=0, logprobs=1)], GENERATORS).wait()[1][0]
    assert report is not None
    assert report.token_ids[0] == report.token_ids[1]
    assert report.logprobs[0] == report.logprobs[1]


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"min_p": 2}, {"n": 0}, {"n": 1000}, {"max_tokens": 0},
     {"logprobs": 99}, {"min_tokens": 5, "max_tokens": 2}, {"stop": [""]}, {"logit_bias": {-1: 1.0}},
     {"repetition_penalty": 0}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**bad)
    assert error.value.param in bad
