"""Projections, embeddings and heads in few bits: planned in a budget for all weights, served as what they stand for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from decoded import DecodedFamily
from families import make_family
from polymoe import SamplingParams
from polymoe.bundle.manifest import MANIFEST, PackedNonexpert, encode_manifest
from polymoe.bundle.reader import Bundle
from polymoe.errors import BundleError
from polymoe.kernels.cpu.packed_rows import PackedRows, packed_rows, packed_rows_linear, packed_rows_linear_torch
from polymoe.kernels.cpu.tiles import can_multiply_tiles, tiled_rows
from polymoe.model.backends.choose import choose_backend
from polymoe.model.backends.context import ForwardContext
from polymoe.model.batch.batch import ForwardBatch, RowMap, segments_from_variants
from polymoe.model.variants.packed_variants import PackedVariants
from polymoe.offline.api import make_plan
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.allocate import auto_plan
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.error_on_text import errors_on_text
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import FamilyScan, scan_family
from polymoe.offline.write.bundle_writer import write_bundle
from polymoe.quant.formats import Format, get_format
from references import ReferenceFamily, served_logits
from test_exactness import LOGITS_TOLERANCE, check, load

WAYS = [("int8", "d5"), ("int6", "none"), ("int4", "d2"), ("int8", "none"), ("int3", "d1"), ("int5", "d3")]
PROMPT = list(range(7, 20))


def rows_of(
    way: tuple[str, str], count: int, shape: tuple[int, int], device: str = "cpu"
) -> tuple[PackedRows, list[torch.Tensor]]:
    """Random versions packed, and what each stands for."""
    generator = torch.Generator().manual_seed(len(way[0]) + shape[0])
    base, delta = get_format(way[0]), None if way[1] == "none" else get_format(way[1])

    def pool(fmt: Format, number: int, scale: float) -> tuple[Any, list[torch.Tensor]]:
        entries = [fmt.encode(scale * torch.randn(shape, generator=generator)) for _ in range(number)]
        stacked = {part: torch.stack([entry[part] for entry in entries]).to(device) for part in entries[0]}
        return (fmt, stacked), [fmt.decode(entry, shape, torch.float32) for entry in entries]

    if delta is None:
        bases, versions = pool(base, count, 0.1)
        return packed_rows(bases, None, shape), versions
    (bases, (first,)), (deltas, changes) = pool(base, 1, 0.1), pool(delta, count, 0.02)
    return packed_rows(bases, deltas, shape), [first + change for change in changes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(96, 64), (40, 72)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", [[5], [1, 30, 2], [0, 40, 0, 1]])
def test_products_are_those_with_the_whole_matrices(
    way: tuple[str, str], shape: tuple[int, int], dtype: torch.dtype, counts: list[int]
) -> None:
    weight, versions = rows_of(way, len(counts), shape)
    segments = segments_from_variants(list(range(len(counts))), counts)
    groups = segments.row_groups(RowMap(list(range(len(counts)))))
    given = groups.packed(weight.versions)
    x = torch.randn(sum(counts), shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = torch.cat([x[start:end].float() @ versions[v].T for v, start, end in segments.spans])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for product in (packed_rows_linear, packed_rows_linear_torch):
        torch.testing.assert_close(product(x, weight, given).float(), whole, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counts", [[1], [5], [1, 30, 2], [0, 40, 0, 1], [3, 3, 3, 3]])
@pytest.mark.parametrize("whole", [True, False])
def test_products_of_tiles(way: tuple[str, str], counts: list[int], whole: bool) -> None:
    """In 16-bit activations as close as bfloat16 is; deltas may be as the bundle has them, where rows come and go."""
    weight, versions = rows_of(way, len(counts), (96, 320))
    tiled = tiled_rows(weight, whole)
    if tiled is weight:
        assert not can_multiply_tiles() or not (whole or weight.deltas)
        return
    segments = segments_from_variants(list(range(len(counts))), counts)
    groups = segments.row_groups(RowMap(list(range(len(counts)))))
    given = groups.packed(weight.versions)
    x = torch.randn(sum(counts), 320, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.cat([x[start:end].float() @ versions[v].T for v, start, end in segments.spans])
    for bits, tolerance in (((16, 16), 0.01), ((16, 8), 0.01), ((8, 8), 0.02)):
        found = packed_rows_linear(x, tiled, given, bits).float()
        assert float((found - expected).norm() / expected.norm()) < tolerance
    for v, version in enumerate(versions if whole else ()):
        torch.testing.assert_close(tiled.version(v), version, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS[:2])
def test_of_an_embedding_the_rows_asked_for_are_decoded(way: tuple[str, str]) -> None:
    weight, versions = rows_of(way, 2, (48, 40))
    context = ForwardContext(choose_backend(torch.device("cpu"), torch.float32))
    segments = segments_from_variants([0, 1], [3, 2])
    context.set(ForwardBatch(tokens=segments, sampled=segments))
    table = PackedVariants(weight, RowMap([1, 0]), context, torch.float32)
    ids = torch.tensor([[0, 47, 5, 5, 9]])
    found = torch.nn.functional.embedding(ids, table)
    expected = torch.stack([versions[row][i] for i, row in zip(ids[0].tolist(), [1, 1, 1, 0, 0], strict=True)])
    torch.testing.assert_close(found[0], expected)
    assert table.shape == (48, 40)
    assert table.dtype == torch.float32
    with pytest.raises(NotImplementedError, match=r"\.t is not supported on packed weights"):
        table.t()


def packed_plan(family: Family, scan: FamilyScan, shift: int) -> Plan:
    """Every matrix that may be, each in another way."""
    plan = build_plan(scan, "auto", "1.0x", None, family)
    ways = {name: WAYS[(i + shift) % len(WAYS)] for i, name in enumerate(family.packable)}
    return replace(plan, nonexperts=ways)


@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_served_as_what_they_stand_for(arch: str, tmp_path: Path) -> None:
    """Mixed batches, all variants at once and one slot; the bytes held are those that were promised."""
    original = ReferenceFamily(arch, tmp_path, tie_word_embeddings=arch == "granitemoe")
    family = Family.open(original.paths)
    scan = scan_family(family)
    names = [name for name in family.packable if "embed_tokens" not in name and "lm_head" not in name]
    assert len(names) >= 4 * len(scan.expert_modules)
    assert not any(part in name for name in family.packable for part in ("norm", "mlp.gate.", "router", "bias"))
    path = write_bundle(family, scan, packed_plan(family, scan, len(arch)), tmp_path / "packed").path
    decoded = DecodedFamily(original, path)
    llm = load(path)
    for case, served in zip(decoded.cases, served_logits(llm.engine, decoded.cases), strict=True):
        torch.testing.assert_close(served, case.logits, atol=LOGITS_TOLERANCE, rtol=0)
    promised = Bundle.open(path, verify=True).resident_bytes.by_kind
    assert {kind: llm.engine.model.resident_bytes[kind] for kind in promised} == promised
    linear = [p for p in llm.engine.model.fast_paths if p.part == "linear" and "packed" in p.runs_on]
    assert sum(p.count for p in linear) >= len(names)
    check(load(path, slots=1), decoded)


def test_a_reconfiguration_moves_packed_rows(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints")
    family = Family.open(paths)
    scan = scan_family(family)
    plan = packed_plan(family, scan, 0)
    whole = write_bundle(family, scan, replace(plan, nonexperts={}), tmp_path / "whole").path
    packed = write_bundle(family, scan, plan, tmp_path / "packed").path
    moved = []
    for path in (whole, packed):
        llm = load(path, slots=1)
        for variant in ("v1", "base", "v2"):
            llm.generate([PROMPT], SamplingParams(max_tokens=3), variants=variant)
        stats = llm.engine.model.slots.stats
        moved.append(stats.nbytes / stats.count)
    opened = Bundle.open(packed)
    own = opened.resident_bytes.nonexperts_own / len(opened.variants)
    assert moved[1] < 0.5 * moved[0]
    assert moved[1] == pytest.approx(own, rel=0.01)


@pytest.mark.parametrize("memory", ["1.1x-all", "0.8x-all"])
def test_a_budget_for_all_weights_is_kept(memory: str, tmp_path: Path) -> None:
    paths = make_family("qwen3_moe", tmp_path / "checkpoints")
    bundle = make_plan(paths, "auto", memory, tmp_path / "bundle")
    scan = scan_family(Family.open(paths))
    budget = float(memory.split("x")[0]) * scan.model_bytes
    assert 0.9 * budget < bundle.resident_bytes.total <= budget
    assert bundle.manifest.packed_nonexperts
    assert bundle.manifest.memory == memory
    exact = set(bundle.nonexpert_names) - set(bundle.manifest.packed_nonexperts)
    checkpoint = Family.open(paths).checkpoints[1]
    assert any("mlp.gate.weight" in name for name in exact)
    assert all(torch.equal(bundle.nonexpert(1, name), checkpoint.tensor(name)) for name in exact)


def test_where_nothing_is_gained_nothing_is_packed(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", frozen="embed_tokens|q_proj")
    scan = scan_family(Family.open(paths))
    bundle = make_plan(paths, "auto", "4x-all", tmp_path / "ample")
    assert not bundle.manifest.packed_nonexperts
    assert make_plan(paths, "auto", "1.0x", tmp_path / "experts").manifest.packed_nonexperts == {}
    tight = make_plan(paths, "auto", "1.6x-all", tmp_path / "tight")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert scan.nonexpert_same_as[name] == (0, 0, 0)
    packed = tight.packed_nonexpert(name)
    assert packed is None or packed.delta is None  # one for all: there is no delta to keep


def test_a_version_hash_tells_how_a_variant_is_packed(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", num_variants=2)
    family = Family.open(paths)
    scan = scan_family(family)
    plans = [packed_plan(family, scan, 0), packed_plan(family, scan, 1)]
    bundles = [write_bundle(family, scan, plan, tmp_path / f"b{i}") for i, plan in enumerate(plans)]
    versions = [[v.version for v in bundle.variants] for bundle in bundles]
    assert len({v for found in versions for v in found}) == 4
    again = write_bundle(family, scan, plans[0], tmp_path / "again")
    assert [v.version for v in again.variants] == versions[0]


def test_a_manifest_with_a_format_that_cannot_be(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", num_variants=2)
    bundle = make_plan(paths, "auto", "0.9x-all", tmp_path / "bundle")
    name = next(iter(bundle.manifest.packed_nonexperts))
    for wrong in ({"base": "int7"}, {"base": "exact"}, {"delta": "exact"}, {"shape": [4]}):
        fields = msgspec.structs.asdict(bundle.manifest.packed_nonexperts[name]) | wrong
        packed = bundle.manifest.packed_nonexperts | {name: PackedNonexpert(**fields)}
        changed = msgspec.structs.replace(bundle.manifest, packed_nonexperts=packed)
        (bundle.path / MANIFEST).write_bytes(encode_manifest(changed))
        with pytest.raises(BundleError, match=r"packed_nonexperts"):
            Bundle.open(bundle.path)


def test_what_an_error_costs_is_measured_on_text(tmp_path: Path) -> None:
    """An embedding that is the head too is disturbed in both places; every matrix has a figure for each variant."""
    for tied in (False, True):
        paths = make_family("qwen3_moe", tmp_path / str(tied), num_variants=2, tie_word_embeddings=tied)
        family = Family.open(paths)
        calibration = Calibration(tuple(torch.randint(2, 112, (8, 64)) for _ in range(2)))
        scan = scan_family(family)
        found = errors_on_text(family, scan, calibration, of_all=True).nonexpert_nats
        assert set(found) == set(family.packable)
        assert all((nats > 0).all() and nats.shape == (2,) for nats in found.values())
        assert not errors_on_text(family, scan, calibration).nonexpert_nats
        plan = auto_plan(family, scan, int(0.9 * scan.model_bytes), None, calibration, of_all=True)
        assert plan.nonexperts
