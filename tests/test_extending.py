"""What docs/extending.md says, done from outside the package: a small one of each kind of part."""

from pathlib import Path

import pytest
import torch
from fastapi import Request
from fastapi.testclient import TestClient
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import families
from polymoe import LLM, SamplingParams
from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.offline.api import make_plan
from polymoe.server.app import create_app
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState


class HouseConfig(MixtralConfig):  # type: ignore[misc]
    model_type = "house_moe"


class HouseForCausalLM(MixtralForCausalLM):  # type: ignore[misc]
    """A stock model but for one thing of its own: logits of half the size."""

    config_class = HouseConfig

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


def test_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.register("house_moe", HouseConfig)
    AutoModelForCausalLM.register(HouseConfig, HouseForCausalLM)
    monkeypatch.setitem(families.ARCHITECTURES, "house_moe", families.ARCHITECTURES["mixtral"])
    paths = families.make_family("house_moe", tmp_path, num_variants=2)
    make_plan(paths, "separate", None, tmp_path / "bundle")
    prompt = [5, 6, 7]
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)
    with LLM(tmp_path / "bundle", dtype="float32", device="cpu", kv_cache_bytes=1 << 22) as llm:
        outputs = llm.generate([prompt] * 2, params, variants=list(paths))
    for path, output in zip(paths.values(), outputs, strict=True):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert isinstance(model, HouseForCausalLM)
        found = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        completion = output.outputs[0]
        assert completion.token_ids == found.sequences[0, len(prompt) :].tolist()
        first = torch.log_softmax(found.scores[0][0], dim=-1)[completion.token_ids[0]].item()
        assert completion.logprobs is not None
        assert completion.logprobs[0][completion.token_ids[0]].logprob == pytest.approx(first, abs=1e-4)


def test_an_endpoint() -> None:
    """It sees what the others see, and is behind the same key and the same errors."""
    app = create_app(AsyncEngineClient(EngineConfig(bundle="none")), ServerSettings(api_key="secret"))

    @app.get("/house")
    async def house(request: Request) -> dict[str, bool]:
        state: ServerState = request.app.state.server
        return {"ready": state.client.is_ready}

    client = TestClient(app)
    assert client.get("/house").status_code == 401
    assert client.get("/house", headers={"Authorization": "Bearer secret"}).json() == {"ready": False}
