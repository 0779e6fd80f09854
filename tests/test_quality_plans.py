"""Plans with merged, packed and corrected experts: what they hold, what they cost, and what is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from damage import Liar
from families import make_family
from polymoe.bundle.fidelity import record_fidelity
from polymoe.bundle.manifest import Fidelity, VariantRecord
from polymoe.bundle.reader import Bundle
from polymoe.console import Console
from polymoe.errors import BundleError, PlanError, PolymoeError
from polymoe.evaluate.target import meet_target
from polymoe.offline.api import inspect_bundle, make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.budget import build_plan, expert_budget, parse_memory
from polymoe.offline.plan.layout import lay_out
from polymoe.offline.plan.options import POLICIES, PlanOptions, file_lists
from polymoe.offline.plan.plan import Plan
from polymoe.offline.plan.sizes import ExpertSizes, plan_bytes
from polymoe.offline.similarity.relation import related_groups
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.offline.write.bundle_writer import write_bundle

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}), ("mean", {"base": "int4"}), ("paper", {"base": "int8"}), ("separate", {"base": "int4"}),
    ("delta", {}), ("delta", {"base": "int4", "delta_bits": 1}), ("delta", {"base": "fp8", "delta_bits": 4}),
    ("cluster", {"clusters": 2}), ("cluster", {"clusters": 3, "base": "int8"}), ("exact-delta", {}), ("auto", {}),
]  # fmt: skip


@pytest.mark.parametrize("memory", [None, "0.6x", "1.3x", "3x", "200KiB"])
@pytest.mark.parametrize(("policy", "options"), OPTIONS)
def test_budgets_are_kept(
    family: Family, scan: FamilyScan, policy: str, options: dict[str, Any], memory: str | None
) -> None:
    plan = build_plan(scan, policy, memory, PlanOptions(**options), family)
    plan.check_integrity()
    assert plan.policy == policy
    layout = lay_out(plan)
    bases, deltas = plan_bytes(layout, ExpertSizes.of(family))
    if memory is not None and policy != "exact-delta":
        assert bases + deltas <= expert_budget(parse_memory(memory), scan)
    for v, layer, e in np.ndindex(*plan.serving.shape):
        base, delta = int(layout.table[v, layer, e]), int(layout.delta[v, layer, e])
        owner = layout.resident[layer][base] if base >= 0 else layout.host[layer][-1 - base]
        assert owner == (int(plan.serving[v, layer, e]), e)
        assert (base >= 0) == plan.resident[v, layer, e]
        if base < 0:  # absent: its own expert, as it is
            assert plan.serving[v, layer, e] == scan.expert_same_as[v, layer, e]
            assert delta == -1
        if delta >= 0:
            owners = [owner for pool in layout.deltas[layer].values() for owner in pool]
            assert owners[delta] == (int(plan.delta_owner[v, layer, e]), e)
    # Expert 2 is identical everywhere: one base, and a delta only against a rounded one, the same for all.
    assert (layout.table[:, :, 2] == layout.table[0, :, 2]).all()
    assert (layout.delta[:, :, 2] == layout.delta[0, :, 2]).all()


def test_spare_memory_makes_positions_lossless_the_farthest_first(family: Family, scan: FamilyScan) -> None:
    plan = build_plan(scan, "mean", "1.5x", None, family)
    own = (plan.serving == scan.expert_same_as).all(axis=0) & (plan.merge == "own")
    far = np.argsort(-scan.distance.reshape(-1), kind="stable")
    assert own.reshape(-1)[far[:2]].all()  # two more experts each, four are spare
    assert own.sum() == 2 + 2  # and the identical ones
    little = build_plan(scan, "mean", "0.5x", None, family)
    assert little.resident[0].reshape(-1)[np.argsort(scan.distance.reshape(-1), kind="stable")[:4]].all()
    assert little.resident[0].sum() == 4


@pytest.mark.parametrize(
    ("policy", "options", "memory", "message"),
    [
        ("regmean", {}, None, "--calibrate VARIANT=FILE"),
        ("delta", {"delta_bits": 6}, None, "1, 2, 3 or 4, got 6"),
        ("delta", {"base": "int2"}, None, "--base int2 is unknown; use stored, fp8"),
        ("mean", {"delta_bits": 2}, None, "--delta-bits belongs to --policy delta, not to mean"),
        ("delta", {"clusters": 2}, None, "--clusters belongs to --policy cluster"),
        ("cluster", {"clusters": 0}, None, "at least 1, got 0"),
        ("auto", {"base": "int4"}, None, "chooses the formats itself"),
        ("exact-delta", {"base": "int4"}, None, "needs bases as they are stored"),
        ("auto", {"min_top1": 1.5}, None, "above 0 and up to 1; got 1.5"),
        ("auto", {"min_top1": 0.9}, "1.0x", "either --memory or --min-top1"),
        ("auto", {}, "0.01x", "the minimum is"),
        ("mean", {"host_share": 0.1}, None, "--host-share belongs to --policy auto"),
        ("auto", {"host_share": 1.5}, None, "from 0 to below 1; got 1.5"),
        ("auto", {"distill": 10}, None, "--distill learns from text"),
        ("best", {}, None, "unknown policy 'best'; there are auto"),
    ],
)
def test_what_is_refused(
    family: Family, scan: FamilyScan, policy: str, options: dict[str, Any], memory: str | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        build_plan(scan, policy, memory, PlanOptions(**options), family)


def test_calibration_text_for_an_unknown_variant(trio: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox " * 200)
    with pytest.raises(PlanError, match=r"v9.*there are base, v1, v2"):
        make_plan(trio, "mean", None, tmp_path / "b", options=PlanOptions(calibrate={"v9": [text]}))
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
    with pytest.raises(PolymoeError, match="does not exist"):
        file_lists([f"base={tmp_path / 'none'}"], "--calibrate")
    assert file_lists([f"a={text}", f"b={text}", f"a={text}"], "--calibrate") == {"a": [text, text], "b": [text]}


def test_calibrated_plans(trio: dict[str, Path], tmp_path: Path) -> None:
    """The text decides the merge, and nothing of an interrupted run stays behind."""
    text = tmp_path / "t.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 100)
    calibrate = {name: [text] for name in trio}
    bundles = [
        make_plan(trio, policy, None, tmp_path / policy, options=PlanOptions(calibrate=calibrate, base=base))
        for policy, base in (("regmean", "stored"), ("delta", "int4"))
    ]
    plain = make_plan(trio, "delta", None, tmp_path / "plain", options=PlanOptions(base="int4"))
    assert bundles[1].resident_bytes == plain.resident_bytes
    assert bundles[1].variants[0].version != plain.variants[0].version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "plain", "regmean", "t.txt"]


class TestUnrelated:
    @pytest.fixture
    def strangers(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("strangers")  # not tmp_path, which must stay empty
        first = make_family("mixtral", folder / "a", num_variants=2, seed=1)
        second = make_family("mixtral", folder / "b", num_variants=1, seed=9)
        return {"base": first["base"], "tuned": first["v1"], "other": second["base"]}

    def test_refused_with_the_distances(self, strangers: dict[str, Path], tmp_path: Path) -> None:
        for policy in ("paper", "mean", "auto"):
            with pytest.raises(PlanError, match=r"\{base, tuned\} and \{other\} .*base–other 1\.4.*--force"):
                make_plan(strangers, policy, None, tmp_path / "b")
        assert not list(tmp_path.iterdir())

    def test_where_nothing_is_lost_it_does_not_matter(self, strangers: dict[str, Path], tmp_path: Path) -> None:
        assert make_plan(strangers, "separate", None, tmp_path / "b").manifest.policy == "separate"

    def test_force_is_a_warning(self, strangers: dict[str, Path], tmp_path: Path) -> None:
        console = Console(record=True, width=200)
        options = PlanOptions(accept_unrelated=True)
        make_plan(strangers, "mean", None, tmp_path / "b", console=console, options=options)
        assert "warning: {base, tuned} and {other} do not seem" in console.export_text()

    def test_chains_of_near_pairs_are_one_family(self) -> None:
        distance = np.array([[0, 0.8, 1.2, 1.4], [0.8, 0, 0.8, 1.4], [1.2, 0.8, 0, 1.4], [1.4, 1.4, 1.4, 0]])
        assert related_groups(distance) == [[0, 1, 2], [3]]


class TestBundle:
    @pytest.fixture
    def bundle(self, family: Family, scan: FamilyScan, tmp_path: Path) -> Bundle:
        plan = build_plan(scan, "delta", "0.8x", PlanOptions(base="int4", delta_bits=3), family)
        return write_bundle(family, scan, plan, tmp_path / "b")

    def test_files_say_what_is_promised(self, bundle: Bundle) -> None:
        layers = range(len(bundle.expert_modules))
        tensors = [
            [t for layer in layers for pool in pools(layer).values() for parts in pool.values() for t in parts.values()]
            for pools in (bundle.packed_bases, bundle.packed_deltas)
        ]
        stored = [t for layer in layers for t in bundle.resident_experts(layer).values()]
        assert bundle.resident_bytes.resident_experts == sum(t.nbytes for t in (*stored, *tensors[0]))
        assert bundle.resident_bytes.deltas == sum(t.nbytes for t in tensors[1])
        assert bundle.delta is not None
        assert bundle.resident_bytes.tables == bundle.table.nbytes + bundle.delta.nbytes
        assert Bundle.open(bundle.path, verify=True).manifest == bundle.manifest

    def test_versions_name_the_content(self, family: Family, scan: FamilyScan, bundle: Bundle, tmp_path: Path) -> None:
        def versions(plan: Plan, name: str) -> list[str]:
            return [v.version for v in write_bundle(family, scan, plan, tmp_path / name).variants]

        again = build_plan(scan, "delta", "0.8x", PlanOptions(base="int4", delta_bits=3), family)
        finer = build_plan(scan, "delta", "0.8x", PlanOptions(base="int4", delta_bits=4), family)
        first = [v.version for v in bundle.variants]
        assert versions(again, "again") == first
        assert not set(versions(finer, "finer")) & set(first)
        assert len(set(first)) == 3

    @pytest.mark.parametrize("file", ["experts/layer-000.safetensors", "deltas/layer-001.safetensors"])
    def test_damaged_files_are_named(self, bundle: Bundle, file: str) -> None:
        path = bundle.path / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleError, match=f"{file} has changed"):
            Bundle.open(bundle.path, verify=True)
        path.unlink()
        with pytest.raises(BundleError, match=f"{file} is missing"):
            Bundle.open(bundle.path)

    def test_pools_of_another_size_are_refused(self, bundle: Bundle) -> None:
        layer = next(index for index, pools in enumerate(bundle.manifest.delta_pools) if pools)
        Liar(bundle.path).edit_manifest(lambda m: m["delta_pools"][layer].update(d3=1000))
        with pytest.raises(BundleError, match=rf"deltas/layer-00{layer}\.safetensors has d3\..* not as planned"):
            Bundle.open(bundle.path)

    def test_bundles_of_the_first_version_are_refused(self, bundle: Bundle) -> None:
        path = bundle.path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
        with pytest.raises(BundleError, match="has bundle format 1, this polymoe reads 2; plan it again"):
            Bundle.open(bundle.path)

    def test_fidelity_is_recorded_and_shown(self, family: Family, scan: FamilyScan, tmp_path: Path) -> None:
        path = write_bundle(family, scan, build_plan(scan, "auto", "0.8x", None, family), tmp_path / "b").path
        before = Bundle.open(path)
        predicted = before.variants[1].predicted_error
        assert predicted is not None
        assert all(variant.fidelity is None for variant in before.variants)
        measured = Fidelity(
            text="held out", tokens=1234, kl=0.0123, top1=0.987, perplexity_original=5.5, perplexity_served=5.75
        )
        record_fidelity(path, {"v1": measured})
        record_fidelity(path, {"base": measured})  # v1 keeps its own
        after = Bundle.open(path, verify=True)
        assert [v.fidelity is None for v in after.variants] == [False, False, True]
        assert after.variants[1].fidelity is not None
        assert (after.variants[1].fidelity.kl, after.variants[1].fidelity.predicted_error) == (0.0123, predicted)
        assert [v.version for v in after.variants] == [v.version for v in before.variants]
        with pytest.raises(BundleError, match="no variant v9; there are base, v1, v2"):
            record_fidelity(path, {"v9": measured})
        console = Console(record=True, width=160)
        inspect_bundle(path, console)
        text = console.export_text()
        for part in ("policy auto 0.8x", "0.0123", "0.987", "5.75", "held out", "1,234", "not measured", "layer"):
            assert part in text


@pytest.mark.parametrize(
    ("agreements", "cautions", "said"),
    [
        ([0.995], [1.0], "Target met: math"),
        ([0.97, 0.992], [1.0, 9.0], "planning again with more bytes (2 of 3)"),
        ([0.98, 0.989, 0.985], [1.0, 4.0, 6.0], "warning: math agrees with its original on 98.50% of tokens"),
    ],
)
def test_a_target_that_is_missed_is_planned_again(agreements: list[float], cautions: list[float], said: str) -> None:
    """Three times at most, and what is missing in the end is said."""
    console = Console(record=True, width=200)
    asked: list[float] = []
    overwritten: list[bool] = []

    def make(options: PlanOptions, overwrite: bool) -> Any:
        asked.append(options.caution)
        overwritten.append(overwrite)

    def measure(_: Any) -> dict[str, Fidelity]:
        worst = Fidelity(
            perplexity_original=5, perplexity_served=5, kl=0.01, top1=agreements[len(asked) - 1], tokens=1000
        )
        return {"base": msgspec.structs.replace(worst, top1=1.0), "math": worst}

    meet_target(make, measure, PlanOptions(min_top1=0.99), False, console)
    assert asked == pytest.approx(cautions)
    assert overwritten == [False, True, True][: len(asked)]
    assert said in console.export_text()


def test_manifests_keep_the_name_that_predictions_are_stored_under() -> None:
    """Bundles of earlier versions have `predicted_damage`; with another name their digests and figures were lost."""
    stored = {"text": "t", "tokens": 1, "kl": 0.1, "top1": 0.9, "perplexity_original": 2.0, "perplexity_served": 2.5}
    figures = msgspec.convert({**stored, "predicted_damage": 0.02}, Fidelity)
    assert figures.predicted_error == 0.02
    assert msgspec.to_builtins(figures) == {**stored, "predicted_damage": 0.02}
    assert "predicted_damage" in VariantRecord.__struct_encode_fields__


def test_every_policy_is_listed() -> None:
    assert set(POLICIES) == {"auto", "paper", "separate", "mean", "regmean", "delta", "exact-delta", "cluster"}
