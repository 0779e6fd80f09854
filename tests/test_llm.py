"""The offline door, on a tiny family with real tokenizers and on the family that comes with the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import polymoe
from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.bundle.reader import Bundle
from polymoe.demo import family_paths, text_paths
from polymoe.errors import ConfigError, ContextLengthError, RequestError, UnknownVariantError
from polymoe.model.variants.variant_stack import VariantStack
from polymoe.offline.api import make_plan


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return make_plan(family_paths(), "paper", "1.0x", folder / "bundle").path


@pytest.fixture(scope="module")
def llm(bundle: Path) -> LLM:
    return LLM(bundle, device="cpu", kv_cache_bytes=1 << 26)


def test_the_public_names_are_these() -> None:
    assert polymoe.__all__ == [
        "LLM", "AsyncLLM", "CompletionOutput", "EngineConfig", "Logprob", "PolymoeError", "RequestOutput",
        "SamplingParams", "StructuredOutputsParams", "__version__",
    ]  # fmt: skip
    assert all(getattr(polymoe, name) is not None for name in polymoe.__all__)


def test_text_in_text_out_for_every_variant(llm: LLM) -> None:
    prompt = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"
    outputs = llm.generate([prompt] * 4, SamplingParams(temperature=0, max_tokens=40), variants=llm.variants)
    texts = {o.variant: o.outputs[0].text for o in outputs}
    assert [o.variant for o in outputs] == ["base", "math", "drama", "code"]
    assert len(set(texts.values())) == 4  # they share experts, not answers
    assert "<<" in texts["math"]  # worked answers carry calculator annotations
    assert all(o.prompt == prompt and o.finished for o in outputs)


def test_token_ids_and_text_are_the_same_request(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
    first = llm.generate("ROMEO:\n", params, variants="drama")[0]
    again = llm.generate([first.prompt_token_ids], params, variants="drama")[0]
    assert first.outputs[0].token_ids == again.outputs[0].token_ids
    assert first.outputs[0].logprobs is not None
    assert [max(step.values(), key=lambda p: p.logprob).decoded_token for step in first.outputs[0].logprobs]


def test_stop_strings_end_the_text_and_the_work(llm: LLM) -> None:
    free = llm.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=40), variants="drama")[0].outputs[0]
    stop = free.text[10:14]
    output = llm.generate("ROMEO:\n", SamplingParams(temperature=0, max_tokens=40, stop=[stop]), variants="drama")[
        0
    ].outputs[0]
    assert output.text == free.text[: free.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert not llm.engine.has_work()


def test_n_samples_differ_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=12)
    first, second = (llm.generate("The", params, variants="base")[0].outputs for _ in range(2))
    assert [o.index for o in first] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in first}) == 4
    assert [o.token_ids for o in first] == [o.token_ids for o in second]


def test_a_worked_answer_ends_by_itself(llm: LLM) -> None:
    prompt = "Question: Ann has 2 cats and 3 dogs. How many pets does she have?\nAnswer:"
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=200), variants="math")[0].outputs[0]
    assert output.finish_reason == "stop"
    assert "####" in output.text
    assert "</s>" not in output.text


def test_one_bad_request_of_many_generates_nothing(llm: LLM) -> None:
    with pytest.raises(UnknownVariantError, match="base, math, drama, code"):
        llm.generate(["a", "b"], variants=["math", "poet"])
    prompts: list[str | Sequence[int]] = ["a", [5] * 4000]
    with pytest.raises(ContextLengthError):
        llm.generate(prompts, variants="math")
    with pytest.raises(RequestError, match="2048"):
        llm.generate([[5, 2048]], variants="math")
    with pytest.raises(RequestError, match="variants"):
        llm.generate("a")
    with pytest.raises(RequestError, match="2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], variants=["math", "code"])
    with pytest.raises(RequestError):
        llm.generate([[]], variants="math")
    assert not llm.engine.has_work()
    assert llm.processor.num_sequences == 0


def test_more_requests_than_the_queue_holds(bundle: Path) -> None:
    llm = LLM(bundle, device="cpu", max_waiting=3, max_num_seqs=4, kv_cache_bytes=1 << 26)
    outputs = llm.generate([[i] for i in range(20, 40)], SamplingParams(temperature=0, max_tokens=3), variants="code")
    assert [o.prompt_token_ids for o in outputs] == [[i] for i in range(20, 40)]


def storage_bytes(llm: LLM) -> dict[str, int]:
    """Bytes of the storages that the model's weights really occupy, found by walking it, each storage once."""
    found: dict[str, dict[int, int]] = {"experts": {}, "nonexperts": {}}

    def count(kind: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        found[kind][storage.data_ptr()] = storage.nbytes()

    for module in llm.engine.model.model.modules():
        for value in (*module.__dict__.values(), *module._parameters.values()):
            if isinstance(value, VariantStack):
                count("nonexperts", value.rows)
            elif isinstance(value, torch.Tensor):
                count("nonexperts", value)
        for name, buffer in module._buffers.items():
            if isinstance(buffer, torch.Tensor) and name not in module._non_persistent_buffers_set:
                count("nonexperts", buffer)
    for layer in llm.engine.model.pool.layers:
        for tensor in layer.resident.values():
            count("experts", tensor)
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


def test_the_bytes_promised_are_the_bytes_held(bundle: Path, llm: LLM) -> None:
    """Four variants at 1.0x hold exactly one model's experts, and in all what the manifest says (within 2 %)."""
    opened = Bundle.open(bundle)
    one_model = sum(
        stack.numel() * stack.element_size()
        for layer in range(len(opened.expert_modules))
        for stack in opened.resident_experts(layer).values()
    )
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(family_paths()["base"], dtype=torch.bfloat16)
    experts = sum(p.numel() * p.element_size() for n, p in original.named_parameters() if ".experts." in n)
    held = storage_bytes(llm)
    assert held["experts"] == one_model == experts == opened.resident_bytes.resident_experts
    promised = opened.resident_bytes.total
    assert sum(held.values()) == pytest.approx(promised, rel=0.02)
    reported = {k: v for k, v in llm.engine.model.resident_bytes.items() if k in opened.resident_bytes.by_kind}
    assert reported == opened.resident_bytes.by_kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"max_model_len": 100_000}, "2048 tokens"),
        ({"kv_cache_bytes": 1000}, "--kv-cache"),
        ({"slots": 0}, "slots"),
        ({"weights": {"maths": 2.0}}, "maths, which is not served; the variants are"),
        ({"weights": {"math": 0.0}}, "weight of math must be more than 0"),
        ({"slo": {"fast": 0.0}}, "fast must be more than 0 seconds"),
        ({"target_itl": -1.0}, "target_itl"),
    ],
)
def test_options_out_of_range_name_the_fix(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(bundle, **({"device": "cpu"} | options))


def test_a_fine_tune_with_added_tokens_is_served_with_its_own_vocabulary(tmp_path: Path) -> None:
    """The larger variant can use its rows, the smaller one can neither send nor receive them."""
    small = make_family("mixtral", tmp_path / "small", num_variants=1, seed=1)["base"]
    large = make_family("mixtral", tmp_path / "large", num_variants=1, seed=2, vocab_size=120)["base"]
    made = make_plan({"small": small, "large": large}, "separate", None, tmp_path / "bundle")
    llm = LLM(made.path, dtype="float32", device="cpu", kv_cache_bytes=1 << 24)
    everything = SamplingParams(temperature=0, max_tokens=4, logit_bias={111: 50.0}, ignore_eos=True)
    tokens = llm.generate([[3, 4]], everything, variants="small")[0].outputs[0].token_ids
    assert tokens == [111] * 4
    with pytest.raises(RequestError, match="0 to 111"):
        llm.generate([[3, 115]], everything, variants="small")
    assert len(llm.generate([[3, 115]], everything, variants="large")[0].outputs[0].token_ids) == 4
    hot = SamplingParams(temperature=100.0, max_tokens=60, seed=1, ignore_eos=True)
    outputs = llm.generate([[3, 4]] * 2, hot, variants=["small", "large"])
    assert max(outputs[0].outputs[0].token_ids) < 112
    assert max(outputs[1].outputs[0].token_ids) >= 112


def test_the_demo_texts_are_there() -> None:
    assert all(path.read_text(encoding="utf-8").count("\n") > 50 for path in text_paths().values())
