"""Switch Transformers fitted to text: the streamed pass over pairs is the stock model's, its plans are nearer."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from encoded import flat, served_experts
from families import make_switch_family, write_pairs
from polymoe.bundle.reader import Bundle
from polymoe.cli.main import app
from polymoe.errors import PlanError
from polymoe.evaluate.fidelity import OriginalModel
from polymoe.offline.api import make_plan
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.calibrate.family_run import FamilyRun, Routed
from polymoe.offline.calibrate.token_rows import TokenRows
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.encode.calibrated_encoder import CalibratedEncoder
from polymoe.offline.encode.encode import make_encoder
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.plan.plan import Plan
from polymoe.offline.similarity.scan import scan_family

CAPACITY = 3  # of an expert, small enough that many tokens of an input pass theirs by


def rows(count: int, seed: int = 7) -> TokenRows:
    """Of every length; the longest input with room for 8 tokens beyond any capacity."""
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(2, 110) for _ in range(rng.randint(least, most))]

    return TokenRows.of_pairs([(ids(3, 20), [0, *ids(2, 12)]) for _ in range(count)])


def calibration(texts: list[TokenRows], folder: Path | None = None) -> Calibration:
    inputs = tuple(text.inputs for text in texts if text.inputs is not None)
    return Calibration(tuple(text.windows for text in texts), folder, inputs)


def pairs_of(text: TokenRows) -> tuple[list[list[int]], list[list[int]]]:
    """(windows, inputs) without padding."""
    assert text.inputs is not None
    windows, inputs = ([row[row >= 0].tolist() for row in side] for side in (text.windows, text.inputs))
    return windows, inputs


def own_outputs(model: Any, path: str, found: Routed) -> torch.Tensor:
    """What a stock model's experts of a layer make of what was routed, weighted."""
    out = torch.zeros_like(found.hidden)
    for number in range(4):
        tokens, gates = found.tokens_of(number)
        out[tokens] = model.get_submodule(f"{path}.expert_{number}")(found.hidden[tokens]) * gates[:, None]
    return out


def stock(family: Family) -> list[Any]:
    return [AutoModelForSeq2SeqLM.from_pretrained(c.path, dtype=torch.float32).eval() for c in family.checkpoints]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    return Family.open(make_switch_family(folder, 2, perturb=0.3, expert_capacity=CAPACITY, n_positions=48))


def one_group(family: Family, base: str, delta: str, merge: str = "regmean") -> Plan:
    shape = (len(family.names), family.architecture.num_layers, 4)
    base_, merge_, delta_ = (np.array(text, dtype=object) for text in (base, merge, delta))
    return Plan("test", np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.bool_), "", base_, merge_, delta_)


@torch.no_grad()
def test_the_streamed_pass_is_the_stock_models(family: Family) -> None:
    """Logits after the experts' own outputs are those of what is served: capacity counts in the encoder, in the decoder
    it does not. Only real tokens arrive, and one layer's weights of one stack are there at a time."""
    texts, kept = [rows(5, 1), rows(4, 2)], [[0, 2], [1, 3]]
    models, dropped = stock(family), []
    with FamilyRun(family, texts, kept, 2) as run:
        for path in family.architecture.expert_modules:
            found = run.arrive()
            present = {name for name, weight in run.model(0).named_parameters() if not weight.is_meta}
            assert present
            assert all(path.startswith(name.partition(".layer.")[0]) for name in present)
            for text, routed in zip(texts, found, strict=True):
                assert len(routed.hidden) == text.count(encoder="encoder" in path)
            dropped.append(sum(int((routed.index < 0).sum()) for routed in found))
            run.proceed([own_outputs(m, path, routed) for m, routed in zip(models, found, strict=True)])
        logits = run.logits()
        assert all(weight.is_meta for weight in run.model(0).parameters())
    assert dropped[0] > 10
    assert dropped[1] == 0
    for checkpoint, text, chosen, got in zip(family.checkpoints, texts, kept, logits, strict=True):
        original = OriginalModel(checkpoint.path, torch.float32, torch.device("cpu"))
        want = original.logits(*pairs_of(text))
        assert torch.allclose(got, torch.cat([want[row][::2] for row in chosen]), atol=1e-5)


@torch.no_grad()
def test_a_layer_sees_what_the_compressed_layers_put_out(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's experts are fitted to inputs that come from the packed experts of the encoder."""
    texts, plan, arrived = [rows(24, 1), rows(24, 2)], one_group(family, "int3", "none"), []
    arrive = FamilyRun.arrive

    def spy(run: FamilyRun) -> list[Routed]:
        arrived.append(arrive(run))
        return arrived[-1]

    monkeypatch.setattr(FamilyRun, "arrive", spy)
    served = served_experts(family, plan, calibration(texts))
    monkeypatch.undo()
    encoder, decoder = family.architecture.expert_modules
    for v, (model, text) in enumerate(zip(stock(family), texts, strict=True)):
        with FamilyRun(family, texts) as run:
            run.proceed(
                [own_outputs(m, encoder, routed) for m, routed in zip(stock(family), run.arrive(), strict=True)]
            )
            original = run.arrive()[v].hidden
        for number in range(4):
            expert = model.get_submodule(f"{encoder}.expert_{number}")
            expert.wi.weight.copy_(served[v, 0]["up_proj"][number])
            expert.wo.weight.copy_(served[v, 0]["down_proj"][number])
        seen: list[torch.Tensor] = []
        model.get_submodule(decoder).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        read = text.model_arguments()
        model(**read, use_cache=False)
        found = arrived[1][v].hidden
        assert torch.allclose(found, seen[0][text.real().flatten()], atol=1e-4)
        assert not torch.allclose(found, original, atol=1e-2)


@torch.no_grad()
def routed_error(family: Family, plan: Plan, texts: list[TokenRows], fitted: Calibration | None) -> float:
    """Relative error of the layers' outputs on `texts` when every variant is served by what the encoder made."""
    served, models = served_experts(family, plan, fitted), stock(family)
    error = energy = 0.0
    with FamilyRun(family, texts) as run:
        for layer, path in enumerate(family.architecture.expert_modules):
            outputs = []
            for v, found in enumerate(run.arrive()):
                outputs.append(own_outputs(models[v], path, found))
                for number in range(4):
                    expert = models[v].get_submodule(f"{path}.expert_{number}")
                    expert.wi.weight.copy_(served[v, layer]["up_proj"][number])
                    expert.wo.weight.copy_(served[v, layer]["down_proj"][number])
                error += float((own_outputs(models[v], path, found) - outputs[-1]).square().sum())
                energy += float(outputs[-1].square().sum())
            run.proceed(outputs)
    return error / energy


@pytest.mark.parametrize(("base", "delta"), [("stored", "none"), ("int4", "d1"), ("int4", "d2"), ("int3", "none")])
def test_calibrated_experts_are_nearer_on_unseen_text(family: Family, base: str, delta: str) -> None:
    seen, unseen = [rows(150, 1), rows(150, 2)], [rows(30, 3), rows(30, 4)]
    plain = routed_error(family, one_group(family, base, delta, "mean"), unseen, None)
    fitted = routed_error(family, one_group(family, base, delta), unseen, calibration(seen))
    assert fitted < plain


@torch.no_grad()
def test_moments_are_those_of_the_tokens_that_experts_saw(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ g² x xᵀ over tokens within capacity, per token of the text; padding and what passed by do not count."""
    texts, moments = [rows(40, 1), rows(40, 2)], []
    one = CalibratedEncoder._moments

    def spy(self: CalibratedEncoder, *args: Any) -> dict[int, torch.Tensor]:
        moments.append(one(self, *args))
        return moments[-1]

    monkeypatch.setattr(CalibratedEncoder, "_moments", spy)
    encoder = make_encoder(family, scan_family(family), one_group(family, "int4", "none"), calibration(texts))
    encoder.layer(0)
    path = family.architecture.expert_modules[0]
    for v, model in enumerate(stock(family)):
        want = torch.zeros(4, 32, 32)

        def count(_module: Any, args: Any, want: torch.Tensor = want) -> None:
            hidden, selected, weights = args
            for number in range(4):
                taken = selected[:, 0, number].bool()
                x = (hidden * weights)[taken]
                want[number] += x.T @ x

        model.get_submodule(path).register_forward_pre_hook(count)
        for read in pairs_of(texts[v])[1]:  # one by one: no padding
            model.get_encoder()(torch.tensor([read]))
        want /= texts[v].count(encoder=True)
        for number in range(4):
            assert torch.allclose(moments[2 * number][v], want[number], atol=1e-5)  # up_proj, down_proj, up_proj, …


@torch.no_grad()
def test_an_interrupted_run_goes_on_where_it_was(family: Family, tmp_path: Path) -> None:
    scan, plan, texts = scan_family(family), one_group(family, "int4", "d2"), [rows(40, 1), rows(40, 2)]
    straight = make_encoder(family, scan, plan, calibration(texts))
    want = [flat(straight.layer(layer)) for layer in range(2)]
    make_encoder(family, scan, plan, calibration(texts, tmp_path)).layer(0)  # and then the process is killed
    (kept,) = tmp_path.glob("*/*")
    again = make_encoder(family, scan, plan, calibration(texts, tmp_path))
    written = kept.stat().st_mtime_ns
    found = [flat(again.layer(layer)) for layer in range(2)]
    assert kept.stat().st_mtime_ns == written
    for one, other in zip(want, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    other_inputs = calibration([rows(40, 3), rows(40, 2)])
    other_inputs = Calibration(calibration(texts).windows, None, other_inputs.inputs)
    assert other_inputs.hash() != calibration(texts).hash(), "what the encoder reads decides too"


@pytest.fixture(scope="module")
def texts(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pairs(family.names, tmp_path_factory.mktemp("texts"))


def test_pairs_become_rows(family: Family, texts: dict[str, Path], tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"input": "0 1 2 3 4 " * 20, "target": "fox " * 60}))
    made = Calibration.from_files(family, {"v1": [texts["v1"], long]})
    base, v1 = made.texts
    assert torch.equal(base.windows, v1.windows)  # base reads v1's text
    assert len(v1) == 41
    windows, inputs = pairs_of(v1)
    assert len(windows[-1]) == len(inputs[-1]) == 48, "what is longer is cut"
    assert all(window[0] == 0 and window[-1] == 1 for window in windows)
    assert all(read[-1] == 1 for read in inputs), "the end of a text is never cut off"
    few = Calibration.from_files(family, {"v1": [texts["v1"], long]}, window=48, max_windows=10)
    assert len(few.windows[0]) == 20  # so many rows of 48 tokens, half of them padding


@pytest.mark.parametrize(
    ("policy", "memory", "options"),
    [("regmean", None, {}), ("auto", "1.0x", {}), ("auto", "0.75x", {"host_share": 0.1}),
     ("auto", None, {"min_top1": 0.5}),
     ("delta", None, {"delta_bits": 2, "base": "int4"}), ("cluster", None, {"clusters": 1})],
)  # fmt: skip
def test_what_is_planned_on_text_is_served(
    family: Family, texts: dict[str, Path], tmp_path: Path, policy: str, memory: str | None, options: dict[str, Any]
) -> None:
    paths = {checkpoint.name: checkpoint.path for checkpoint in family.checkpoints}
    given = PlanOptions(calibrate={name: [path] for name, path in texts.items()}, **options)
    bundle = make_plan(paths, policy, memory, tmp_path / "bundle", options=given)
    assert Bundle.open(bundle.path, verify=True).manifest.policy == policy
    assert not (tmp_path / ".bundle.calibration").exists(), "finished layers are not needed any more"


def test_a_plan_on_text_is_nearer_at_the_same_bytes(texts: dict[str, Path], family: Family, tmp_path: Path) -> None:
    """Through the command, which measures on other pairs than it fits to."""
    figures, held_out = [], write_pairs(family.names, tmp_path, seed=1)
    for number, extra in enumerate(([], [f"--calibrate={name}={path}" for name, path in texts.items()])):
        specs = [f"{checkpoint.name}={checkpoint.path}" for checkpoint in family.checkpoints]
        out = tmp_path / str(number)
        given = [f"--text={name}={path}" for name, path in held_out.items()]
        command = ["plan", *specs, "--out", str(out), "--memory", "0.55x", *given, *extra]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        fidelity = [variant.fidelity for variant in Bundle.open(out).variants]
        figures.append(sum(found.kl for found in fidelity if found is not None))
    assert 0 < figures[1] < figures[0]


GOOD = '{"input": "the", "target": "fox"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "the quick brown fox\n",
            r'--calibrate: .*pairs.jsonl, line 1 is not JSON .*write \{"input": "…", "target"',
        ),
        ('{"messages": []}', r'line 1 has no text \'input\'; write \{"input": "…", "target": "…"\} on every line'),
        (GOOD, r"calibration targets for base .* have \d tokens; at least 256 are needed"),
    ],
)
def test_text_that_is_no_pairs_is_refused(family: Family, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(PlanError, match=message):
        Calibration.from_files(family, {"v1": [tmp_path / "pairs.jsonl"]})


def test_what_a_family_of_switch_cannot_do_with_text(family: Family, texts: dict[str, Path], tmp_path: Path) -> None:
    paths = {checkpoint.name: checkpoint.path for checkpoint in family.checkpoints}
    given = PlanOptions(calibrate={"v1": [texts["v1"]]}, distill=10)
    with pytest.raises(PlanError, match=r"--distill learns on decoder-only models.*leave it out"):
        make_plan(paths, "auto", "1.0x", tmp_path / "bundle", options=given)
    with pytest.raises(PlanError, match="regmean weighs experts by what they see; give text with --calibrate"):
        make_plan(paths, "regmean", None, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
