"""What docs/extending.md says, done from outside the package: a small one of each kind of part."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import Request
from fastapi.testclient import TestClient
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import families
from polymoe import LLM, SamplingParams
from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.errors import BundleError, PlanError
from polymoe.kernels.cpu.tiles import Activations
from polymoe.model.backends import choose
from polymoe.model.backends.base import Backend
from polymoe.model.backends.reference import ReferenceBackend
from polymoe.model.batch.batch import RowMap, Segments
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.allocate import position_options
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.quantisation_error import QuantisationErrors
from polymoe.offline.similarity.scan import scan_family
from polymoe.quant import formats
from polymoe.quant.formats import Format, get_format
from polymoe.server.app import create_app
from polymoe.server.settings import ServerSettings
from polymoe.server.state import ServerState
from references import ReferenceFamily, served_logits


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


@pytest.fixture
def fine_format() -> Iterator[Format]:
    """4 bits with a scale for 64 values, where int4 has one for 256; `Levels`, as int4 is, does all the rest."""
    fine = replace(get_format("int4"), name="int4-fine", group=64, distortion=0.0087, repair={})
    formats.register(fine)
    yield fine
    formats.unregister(fine)


class RoundedFamily(ReferenceFamily):
    """Stock models with their own experts, each matrix encoded and decoded once by `fmt`."""

    def __init__(self, original: ReferenceFamily, fmt: Format) -> None:
        self.arch, self.paths, self.num_requests, self.fmt = original.arch, original.paths, 6, fmt

    def load_models(self) -> dict[str, Any]:
        models = super().load_models()
        for model in models.values():
            for name, stack in model.named_parameters():
                if ".experts." in name:
                    for matrix in stack.data:
                        matrix.copy_(self.fmt.decode(self.fmt.encode(matrix), tuple(matrix.shape), torch.float32))
        return models


def test_a_format(tmp_path: Path, fine_format: Format) -> None:
    """Planned by name and weighed by `auto`, written, opened, and served as what its codes stand for."""
    original = ReferenceFamily("mixtral", tmp_path, hidden_size=128)
    rounded, bundle = RoundedFamily(original, fine_format), tmp_path / "fine"
    make_plan(original.paths, "cluster", None, bundle, options=PlanOptions(base="int4-fine", clusters=3))
    with LLM(bundle, dtype="float32", device="cpu", kv_cache_bytes=1 << 22) as llm:
        for case, logits in zip(rounded.cases, served_logits(llm.engine, rounded.cases), strict=True):
            torch.testing.assert_close(logits, case.logits, atol=1e-4, rtol=0)
    with pytest.raises(AssertionError):  # the format is in what was served
        torch.testing.assert_close(logits, original.case(case.variant, case.prompt, case.max_tokens).logits)
    family = Family.open(original.paths)
    scan = scan_family(family)
    offered = position_options(family, scan, QuantisationErrors.of_weights(scan))
    assert all("int4-fine" in {option.base for option in position} for position in offered)


def test_a_format_that_is_there_no_more(tmp_path: Path, fine_format: Format) -> None:
    paths = families.make_family("mixtral", tmp_path, num_variants=2)
    make_plan(paths, "mean", None, tmp_path / "bundle", options=PlanOptions(base="int4-fine"))
    formats.unregister(fine_format)
    try:
        with pytest.raises(BundleError, match="int4-fine"):
            LLM(tmp_path / "bundle", dtype="float32", device="cpu", kv_cache_bytes=1 << 22)
    finally:
        formats.register(fine_format)
    with pytest.raises(PlanError, match="there is a format 'int4-fine' already"):
        formats.register(fine_format)


class CountingBackend(ReferenceBackend):
    """torch, with its linear maps counted by their number of inputs."""

    runs_on = "counting torch"

    def __init__(self) -> None:
        self.products: Counter[int] = Counter()

    def linear(self, x: torch.Tensor, stack: torch.Tensor, segments: Segments, row_map: RowMap) -> torch.Tensor:
        self.products[x.shape[-1]] += 1
        return super().linear(x, stack, segments, row_map)

    def why_not_linear(self, dtype: torch.dtype, inputs: int) -> str:  # noqa: ARG002
        return ""


def test_a_backend(tmp_path: Path) -> None:
    """It computes what it says it does, and the tokens are those of the package's own."""
    paths = families.make_family("mixtral", tmp_path, num_variants=2)
    make_plan(paths, "separate", None, tmp_path / "bundle")
    made: list[CountingBackend] = []

    def in_float32(device: torch.device, dtype: torch.dtype, _activations: Activations) -> Backend | None:
        if device.type != "cpu" or dtype != torch.float32:
            return None
        made.append(CountingBackend())
        return made[-1]

    def tokens(dtype: str) -> tuple[list[list[int]], set[str]]:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        with LLM(tmp_path / "bundle", dtype=dtype, device="cpu", kv_cache_bytes=1 << 22) as llm:
            outputs = llm.generate([[5, 6, 7]] * 2, params, variants=list(paths))
            linear = {path.runs_on for path in llm.engine.info.fast_paths if path.part == "linear"}
        return [output.outputs[0].token_ids for output in outputs], linear

    own, _ = tokens("float32")
    choose.register(in_float32)
    try:
        found, runs_on = tokens("float32")
        assert found == own
        assert runs_on == {"counting torch"}
        # A prompt and five tokens; q, k, v, the attention's output and the router of two layers, and the head.
        assert made[0].products == {32: 6 * (2 * 5 + 1)}
        assert "counting torch" not in tokens("bfloat16")[1]
        assert len(made) == 1
    finally:
        choose.unregister(in_float32)
    tokens("float32")
    assert len(made) == 1


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
