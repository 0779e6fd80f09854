"""One bad variant never takes the others down, and says itself what is wrong with it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_family
from polymoe import LLM, SamplingParams
from polymoe.errors import BundleError, VariantUnusableError
from polymoe.offline.api import make_plan
from servers import ThreadServer, engine_config, events, make_bundle

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def damaged(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "b"))


def spoil(file: Path) -> None:
    """Another content of the same size: nothing to see for whoever only compares sizes."""
    content = file.read_bytes()
    file.write_bytes(b"{" + content[1:-1].replace(b'"', b"'") + b"}")


def unlink(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (spoil, "tokenizer.json", "its files in the bundle cannot be used"),
        (unlink, "tokenizer.json", "its files in the bundle cannot be used"),
        (spoil, "generation_config.json", "its files in the bundle cannot be used"),
        (spoil, "config.json", "its files in the bundle cannot be used"),
    ],
)
@pytest.mark.parametrize("variant", ["base", "v1"])
def test_the_others_are_served(
    damaged: Path, damage: Callable[[Path], None], file: str, reason: str, variant: str
) -> None:
    """The server died at its start, whichever of the variants it was."""
    damage(damaged / "variants" / variant / file)
    llm = LLM(damaged, num_threads=1, kv_cache_bytes=1 << 24)
    other = "v1" if variant == "base" else "base"
    greedy = SamplingParams(temperature=0.0, max_tokens=4)
    assert llm.generate("the dog", greedy, variants=other)[0].outputs[0].text
    for _ in range(2):
        with pytest.raises(VariantUnusableError, match=f"`{variant}` is not served: {reason}") as refused:
            llm.generate("the dog", greedy, variants=variant)
        assert isinstance(refused.value.__cause__, BundleError)
        assert file in str(refused.value.__cause__) or "tokenizer" in str(refused.value.__cause__)


def test_no_variant_left(damaged: Path) -> None:
    for variant in ("base", "v1"):
        spoil(damaged / "variants" / variant / "config.json")
    with pytest.raises(BundleError, match=r"config\.json has changed"):
        LLM(damaged, num_threads=1, kv_cache_bytes=1 << 24)


@pytest.fixture
def server(damaged: Path) -> Iterator[ThreadServer]:
    spoil(damaged / "variants" / "base" / "tokenizer.json")
    with ThreadServer(engine_config(damaged)) as server:
        yield server


def test_over_http(server: ThreadServer) -> None:
    answer = server.post("/v1/chat/completions", {"model": "v1", "messages": USER, "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    for path, body in (
        ("/v1/completions", {"model": "base", "prompt": "hi", "max_tokens": 2}),
        ("/v1/completions", {"model": "base", "prompt": [5, 6], "max_tokens": 2}),
        ("/v1/chat/completions", {"model": "base", "messages": USER}),
        ("/tokenize", {"model": "base", "prompt": "hi"}),
    ):
        refused = server.post(path, body)
        assert refused.status_code == 503, refused.text
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("model_unusable", "service_unavailable_error")
        assert "`base` is not served: its files in the bundle cannot be used" in error["message"]
        assert "/" not in error["message"], "no paths"
    assert [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["v1"]
    (fault,) = server.client.processor.faults.values()
    assert "variants/base" in fault.details, "the operator is told which file"


def test_null_content_and_template_variables_over_http(server: ThreadServer) -> None:
    body = {"model": "v1", "messages": [*USER, {"role": "assistant", "content": None}, *USER], "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).status_code == 200
    assert server.post("/v1/chat/completions", body | {"chat_template_kwargs": {"thinking": False}}).status_code == 200
    counts = [
        server.post("/tokenize", {"model": "v1", "messages": USER, "chat_template_kwargs": variables}).json()["count"]
        for variables in (None, {"add_generation_prompt": False})
    ]
    assert counts[0] > counts[1]
    for change, param in (
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    ):
        refused = server.post("/v1/chat/completions", body | change)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


@pytest.fixture(scope="module")
def broken_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1's weights are finite, but what it computes is infinite, and then NaN, for every prompt."""
    folder = tmp_path_factory.mktemp("nan")
    paths = make_family("mixtral", folder / "c", num_variants=2, perturb=None, tokenizer=True)
    tensors = load_file(paths["v1"] / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    save_file(tensors, paths["v1"] / "model.safetensors", metadata={"format": "pt"})
    make_plan(paths, "separate", None, folder / "b")
    return folder / "b"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("overlapped", [False, True])
def test_logits_that_are_nan_end_the_request(broken_weights: Path, temperature: float, overlapped: bool) -> None:
    """The answer was `<s>` again and again: argmax of NaN is the first token."""
    llm = LLM(broken_weights, num_threads=1, kv_cache_bytes=1 << 22, async_scheduling=overlapped)
    sampling = SamplingParams(temperature=temperature, max_tokens=6, ignore_eos=True, logprobs=1, seed=1)
    sound, nan = llm.generate([[5, 6, 7]] * 2, sampling, variants=["base", "v1"])
    assert (nan.outputs[0].finish_reason, nan.outputs[0].token_ids, nan.outputs[0].text) == ("error", [], "")
    assert (sound.outputs[0].finish_reason, len(sound.outputs[0].token_ids)) == ("length", 6)
    assert not llm.engine.has_work()
    llm.engine.check_integrity()


def test_nan_over_http(broken_weights: Path) -> None:
    with ThreadServer(engine_config(broken_weights)) as server:
        body = {"model": "v1", "prompt": "the dog", "max_tokens": 3}
        answer = server.post("/v1/completions", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "no_probabilities")
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60) as stream:
            *_, error, done = events(stream)
        assert (error["error"]["code"], done) == ("no_probabilities", "[DONE]")
        assert json.loads(server.post("/v1/completions", body | {"model": "base"}).text)["choices"]
        server.wait_for(server.is_idle)
