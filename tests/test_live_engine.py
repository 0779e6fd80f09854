"""Variants come and go in a running engine: what is added is exactly its checkpoint, others never notice, and what goes
leaves nothing behind. The reference is each variant alone in transformers."""

import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_family
from polymoe.bundle.live import Addition
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.errors import ConfigError, FamilyError, PlanError
from polymoe.model.backends.base import Backend
from polymoe.offline.addition.bits import BITS, fewest_bits, predicted_kl, write_fitting
from polymoe.offline.addition.new_variant import open_new
from polymoe.offline.addition.write_addition import write_addition
from polymoe.offline.api import make_plan
from polymoe.protocol.messages import ChangeFailed, Message, VariantAdded, VariantDropped
from polymoe.protocol.request import EngineRequest, SequenceId, TokenSampling
from references import Case, ReferenceFamily

TOLERANCE = 1e-4
CHANGED_BY_CHANGE = 0.02  # of the values that a patch changes


@dataclass
class Live:
    """An engine with the first two of a family's variants, and what was added to it."""

    family: ReferenceFamily
    bundle: Path
    folder: Path
    engine: EngineCore
    places: dict[str, int] = field(default_factory=dict)
    added: list[Addition] = field(default_factory=list)

    def plan(self, name: str, spec: str | Path, **options: Any) -> tuple[Path, Addition]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        bundle = Bundle.open(self.bundle)
        addition, _ = write_addition(bundle, open_new(bundle, name, str(spec)), folder, **options)
        self.added.append(addition)
        return folder, addition

    def change(self, steps: bool = True) -> list[Message]:
        """Until the change is done; the engine steps meanwhile."""
        assert self.engine.live is not None
        events: list[Message] = []
        deadline = time.monotonic() + 60
        while self.engine.live.is_busy and time.monotonic() < deadline:
            if steps and self.engine.has_work():
                self.engine.step()
            events += self.engine.live.poll()
        return events

    def add(self, name: str, spec: str | Path, **options: Any) -> Addition:
        folder, addition = self.plan(name, spec, **options)
        assert self.engine.live is not None
        self.engine.live.add(1, str(folder), addition)
        (event,) = self.change()
        assert isinstance(event, VariantAdded), event
        self.places[name] = event.info.place
        return addition

    def drop(self, name: str) -> None:
        assert self.engine.live is not None
        self.engine.live.drop(2, self.places.pop(name))
        (event,) = self.change()
        assert isinstance(event, VariantDropped)

    def check(self, cases: list[Case]) -> None:
        """Logits of all cases in one mixed pass."""
        prompts = [(self.places[c.variant], c.prompt + c.tokens[:-1]) for c in cases]
        lengths: list[int] | None = None
        start = self.engine.info.variants[0].decoder_start_token_id
        if start is not None:
            prompts = [(self.places[c.variant], [*c.prompt, start, *c.tokens[:-1]]) for c in cases]
            lengths = [len(c.prompt) for c in cases]
        for case, out in zip(cases, self.engine.prompt_logits(prompts, lengths), strict=True):
            served = out if start is not None else out[len(case.prompt) - 1 :]
            torch.testing.assert_close(served, case.logits, atol=TOLERANCE, rtol=0)
        self.engine.check_integrity()


def make_live(
    arch: str, folder: Path, policy: str = "separate", engine: dict[str, Any] | None = None,
    backend: Backend | None = None, **options: Any,
) -> Live:  # fmt: skip
    family = ReferenceFamily(arch, folder, **options)
    planned = {name: family.paths[name] for name in ("base", "v1")}
    bundle = make_plan(planned, policy, None, folder / "live").path
    config = EngineConfig(
        bundle=str(bundle), device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=1 << 23, block_size=4,
        max_variants=4, **(engine or {}),
    )  # fmt: skip
    return Live(family, bundle, folder, EngineCore(config, backend=backend), {"base": 0, "v1": 1})


def make_patch(base: Path, out: Path, share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write a patch of a share of the values of every tensor of `base`; returns the patched tensors."""
    generator = torch.Generator().manual_seed(seed)
    patch: dict[str, torch.Tensor] = {}
    patched: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        count = max(1, int(share * tensor.numel()))
        places = torch.randperm(tensor.numel(), generator=generator)[:count].sort().values
        flat = tensor.flatten().clone()
        flat[places] += 0.1 * torch.randn(count, generator=generator).to(tensor.dtype)
        patched[name] = flat.view(tensor.shape)
        patch |= {
            f"{name}.indices": places, f"{name}.values": flat[places], f"{name}.shape": torch.tensor(tensor.shape),
        }  # fmt: skip
    save_file(patch, out)
    return patched


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "switch_transformers",
                                  "qwen3_5_moe_text", "granitemoehybrid"])  # fmt: skip
def test_a_third_is_exact_and_others_stay(arch: str, tmp_path: Path) -> None:
    live = make_live(arch, tmp_path)
    cases = live.family.cases
    planned = [c for c in cases if c.variant != "v2"]
    before = live.engine.model.resident_bytes
    live.check(planned)
    addition = live.add("v2", live.family.paths["v2"])
    assert addition.lossless
    live.check(cases)
    live.drop("v2")
    live.check(planned)
    assert live.engine.model.resident_bytes == before
    live.add("v2", live.family.paths["v2"])
    live.check(cases)


def test_only_what_is_new_is_stored(tmp_path: Path) -> None:
    """Identical experts and tensors are shared, few changed values become a lossless delta."""
    live = make_live("mixtral", tmp_path, frozen="q_proj", frozen_experts=[2], changed=0.05)
    addition = live.add("v2", live.family.paths["v2"])
    assert addition.shared_experts == 2  # expert 2 of both layers
    assert addition.own_experts == [0, 0]
    assert addition.deltas == [{"exact": 3}, {"exact": 3}]
    assert all(addition.nonexperts[n] == 0 for n in addition.nonexperts if "q_proj" in n)
    live.check(live.family.cases)
    same = live.add("again", live.family.paths["v1"])
    assert same.device_bytes == 0
    assert same.shared_experts == 8


def test_a_patch_is_exact(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    base = live.family.paths["base"]
    patched = make_patch(base, tmp_path / "patch.safetensors", CHANGED_BY_CHANGE)
    addition = live.add("patched", f"{base}+{tmp_path / 'patch.safetensors'}")
    assert addition.expert_bytes == 0 < addition.delta_bytes
    model = live.family.load_models()["base"]
    save_file(patched, tmp_path / "model.safetensors", {"format": "pt"})
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    live.family.models["patched"] = model
    live.check([live.family.case("patched", [5, 9, 33, 7], 8), *live.family.cases[:2]])


@pytest.mark.parametrize("arch", ["mixtral", "granitemoehybrid"])
def test_what_was_one_for_all_becomes_several(arch: str, tmp_path: Path) -> None:
    """Non-experts that the planned variants share bit for bit, and the new one does not; in modules that run once for
    each variant of a step too."""
    frozen = "norm|q_proj|embed|gate|lm_head|in_proj|conv|A_log"
    paths = make_family(arch, tmp_path / "shared", num_variants=2, frozen=frozen)
    live = make_live(arch, tmp_path)
    bundle = make_plan(paths, "separate", None, tmp_path / "alike").path
    live.engine = EngineCore(
        EngineConfig(bundle=str(bundle), device="cpu", dtype="float32", kv_cache_bytes=1 << 23, max_variants=3)
    )
    live.bundle = bundle
    live.family.paths |= {"v1": paths["v1"]}
    live.family.models.update(live.family.load_models())
    rng = random.Random(0)
    names = ("base", "v1", "v2")
    cases = [live.family.case(n, [rng.randrange(100) for _ in range(9)], 6) for n in names]
    addition = live.add("v2", live.family.paths["v2"])
    assert addition.nonexperts["model.norm.weight"] == -1
    live.check(cases)
    live.drop("v2")
    live.check(cases[:2])
    live.add("v2", live.family.paths["v2"])
    live.check(cases)


def test_requests_in_flight_end_on_their_version(tmp_path: Path) -> None:
    """A place is freed when its last sequence has ended, and not before."""
    live = make_live("mixtral", tmp_path)
    live.add("v2", live.family.paths["v2"])
    case = live.family.case("v2", [3, 4, 5], 13)
    request = EngineRequest(
        request_id=SequenceId("r", 0), variant=live.places["v2"], prompt_token_ids=case.prompt,
        sampling=TokenSampling(max_tokens=13, temperature=0.0),
    )  # fmt: skip
    live.engine.add_request(request)
    tokens = [t for o in live.engine.step() for t in o.new_token_ids]
    assert live.engine.live is not None
    live.engine.live.drop(9, live.places["v2"])
    while live.engine.has_work():
        assert live.engine.live.poll() == []
        tokens += [t for o in live.engine.step() for t in o.new_token_ids]
    assert tokens == case.tokens
    assert live.engine.live.poll() == [VariantDropped(9, live.places["v2"])]
    stats = live.engine.stats()
    assert stats.tokens_served[stats.names.index("v2")] == len(case.prompt) + 12


def test_no_room(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path, engine={"headroom": 10_000})
    with pytest.raises(PlanError, match=r"v2 needs about .* are free for added variants"):
        live.plan("v2", live.family.paths["v2"], free_bytes=10_000)
    folder, addition = live.plan("v2", live.family.paths["v2"])
    assert live.engine.live is not None
    live.engine.live.add(3, str(folder), addition)
    (event,) = live.change()
    assert isinstance(event, ChangeFailed)
    assert "--headroom" in event.message
    live.check([c for c in live.family.cases if c.variant != "v2"])


def test_a_truncated_file_changes_nothing(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    before = live.engine.model.resident_bytes
    for file in ("layer-001.safetensors", "nonexperts.safetensors", "tables.safetensors"):
        folder, addition = live.plan("v2", live.family.paths["v2"])
        (folder / file).write_bytes((folder / file).read_bytes()[:-5])
        assert live.engine.live is not None
        live.engine.live.add(3, str(folder), addition)
        (event,) = live.change()
        assert isinstance(event, ChangeFailed)
        assert file in event.message
    assert live.engine.model.resident_bytes == before
    assert not any(group.reserved for group in live.engine.model.groups)
    live.add("v2", live.family.paths["v2"])
    live.check(live.family.cases)


def test_what_is_no_variant_of_the_model(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    other = make_family("olmoe", tmp_path / "other", num_variants=1)["base"]
    with pytest.raises(FamilyError, match="model_type"):
        live.plan("x", other)
    larger = make_family("mixtral", tmp_path / "larger", num_variants=1, vocab_size=120)["base"]
    with pytest.raises(FamilyError, match="vocabulary"):
        live.plan("y", larger)


@pytest.mark.parametrize("bits", [4, 2])
def test_few_bits(bits: int, tmp_path: Path) -> None:
    """Where there is no room for all of it: a correction of few bits on what is there, near its checkpoint."""
    live = make_live("mixtral", tmp_path, policy="delta")
    whole = live.plan("v2", live.family.paths["v2"])[1]
    addition = live.add("v2", live.family.paths["v2"], bits=bits)
    assert not addition.lossless
    assert addition.deltas == [{f"d{bits}": 4}] * 2
    assert addition.delta_bytes < whole.expert_bytes / 3
    cases = [c for c in live.family.cases if c.variant == "v2"]
    prompts = [(live.places["v2"], c.prompt + c.tokens[:-1]) for c in cases]
    base = [(0, c.prompt + c.tokens[:-1]) for c in cases]
    far = near = 0.0
    for case, own, other in zip(
        cases, live.engine.prompt_logits(prompts), live.engine.prompt_logits(base), strict=True
    ):
        near += float((own[len(case.prompt) - 1 :] - case.logits).abs().mean())
        far += float((other[len(case.prompt) - 1 :] - case.logits).abs().mean())
    assert near < 0.6 * far


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    with pytest.raises(ConfigError, match="--slots"):
        EngineCore(EngineConfig(bundle=str(live.bundle), device="cpu", slots=1, max_variants=4))
    with pytest.raises(ConfigError, match="--max-variants 1 is less"):
        EngineCore(EngineConfig(bundle=str(live.bundle), device="cpu", max_variants=1))


def test_bits_are_as_many_as_there_is_room_for_or_as_a_kl_asks_for(tmp_path: Path) -> None:
    live = make_live("mixtral", tmp_path)
    bundle = Bundle.open(live.bundle)
    new = open_new(bundle, "v2", str(live.family.paths["v2"]))

    def fitted(free: int | None, bits: int | None, max_kl: float | None = None) -> Addition:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            return write_fitting(bundle, new, Path(folder), free, bits, max_kl, lambda _stage, _fraction: None)[0]

    whole = fitted(None, 0)
    assert whole.lossless
    sizes = [fitted(None, bits).device_bytes for bits in BITS]
    assert sizes == sorted(sizes)
    assert sizes[-1] < whole.device_bytes
    assert fitted(whole.device_bytes, 0).lossless
    assert fitted(whole.device_bytes - 1, 0).device_bytes == sizes[-1]
    assert fitted(sizes[2], 0).device_bytes == sizes[2]
    with pytest.raises(PlanError, match="needs about"):
        fitted(sizes[0] - 1, 0)

    losses = [predicted_kl(bundle, new, bits) for bits in BITS]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0
    assert fewest_bits(bundle, new, 1e9) == 1
    assert fewest_bits(bundle, new, 2.001 * losses[2]) == 3
    assert fewest_bits(bundle, new, losses[-1]) is None
    assert fitted(None, None, 2.001 * losses[2]).device_bytes == sizes[2]
    assert fitted(None, None, losses[-1]).lossless
    assert fitted(sizes[4], 0, 2.001 * losses[2]).device_bytes == sizes[4], "there is room for more"
    with pytest.raises(PlanError, match="needs about"):
        fitted(sizes[1], 0, 2.001 * losses[2])
