"""Steps that are launched before the tokens of the last one are known answer as steps that wait for them do.

That tokens and log-probabilities are transformers' own, with preemption, chunks and slots, is in test_exactness.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from families import make_family
from polymoe import LLM, RequestOutput, SamplingParams
from polymoe.engine.scheduling.step_record import PENDING
from polymoe.offline.api import make_plan
from polymoe.protocol.request import EngineRequest, Logprob, SequenceId, TokenOutput
from test_exactness import load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 12], [20, 21], list(range(30, 50))]
VARIANTS = ["base", "v1", "v2", "v1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("async")
    paths = make_family("mixtral", folder / "family", num_variants=3, perturb=0.2, tokenizer=True)
    make_plan(paths, "separate", None, folder / "bundle")
    return folder / "bundle"


def answers(llm: LLM, *params: SamplingParams) -> list[RequestOutput]:
    outputs = llm.generate(PROMPTS, [params[i % len(params)] for i in range(len(PROMPTS))], variants=VARIANTS)
    llm.engine.check_integrity()
    assert llm.engine.blocks.usage == 0
    return outputs


def said(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs] for output in outputs]


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    """Batches of other sequences round otherwise: to be compared within a tolerance."""
    reports: list[Sequence[dict[int, Logprob] | None]] = [output.prompt_logprobs or [] for output in outputs]
    reports += [completion.logprobs or [] for output in outputs for completion in output.outputs]
    return [entry.logprob for report in reports for row in report if row is not None for entry in row.values()]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "max_tokens": 1},
        {"temperature": 0, "max_tokens": 12, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0, "max_tokens": 12, "repetition_penalty": 1.7},
        {"temperature": 0, "max_tokens": 12, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 0.9, "seed": 4, "max_tokens": 12, "top_p": 0.9, "frequency_penalty": 1.0},
        {"temperature": 1.0, "seed": 4, "max_tokens": 8, "n": 3, "logprobs": 1},
        {"temperature": 0, "max_tokens": 44, "ignore_eos": True},  # to the end of the model's length
    ],
    ids=["one", "logprobs", "repetition", "frequency", "seeded", "several", "longest"],
)
def test_answers_are_those_of_steps_that_wait(bundle: Path, params: dict[str, Any]) -> None:
    asked = SamplingParams(**params), SamplingParams(**params | {"logit_bias": {9: 3.0}})
    waiting, ahead = (load(bundle, max_model_len=64, async_scheduling=flag) for flag in (False, True))
    expected, outputs = answers(waiting, *asked), answers(ahead, *asked)
    assert said(outputs) == said(expected)
    assert logprobs(outputs) == pytest.approx(logprobs(expected), abs=1e-4)
    assert bool(logprobs(outputs)) == ("logprobs" in params)


@pytest.mark.parametrize("how", ["token", "string"])
def test_what_was_drawn_after_the_end_is_dropped(bundle: Path, how: str) -> None:
    """Where an answer ends is known one step late: nothing of that step is said, nor is it in anybody's cache."""
    llm = load(bundle, async_scheduling=True)
    free = answers(llm, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for index, output in enumerate(free):
        completion = output.outputs[0]
        token = completion.token_ids[4]
        at = completion.token_ids.index(token)
        piece = completion.text[len(completion.text) // 2 :][:3]
        stop = {"stop_token_ids": [token]} if how == "token" else {"stop": [piece]}
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **stop)
        again = llm.generate([PROMPTS[index]], params, variants=VARIANTS[index])[0].outputs[0]
        assert again.finish_reason == "stop"
        if how == "token":
            assert again.token_ids == completion.token_ids[: at + 1]
        else:
            assert again.text == completion.text[: completion.text.index(piece)]
    assert said(answers(llm, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))) == said(free)


def request(name: str, prompt: list[int], max_tokens: int = 6) -> EngineRequest:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    return EngineRequest(request_id=SequenceId(name), variant=1, prompt_token_ids=prompt, sampling=sampling)


def drain(llm: LLM, outputs: list[TokenOutput] | None = None) -> list[int]:
    found = [t for output in outputs or [] for t in output.new_token_ids]
    while llm.engine.has_work():
        found += [t for output in llm.engine.step() for t in output.new_token_ids]
    return found


def test_a_step_begins_before_the_last_ones_tokens_are_known(bundle: Path) -> None:
    engine = load(bundle, async_scheduling=True).engine
    engine.add_request(request("a", PROMPTS[0]))
    assert engine.step() == []  # launched
    (running,) = engine.scheduler.running
    assert running.token_ids[-1] == PENDING
    (output,) = engine.step()
    assert output.new_token_ids == [running.token_ids[-2]]
    assert running.token_ids[-1] == PENDING


def test_an_aborted_requests_name_can_be_used_again_at_once(bundle: Path) -> None:
    llm = load(bundle, async_scheduling=True)
    llm.engine.add_request(request("a", PROMPTS[0]))
    expected = drain(llm)
    llm.engine.add_request(request("a", PROMPTS[2]))
    llm.engine.step()
    llm.engine.abort([SequenceId("a")])
    llm.engine.add_request(request("a", PROMPTS[0]))
    assert drain(llm) == expected
    llm.engine.check_integrity()
    assert llm.engine.blocks.usage == 0


def test_an_engine_with_a_step_in_flight_has_work(bundle: Path) -> None:
    llm = load(bundle, async_scheduling=True)
    llm.engine.add_request(request("a", PROMPTS[0], max_tokens=1))
    assert llm.engine.step() == []
    assert llm.engine.has_work()
    assert len(drain(llm)) == 1
    llm.engine.add_request(request("b", PROMPTS[0]))
    llm.engine.step()
    llm.engine.abort([SequenceId("b")])
    assert drain(llm) == []
