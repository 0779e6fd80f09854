"""Encoder–decoder families: what Switch Transformers have that decoder-only models do not.

That mixed batches, preemption, slots and absent experts give transformers' own tokens is in test_exactness.py.
"""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from families import make_switch_family
from polymoe import LLM, SamplingParams
from polymoe.errors import RequestError
from polymoe.model.stock.switch_experts import SwitchExperts
from polymoe.offline.api import make_plan
from references import ReferenceFamily
from servers import ThreadServer, engine_config, events
from test_exactness import check, load

PROMPT = "the quick brown fox jumps"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_switch_family(tmp_path_factory.mktemp("switch"), num_variants=3, n_positions=64)


@pytest.fixture(scope="module")
def bundle(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "separate"
    make_plan(paths, "separate", None, out)
    return out


def stock_router_drops() -> bool:
    """Whether transformers' own router, with three equal tokens and a capacity of one, takes one token alone."""
    config = SwitchTransformersConfig(d_model=4, num_experts=2, expert_capacity=1)
    out = SwitchTransformersTop1Router(config).eval()(torch.ones(1, 3, 4))
    (taken,) = [part for part in out if not part.is_floating_point()]
    return int(taken.sum()) == 1


def test_tokens_beyond_an_experts_capacity_pass_it_by_as_in_transformers(tmp_path: Path) -> None:
    """Capacity counts the tokens of one prompt: neither padding nor other prompts of the batch take any of it."""
    family = ReferenceFamily("switch_transformers", tmp_path, expert_capacity=2)
    llm = load(family.bundle)
    dropped = []
    inner = SwitchExperts.forward

    def watch(self: SwitchExperts, hidden: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        dropped.append(int((selected.sum(dim=-1) == 0).sum()))
        return inner(self, hidden, selected, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwitchExperts, "forward", watch)
        check(llm, family)
    # Some versions of transformers count along the wrong axis, and none of their tokens is beyond any capacity.
    assert (sum(dropped) > 0) == stock_router_drops()


def test_arrivals_at_different_times_share_the_batch(bundle: Path) -> None:
    """A request that joins while others decode gets what it gets alone."""
    llm = load(bundle)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts, variants = [PROMPT, "dog", "pack my box with jugs", PROMPT], ["base", "v1", "v2", "v1"]
    alone = [llm.generate(p, params, v)[0].outputs[0].token_ids for p, v in zip(prompts, variants, strict=True)]
    pending = [
        llm.processor.add_request(f"r{i}", v, p, params)[0]
        for i, (p, v) in enumerate(zip(prompts, variants, strict=True))
    ]
    finished = {}
    while pending or llm.engine.has_work():
        if pending:
            llm.engine.add_request(pending.pop(0))
        for _ in range(3):
            for output in llm.processor.process(llm.engine.step()).finished:
                finished[output.request_id] = output.outputs[0].token_ids
    assert [finished[f"r{i}"] for i in range(4)] == alone


def test_bfloat16_is_as_close_as_transformers(bundle: Path, paths: dict[str, Path]) -> None:
    """The stock router casts itself to `router_dtype`; a stack of routers is no module and must be stored so.

    Medians over many positions: where rounding flips an expert, one position's divergence outweighs all others' mean.
    """
    engine = load(bundle, dtype="bfloat16").engine
    generator = torch.Generator().manual_seed(0)
    prompts, answers = (
        [torch.randint(2, 112, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((5, 17, 30, 44) * 10, (9,) * 40)
    )
    served = engine.prompt_logits(
        [(1, [*prompt, 0, *answer]) for prompt, answer in zip(prompts, answers, strict=True)], [len(p) for p in prompts]
    )

    def original(dtype: torch.dtype) -> list[torch.Tensor]:
        model = AutoModelForSeq2SeqLM.from_pretrained(paths["v1"], dtype=dtype).eval()
        with torch.no_grad():
            return [
                model(input_ids=torch.tensor([p]), decoder_input_ids=torch.tensor([[0, *a]])).logits[0].float()
                for p, a in zip(prompts, answers, strict=True)
            ]

    exact = torch.cat(original(torch.float32)).log_softmax(-1)
    ours, theirs = (
        float((exact.exp() * (exact - torch.cat(other).log_softmax(-1))).sum(-1).median())
        for other in (served, original(torch.bfloat16))
    )
    assert ours < 1.5 * theirs
    router = engine.model.model.encoder.block[1].layer[1].mlp.router.classifier
    assert router.weight.dtype == torch.float32


@pytest.mark.parametrize("policy", ["paper", "mean", "delta", "cluster", "auto"])
def test_every_policy_is_served(policy: str, paths: dict[str, Path], tmp_path: Path) -> None:
    make_plan(paths, policy, "1.0x", tmp_path / "bundle")
    outputs = load(tmp_path / "bundle").generate(
        [PROMPT] * 3, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), list(paths)
    )
    assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)


def test_n_sequences_of_one_prompt(bundle: Path) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    outputs = load(bundle).generate(PROMPT, params, "base")[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) > 1


def test_repetition_penalty_looks_at_the_answer_only(bundle: Path, paths: dict[str, Path]) -> None:
    """As in transformers, where the penalty sees the decoder's tokens."""
    llm = load(bundle)
    ids = llm.processor.require_tokenizer("v1", "a test").encode(PROMPT)
    model = AutoModelForSeq2SeqLM.from_pretrained(paths["v1"], dtype=torch.float32).eval()
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=1.7, eos_token_id=None
    )
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.7)
    assert llm.generate([ids], params, "v1")[0].outputs[0].token_ids == expected[0, 1:].tolist()


def test_what_makes_no_sense_is_refused(bundle: Path) -> None:
    llm = LLM(bundle, device="cpu", dtype="float32", kv_cache_bytes=1 << 24)
    with pytest.raises(RequestError, match="encoder–decoder model: its prompt has no log-probabilities"):
        llm.generate(PROMPT, SamplingParams(prompt_logprobs=1), "base")
    with pytest.raises(RequestError, match="65 tokens; the encoder of `base` reads at most 64"):
        llm.generate([[5] * 65], SamplingParams(max_tokens=4), "base")
    with pytest.raises(RequestError, match="maximum context length"):
        llm.generate([[5] * 60], SamplingParams(max_tokens=64), "base")
    long = llm.generate([[5] * 64], SamplingParams(max_tokens=63, ignore_eos=True), "base")[0]
    assert len(long.outputs[0].token_ids) == 63


# --- over HTTP


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ThreadServer]:
    with ThreadServer(engine_config(bundle)) as server:
        yield server


def test_completions(server: ThreadServer, bundle: Path) -> None:
    llm = load(bundle)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for model in ("base", "v1"):
            answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=9, temperature=0)
            alone = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=9), model)[0]
            assert answer.choices[0].text == alone.outputs[0].text
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(alone.prompt_token_ids)
            assert alone.prompt_token_ids[-1] == 1, "the tokenizer's own end of text"
    server.wait_for(server.is_idle)


def test_streaming(server: ThreadServer) -> None:
    body = {"model": "v2", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        pieces = [e["choices"][0]["text"] for e in events(response) if e != "[DONE]" and e["choices"]]
    assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"echo": True}, "cannot echo its prompt"),
        ({"echo": True, "logprobs": 1}, "cannot echo its prompt"),
        ({"prompt": [7] * 80}, "reads at most 64"),
        ({"max_tokens": 100}, "maximum context length"),
    ],
)
def test_bad_requests(server: ThreadServer, change: dict[str, object], message: str) -> None:
    response = server.post("/v1/completions", {"model": "base", "prompt": PROMPT, "max_tokens": 4} | change)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
