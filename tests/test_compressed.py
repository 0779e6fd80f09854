"""Merged, packed and corrected experts are served as what they stand for, in any mixture, within the bytes promised."""

from pathlib import Path
from typing import Any

import pytest
import torch

from decoded import DecodedFamily, decoded_experts
from families import make_family
from polymoe import LLM
from polymoe.bundle.reader import Bundle
from polymoe.offline.api import make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from polymoe.offline.write.bundle_writer import write_bundle
from references import ReferenceFamily, served_logits
from test_exactness import LOGITS_TOLERANCE, check, load

ARCHITECTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "switch_transformers"]
PLANS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "int4 + 2 bit": ("delta", None, {"base": "int4"}),
    "stored + 1 bit": ("delta", None, {"delta_bits": 1}),
    "fp8 + 3 bit, absent": ("delta", "0.5x", {"base": "fp8", "delta_bits": 3}),
    "int8 + 4 bit, spare": ("delta", "2.5x", {"base": "int8", "delta_bits": 4}),
    "clusters": ("cluster", None, {"clusters": 2, "base": "int8"}),
    "mean": ("mean", None, {}),
    "paper, int4": ("paper", "0.75x", {"base": "int4"}),
    "separate, int8, absent": ("separate", "1.0x", {"base": "int8"}),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceFamily:
    return ReferenceFamily(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def scanned(family: ReferenceFamily) -> tuple[Family, FamilyScan]:
    opened = Family.open(family.paths)
    return opened, scan_family(opened)


def write(scanned: tuple[Family, FamilyScan], out: Path, plan: str) -> Path:
    family, scan = scanned
    policy, memory, options = PLANS[plan]
    made = build_plan(scan, policy, memory, PlanOptions(**options), family)
    return write_bundle(family, scan, made, out).path


@pytest.fixture(scope="module")
def absent(
    family: ReferenceFamily, scanned: tuple[Family, FamilyScan], tmp_path_factory: pytest.TempPathFactory
) -> DecodedFamily:
    """Some experts are in the host tier."""
    folder = tmp_path_factory.mktemp("absent")
    return DecodedFamily(family, write(scanned, folder / "bundle", "fp8 + 3 bit, absent"))


class SparseFamily(ReferenceFamily):
    """Variants that differ from the base in one value in ten."""

    def __init__(self, arch: str, folder: Path) -> None:
        self.arch, self.folder, self.num_requests = arch, folder, 8
        self.paths = make_family(arch, folder / "checkpoints", changed=0.1)
        self.bundle = make_plan(self.paths, "exact-delta", None, folder / "bundle").path


@pytest.fixture(scope="module")
def sparse(family: ReferenceFamily, tmp_path_factory: pytest.TempPathFactory) -> SparseFamily:
    return SparseFamily(family.arch, tmp_path_factory.mktemp("sparse"))


def held_bytes(llm: LLM) -> dict[str, int]:
    """Bytes of the storages that the pool's experts and deltas really occupy, each storage once."""
    found: dict[str, dict[int, int]] = {"resident_experts": {}, "deltas": {}}

    def count(kind: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        found[kind][storage.data_ptr()] = storage.nbytes()

    for layer in llm.engine.model.pool.layers:
        for tensor in layer.resident.values():
            count("resident_experts", tensor)
        for kind, pools in (
            ("resident_experts", layer.compressed.bases if layer.compressed else ()),
            ("deltas", layer.compressed.deltas if layer.compressed else ()),
        ):
            for pool in pools:
                for parts in pool.tensors.values():
                    for tensor in parts.values():
                        count(kind, tensor)
    return {kind: sum(sizes.values()) for kind, sizes in found.items()}


@pytest.mark.parametrize("plan", PLANS)
def test_served_as_the_decoded_experts(
    family: ReferenceFamily, scanned: tuple[Family, FamilyScan], plan: str, tmp_path: Path
) -> None:
    bundle = write(scanned, tmp_path / "bundle", plan)
    cases = DecodedFamily(family, bundle).forced_cases()
    llm = load(bundle)
    for case, served in zip(cases, served_logits(llm.engine, cases), strict=True):
        torch.testing.assert_close(served, case.logits, atol=LOGITS_TOLERANCE, rtol=0)
    promised = Bundle.open(bundle).resident_bytes.by_kind
    assert held_bytes(llm) == {kind: promised[kind] for kind in ("resident_experts", "deltas")}
    assert {kind: llm.engine.model.resident_bytes[kind] for kind in promised} == promised


@pytest.mark.parametrize("options", [{}, {"slots": 1}, {"max_num_batched_tokens": 5}, {"expert_cache_bytes": 0}])
def test_generation_in_mixed_batches(absent: DecodedFamily, options: dict[str, Any]) -> None:
    llm = load(absent.bundle, **options)
    check(llm, absent)
    assert llm.engine.stats().expert_misses > 0


@pytest.mark.parametrize("slots", [1, 3])
def test_exact_deltas_are_each_variant(sparse: SparseFamily, slots: int) -> None:
    """Fine-tunes that changed one value in ten: smaller than `separate`, and no token differs."""
    llm = load(sparse.bundle, slots=slots)
    check(llm, sparse)
    manifest = Bundle.open(sparse.bundle).manifest
    assert sum(pools.get("exact", 0) for pools in manifest.delta_pools) > 0
    assert manifest.resident_bytes.deltas < manifest.resident_bytes.resident_experts
    assert held_bytes(llm)["deltas"] == manifest.resident_bytes.deltas


def test_pairs_share_one_delta_with_two_signs(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "c", num_variants=2, frozen_experts=[1])
    bundle = make_plan(paths, "delta", None, tmp_path / "b", options=PlanOptions(delta_bits=2))
    assert bundle.manifest.delta_pools == [{"d2": 3}] * 2  # expert 1 is the same in both
    assert bundle.manifest.resident_experts == [4, 4]
    assert bundle.delta is not None
    assert bundle.sign is not None
    assert bundle.delta[:, 0].tolist() == [[0, -1, 1, 2]] * 2
    assert bundle.sign[:, 0].tolist() == [[1, 1, 1, 1], [-1, 1, -1, -1]]
    originals = [Family.open(paths).checkpoints[v].tensor("model.layers.0.mlp.experts.down_proj") for v in (0, 1)]
    for variant, original in enumerate(originals):
        served = decoded_experts(bundle, variant, 0)["down_proj"]
        assert torch.equal(served[1], original[1])
        apart = (originals[0] - originals[1])[[0, 2, 3]].norm() / 2
        assert (served - original)[[0, 2, 3]].norm() < 0.5 * apart
