"""Distillation: what is trained is what is served, and the bundle changes whole, only for the better, or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from decoded import decoded_experts
from families import make_family
from polymoe.bundle.reader import Bundle
from polymoe.console import Console
from polymoe.errors import PlanError
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.distill import distill as distilling
from polymoe.offline.distill.distill import _mean_kl, distill
from polymoe.offline.distill.learned import rewrite
from polymoe.offline.distill.served_variant import ServedVariant
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.plan.options import PlanOptions
from polymoe.offline.similarity.scan import scan_family
from polymoe.offline.write.bundle_writer import write_bundle


def texts(num_variants: int, count: int = 24) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randint(2, 110, (count, 24), generator=generator) for _ in range(num_variants))


def planned(arch: str, folder: Path, policy: str = "delta", num_variants: int = 2) -> tuple[Family, Bundle]:
    torch.manual_seed(0)  # of the fine-tunes
    family = Family.open(
        make_family(arch, folder / "family", num_variants, frozen_experts=[1], dtype=torch.bfloat16, tokenizer=True)
    )
    scan = scan_family(family)
    options = PlanOptions() if policy == "auto" else PlanOptions(base="int4", delta_bits=1)
    plan = build_plan(scan, policy, "0.9x" if policy == "auto" else None, options, family)
    return family, write_bundle(family, scan, plan, folder / "bundle")


@pytest.mark.parametrize(("arch", "policy"), [("mixtral", "delta"), ("mixtral", "auto"), ("gpt_oss", "delta")])
def test_what_is_trained_is_what_is_served(arch: str, policy: str, tmp_path: Path) -> None:
    family, bundle = planned(arch, tmp_path, policy)
    for v, checkpoint in enumerate(family.checkpoints):
        student = ServedVariant(bundle, v, checkpoint)
        model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        text = texts(2)[v][:2]
        with torch.no_grad():
            assert torch.allclose(student.original_logits(text), model(input_ids=text).logits, atol=1e-5)
            for layer, path in enumerate(bundle.expert_modules):
                for name, stack in decoded_experts(bundle, v, layer).items():
                    model.get_parameter(f"{path}.{name}").copy_(stack)
            want = model(input_ids=text).logits
        assert torch.allclose(student.logits(text, student.stored()), want, atol=1e-4)
        trained = {key for key in student.stored() if isinstance(key, tuple)}
        assert trained
        assert any("norm" in name for name in student.names)
        assert any("router" in name or ".gate." in name for name in student.names)


def test_a_distilled_bundle_is_whole_and_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, bundle = planned("mixtral", tmp_path)
    monkeypatch.setattr(distilling, "_LEARNING_RATE", {"scales": 0.003, "nonexperts": 0.0003})
    calibration, console = Calibration(texts(2, 32)), Console(record=True, width=160)
    held_out = [windows[7::8] for windows in calibration.windows]

    def damage(which: Bundle) -> list[float]:
        students = [ServedVariant(which, v, checkpoint) for v, checkpoint in enumerate(family.checkpoints)]
        return [_mean_kl(s, text, s.stored()) for s, text in zip(students, held_out, strict=True)]

    before, versions = damage(bundle), [record.version for record in bundle.variants]
    after = distill(bundle, family, calibration, 40, console)
    found = Bundle.open(after.path, verify=True)
    assert found.resident_bytes == bundle.resident_bytes
    assert len(found.manifest.files) == len(bundle.manifest.files)
    kept = [now != then for now, then in zip((r.version for r in found.variants), versions, strict=True)]
    assert any(kept)
    for was, now, changed in zip(before, damage(found), kept, strict=True):
        assert now < was if changed else now == pytest.approx(was)
    assert f"held-out KL {before[0]:.5f} before" in console.export_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_interrupted_rewrite_leaves_the_bundle_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, bundle = planned("mixtral", tmp_path)
    student = ServedVariant(bundle, 1, family.checkpoints[1])
    learned = student.rounded({key: torch.full_like(value, 0.1) for key, value in student.stored().items()})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("polymoe.offline.distill.learned.encode_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        rewrite(bundle, {1: learned})
    assert Bundle.open(bundle.path, verify=True).manifest == bundle.manifest
    monkeypatch.undo()
    changed = rewrite(bundle, {1: learned})
    again = ServedVariant(changed, 1, family.checkpoints[1]).stored()
    for key, value in student.stored().items():
        assert not torch.equal(again[key], value)
        assert torch.equal(again[key], learned.values[key].float())
    was, now = (ServedVariant(which, 0, family.checkpoints[0]).stored() for which in (bundle, changed))
    assert all(torch.equal(value, now[key]) for key, value in was.items())
    assert np.array_equal(changed.table, bundle.table)


def test_a_family_beyond_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, bundle = planned("mixtral", tmp_path)
    monkeypatch.setattr(distilling, "cpu_memory", lambda: 100_000)
    with pytest.raises(PlanError, match=r"--distill needs about .* 97\.7 KiB are there"):
        distill(bundle, family, Calibration(texts(2)), 1)
