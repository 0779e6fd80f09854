"""Variants come and go where the matrices beside the experts are packed too: one base for all, or a base for each.

What is added without loss is its checkpoint in transformers; in few bits it is what its files stand for. Planned ones
stay what their bundle stands for, and what goes leaves nothing.
"""

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.baselines.weights import put_weights
from decoded import DecodedFamily
from polymoe.bundle.addition import AddedFiles
from polymoe.bundle.live import ADDED_NONEXPERTS, OWN, Addition, LiveState
from polymoe.bundle.manifest import packed_name, read_manifest
from polymoe.bundle.manifest_checks import check_manifest
from polymoe.bundle.reader import Bundle
from polymoe.config import EngineConfig
from polymoe.engine.core import EngineCore
from polymoe.errors import BundleError, PlanError
from polymoe.kernels.cpu.tiles import can_multiply_tiles
from polymoe.model.backends.base import Backend
from polymoe.model.batch.batch import segments_from_variants
from polymoe.offline.addition.bits import predicted_kl, write_fitting
from polymoe.offline.addition.new_variant import open_new
from polymoe.offline.addition.planned import PlannedLayer
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle
from polymoe.protocol.messages import ChangeFailed
from polymoe.quant.formats import get_format
from references import Case, ReferenceFamily
from test_live_engine import Live, make_patch
from test_live_server import PROMPT, Admin, alone, files, paths, serve  # noqa: F401  (a fixture)
from test_packed_nonexperts import packed_plan

EVEN: dict[str, Any] = {
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 32,
}  # of which all products can be in tiles


def packed_bundle(family: ReferenceFamily, folder: Path) -> Path:
    """Of the first two variants: every matrix in another way."""
    planned = Family.open({name: family.paths[name] for name in ("base", "v1")})
    scan = scan_family(planned)
    return write_bundle(planned, scan, packed_plan(planned, scan, 0), folder / "packed").path


def make_packed(
    arch: str, folder: Path, dtype: Any = "float32", backend: Backend | None = None, **options: Any
) -> tuple[Live, list[Case]]:
    """An engine over such a bundle, and what the planned variants and the third say."""
    original = ReferenceFamily(arch, folder, **options)
    bundle = packed_bundle(original, folder)
    config = EngineConfig(
        bundle=str(bundle), device="cpu", dtype=dtype, num_threads=1, kv_cache_bytes=1 << 23, block_size=4,
        max_variants=4,
    )  # fmt: skip
    live = Live(original, bundle, folder, EngineCore(config, backend=backend), {"base": 0, "v1": 1})
    decoded = DecodedFamily(original, bundle)
    decoded.paths = {name: original.paths[name] for name in ("base", "v1")}
    rng, vocab = random.Random(arch), 100
    cases = [
        (original if name == "v2" else decoded).case(name, [rng.randrange(vocab) for _ in range(3 + 5 * i)], 7 - i)
        for i, name in enumerate(("base", "v1", "v2", "v2", "base"))
    ]
    return live, cases


def of(cases: list[Case], *names: str) -> list[Case]:
    return [case for case in cases if case.variant in names]


@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "granitemoe"])
def test_a_third_is_exact_and_others_stay(arch: str, tmp_path: Path) -> None:
    live, cases = make_packed(arch, tmp_path, tie_word_embeddings=arch == "granitemoe")
    before, held = live.engine.model.resident_bytes, dict(live.engine.model.packed)
    live.check(of(cases, "base", "v1"))
    addition = live.add("v2", live.family.paths["v2"])
    assert addition.lossless
    assert not addition.packed
    live.check(cases)
    grown = live.engine.model.resident_bytes["nonexperts_own"] - before["nonexperts_own"]
    assert grown == addition.nonexpert_bytes
    live.drop("v2")
    assert live.engine.model.resident_bytes == before
    assert all(held[n].packed.num_bytes == w.packed.num_bytes for n, w in live.engine.model.packed.items())
    live.check(of(cases, "base", "v1"))
    # A planned one goes, others build on what it leaves.
    live.drop("v1")
    live.add("v2", live.family.paths["v2"])
    live.check(of(cases, "base", "v2"))


def served(live: Live, name: str, files: AddedFiles) -> Any:
    """The stock model with what an addition's files stand for."""
    bundle, addition = Bundle.open(live.bundle), files.addition
    model = live.family.load_models()["v2"]
    for tensor, source in addition.nonexperts.items():
        if source != OWN:
            put_weights(model, [(tensor, bundle.nonexpert(source, tensor))])
        elif (delta := addition.packed.get(tensor)) is not None:
            found = bundle.packed_nonexpert(tensor)
            assert found is not None
            parts = bundle.nonexpert_parts(None, tensor) if found.delta else bundle.own_parts(delta.base, tensor)
            base = get_format(found.base).decode(parts, tuple(found.shape), torch.float32)
            weight = get_format(delta.delta).corrected(base, files.packed_nonexpert(tensor))
            put_weights(model, [(tensor, weight)])
            torch.testing.assert_close(live.engine.model.packed[tensor].packed.version(live.places[name]), weight)
    for layer, path in enumerate(bundle.expert_modules):
        planned, stacks = PlannedLayer(bundle, layer), dict[str, list[torch.Tensor]]()
        planned_deltas = sum(bundle.manifest.delta_pools[layer].values())
        ((fmt, deltas),) = ((get_format(n), tensors) for n, tensors in files.own_deltas(layer).items())
        for expert in range(bundle.manifest.num_experts):
            base_of = planned.base(int(files.table[layer, expert]))
            own = int(files.delta[layer, expert]) - planned_deltas
            for tensor, under in base_of.items():
                stacks.setdefault(tensor, []).append(fmt.corrected(under, fmt.entry(deltas[tensor], own)))
        put_weights(model, ((f"{path}.{tensor}", torch.stack(stack)) for tensor, stack in stacks.items()))
    return model


@pytest.mark.parametrize("bits", [5, 2])
def test_few_bits_on_the_bases_that_are_there(bits: int, tmp_path: Path) -> None:
    live, cases = make_packed("mixtral", tmp_path)
    folder, addition = live.plan("v2", live.family.paths["v2"], bits=bits)
    assert {delta.delta for delta in addition.packed.values()} == {f"d{bits}"}
    assert addition.packed.keys() == read_manifest(live.bundle).packed_nonexperts.keys()
    whole = live.plan("v2", live.family.paths["v2"])[1]
    assert addition.nonexpert_bytes < whole.nonexpert_bytes / 2
    live.add("v2", live.family.paths["v2"], bits=bits)
    live.family.models["v2"] = served(live, "v2", AddedFiles(folder, addition, read_manifest(live.bundle)))
    third = [live.family.case("v2", case.prompt, case.max_tokens) for case in of(cases, "v2")]
    live.check([*of(cases, "base", "v1"), *third])
    if bits == 5:  # it is near its checkpoint, where others are not
        far = [live.engine.prompt_logits([(0, case.prompt)])[0][-1] for case in of(cases, "v2")]
        for mine, theirs, other in zip(third, of(cases, "v2"), far, strict=True):
            true = theirs.logits[0]
            assert float((mine.logits[0] - true).norm()) < 0.3 * float((other - true).norm())


def test_what_a_planned_variant_has_is_shared(tmp_path: Path) -> None:
    """Its matrices become the same codes; no weight is stored twice."""
    live, cases = make_packed("mixtral", tmp_path)
    same = live.add("again", live.family.paths["v1"], bits=5)
    packed = read_manifest(live.bundle).packed_nonexperts
    assert all(same.nonexperts[name] == 1 for name in packed)
    assert same.nonexpert_bytes == 0
    assert not same.packed
    weights = live.engine.model.packed.values()
    assert all(
        torch.equal(w.packed.version(live.places["again"]), w.packed.version(live.places["v1"])) for w in weights
    )
    live.drop("again")
    live.check(of(cases, "base", "v1"))


@pytest.mark.parametrize("bits", [None, 4])
def test_in_tiles(bits: int | None, tmp_path: Path) -> None:
    """In bfloat16 all pools are laid out in tiles, those of variants that are added too."""
    live, cases = make_packed("mixtral", tmp_path, dtype="bfloat16", **EVEN)
    weights = live.engine.model.packed
    projections = [name for name in weights if "_proj" in name]
    assert all(weights[name].packed.is_tiled for name in projections) == can_multiply_tiles()
    folder, addition = live.plan("v2", live.family.paths["v2"], bits=bits)
    live.add("v2", live.family.paths["v2"], bits=bits)
    if bits is not None:
        live.family.models["v2"] = served(live, "v2", AddedFiles(folder, addition, read_manifest(live.bundle)))
    third = [live.family.case("v2", case.prompt, case.max_tokens) for case in of(cases, "v2")]
    errors = []
    for case in [*of(cases, "base", "v1"), *third]:
        (out,) = live.engine.prompt_logits([(live.places[case.variant], case.prompt + case.tokens[:-1])])
        errors.append(float((out[len(case.prompt) - 1 :] - case.logits).norm() / case.logits.norm()))
    assert statistics.median(errors) < 0.03, "a router may choose another expert in bfloat16"
    generator, context = torch.Generator().manual_seed(0), live.engine.model.context
    segments = segments_from_variants([0, 1, live.places["v2"]], [3, 1, 20])
    for name in projections:
        rows = weights[name].packed
        x = torch.randn(24, rows.shape[1], generator=generator).bfloat16()
        whole = torch.cat([x[start:end].float() @ rows.version(p).T for p, start, end in segments.spans])
        found = context.backend.packed_linear(x, rows, segments, live.engine.model.places).float()
        assert float((found - whole).norm() / whole.norm()) < 0.02


def test_bits_fit_the_room_and_the_kl(tmp_path: Path) -> None:
    live, _ = make_packed("mixtral", tmp_path)
    bundle = Bundle.open(live.bundle)
    new = open_new(bundle, "v2", str(live.family.paths["v2"]))

    def fitted(free: int, bits: int | None) -> Addition:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            return write_fitting(bundle, new, Path(folder), free, bits, None, lambda _stage, _fraction: None)[0]

    sizes = {bits: fitted(1 << 40, bits).device_bytes for bits in (1, 3, 5)}
    assert fitted(sizes[3], 0).device_bytes == sizes[3]
    assert {delta.delta for delta in fitted(sizes[3], 0).packed.values()} == {"d3"}
    with pytest.raises(PlanError, match="needs about"):
        fitted(sizes[1] - 1, 0)
    losses = [predicted_kl(bundle, new, bits) for bits in (1, 3, 5)]
    assert losses == sorted(losses, reverse=True)
    packed = dict(bundle.manifest.packed_nonexperts)
    bundle.manifest.packed_nonexperts.clear()
    assert predicted_kl(bundle, new, 3) < losses[1], "what is beside the experts counts"
    bundle.manifest.packed_nonexperts.update(packed)


def test_a_damaged_delta_changes_nothing(tmp_path: Path) -> None:
    live, cases = make_packed("mixtral", tmp_path)
    before = live.engine.model.resident_bytes
    folder, addition = live.plan("v2", live.family.paths["v2"], bits=3)
    name = next(iter(addition.packed))
    other = replace_delta(addition, name, "d4")
    assert live.engine.live is not None
    for wrong, said in ((other, packed_name("d4", name, "codes")), (addition, ADDED_NONEXPERTS)):
        if wrong is addition:
            file = folder / ADDED_NONEXPERTS
            file.write_bytes(file.read_bytes()[:-3])
        live.engine.live.add(3, str(folder), wrong)
        (event,) = live.change()
        assert isinstance(event, ChangeFailed)
        assert said in event.message
    assert live.engine.model.resident_bytes == before
    live.check(of(cases, "base", "v1"))
    live.add("v2", live.family.paths["v2"])
    live.check(cases)


def replace_delta(addition: Addition, name: str, delta: str) -> Addition:
    changed = msgspec.structs.replace(addition.packed[name], delta=delta)
    return msgspec.structs.replace(addition, packed=addition.packed | {name: changed})


def test_over_http(paths: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Add, replace, patch, remove and plan again; the next start serves the same set."""
    planned = {name: paths[name] for name in ("base", "v1")}
    bundle = make_plan(planned, "auto", "0.9x-all", tmp_path / "bundle").path
    assert read_manifest(bundle).packed_nonexperts
    root = paths["base"].parent
    before = files(bundle)
    with serve(bundle, root) as server:
        admin = Admin(server, root)
        told = {name: admin.tokens(name, PROMPT) for name in planned}
        held = server.stats().resident_bytes
        admin.ok("POST", body={"name": "math", "source": "v2", "wait": True})
        assert admin.tokens("math", PROMPT) == alone(paths, "v2", PROMPT)
        admin.ok("PUT", "/math", {"source": "v3", "wait": True})
        assert admin.tokens("math", PROMPT) == alone(paths, "v3", PROMPT)
        make_patch(paths["v3"], root / "packed-patch.safetensors", 0.02)
        admin.ok("PUT", "/math", {"source": f"v3+{root / 'packed-patch.safetensors'}", "wait": True, "bits": 5,
                                "evict": "previous"})  # fmt: skip
        told["math"] = admin.tokens("math", PROMPT)
        state = admin.state()
        assert {name: admin.tokens(name, PROMPT) for name in told} == told
        Bundle.open(bundle, verify=True)
    with serve(bundle, root) as server:
        admin = Admin(server, root)
        assert admin.state() == state
        assert {name: admin.tokens(name, PROMPT) for name in told} == told
        admin.ok("DELETE", "/math?wait=true")
        server.wait_for(lambda: server.stats().resident_bytes == held)
        assert files(bundle) == before
        admin.ok("POST", body={"name": "math", "source": "v2", "wait": True})
        admin.ok("POST", "/-/replan", {"wait": True})
        manifest = read_manifest(bundle)
        assert [variant.name for variant in manifest.variants] == ["base", "v1", "math"]
        assert manifest.packed_nonexperts
        assert admin.tokens("math", PROMPT)


def test_a_manifest_with_a_delta_that_cannot_be(tmp_path: Path) -> None:
    live, _ = make_packed("mixtral", tmp_path)
    _, addition = live.plan("v2", live.family.paths["v2"], bits=3)
    name, manifest = next(iter(addition.packed)), read_manifest(live.bundle)
    names = {"base": manifest.variants[0].version, "v2": addition.version}
    for wrong in ("exact", "int4", "d9"):
        state = LiveState(names=names, additions=[replace_delta(addition, name, wrong)])
        with pytest.raises(BundleError, match="live has no such delta of"):
            check_manifest("here", msgspec.structs.replace(manifest, live=state))
