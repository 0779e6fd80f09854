"""Bundles hold what the plan says, are found whole or not at all, and need nothing outside themselves."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import ARCHITECTURES, make_family
from polymoe.bundle import atomic
from polymoe.bundle import tensor_file as tensorfile
from polymoe.bundle.reader import Bundle
from polymoe.console import Console
from polymoe.errors import BundleError, PlanError
from polymoe.offline.api import inspect, make_plan
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.plan.budget import build_plan
from polymoe.offline.similarity.scan import FamilyScan
from polymoe.offline.write import bundle_writer
from polymoe.offline.write.bundle_writer import write_bundle
from test_offline_family import grown
from zygote import zygote


def write(family: Family, scan: FamilyScan, out: Path, policy: str = "separate", memory: str | None = None) -> Bundle:
    return write_bundle(family, scan, build_plan(scan, policy, memory), out, overwrite=True)


def served_state(bundle: Bundle, variant: int) -> dict[str, torch.Tensor]:
    """The state dict that a variant is served with, put together through the bundle's public API."""
    state = {name: bundle.nonexpert(variant, name) for name in bundle.nonexpert_names}
    for layer, path in enumerate(bundle.expert_modules):
        resident = bundle.resident_experts(layer)
        experts = [
            {name: stack[p] for name, stack in resident.items()} if p >= 0 else bundle.host_expert(layer, -1 - p)
            for p in bundle.table[variant, layer].tolist()
        ]
        for name in bundle.expert_tensor_names:
            state[f"{path}.{name}"] = torch.stack([expert[name] for expert in experts])
    for target, source in bundle.manifest.tied.items():
        state[target] = state[source]
    return state


def stored_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the tensors themselves, measured from the files."""
    layers = range(len(bundle.expert_modules))
    sources = {name: sorted(set(bundle.nonexpert_sources(name))) for name in bundle.nonexpert_names}
    return {
        "resident_experts": sum(t.nbytes for layer in layers for t in bundle.resident_experts(layer).values()),
        "deltas": 0,
        "nonexperts_shared": sum(bundle.nonexpert(0, n).nbytes for n, s in sources.items() if len(s) == 1),
        "nonexperts_own": sum(bundle.nonexpert(v, n).nbytes for n, s in sources.items() if len(s) > 1 for v in s),
        "tables": bundle.table.nbytes,
    }


@pytest.mark.parametrize("memory", [None, "0.5x", "0x"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_separate_is_lossless(arch: str, memory: str | None, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"tie_word_embeddings": True} if arch == "granitemoe" else {}
    paths = make_family(arch, tmp_path / "checkpoints", num_variants=2, frozen_experts=[0], **overrides)
    bundle = make_plan(paths, "separate", memory, tmp_path / "bundle")
    for index, path in enumerate(paths.values()):
        want = AutoModelForCausalLM.from_pretrained(path).state_dict()
        state = served_state(bundle, index)
        assert set(state) == set(want)
        assert all(torch.equal(state[name], want[name]) for name in want)
    assert stored_bytes(bundle) == bundle.resident_bytes.by_kind
    assert sum(bundle.manifest.positions.values()) == bundle.table[0].numel()


def test_paper_at_one_model(family: Family, scan: FamilyScan, tmp_path: Path) -> None:
    bundle = write(family, scan, tmp_path / "b", "paper", "1.0x")
    info = family.architecture
    one_model = sum(
        family.checkpoints[0].num_bytes(info.expert_tensor(layer, t)) for layer in range(2) for t in info.expert_shapes
    )
    assert bundle.resident_bytes.resident_experts == one_model == stored_bytes(bundle)["resident_experts"]
    assert bundle.manifest.bytes_per_expert_parameter == 4.0  # float32
    assert [bundle.host_experts(layer) for layer in range(2)] == [0, 0]
    assert bundle.table.tolist() == [[[0, 1, 2, 3]] * 2] * 3
    # The two identical positions (expert 2 of both layers, distance 0) come first, then the others by distance.
    order = np.argsort(scan.distance.reshape(-1), kind="stable").tolist()
    for rank, (layer, expert) in enumerate(divmod(flat, 4) for flat in order):
        owner = family.checkpoints[rank % 3].tensor(info.expert_tensor(layer, "down_proj"))
        assert torch.equal(bundle.resident_experts(layer)["down_proj"][expert], owner[expert])


def test_paper_with_absent_experts(family: Family, scan: FamilyScan, tmp_path: Path) -> None:
    bundle = write(family, scan, tmp_path / "b", "paper", "0.5x")
    assert bundle.manifest.positions == {"shared": 4, "separate": 0, "absent": 4}
    assert bundle.manifest.host_bytes == 4 * 3 * bundle.manifest.expert_bytes
    for variant, checkpoint in enumerate(family.checkpoints):
        for layer, expert in np.argwhere(bundle.table[variant].numpy() < 0):
            host = bundle.host_expert(layer, -1 - int(bundle.table[variant, layer, expert]))
            own = checkpoint.tensor(family.architecture.expert_tensor(layer, "gate_up_proj"))[expert]
            assert torch.equal(host["gate_up_proj"], own)


def test_identical_tensors_are_stored_once(family: Family, scan: FamilyScan, tmp_path: Path) -> None:
    bundle = write(family, scan, tmp_path / "b")
    assert bundle.manifest.resident_experts == [3 * 3 + 1] * 2  # expert 2 is the same in all
    assert bundle.nonexpert_sources("model.layers.0.self_attn.q_proj.weight") == (0, 0, 0)
    assert bundle.nonexpert_sources("model.layers.0.self_attn.k_proj.weight") == (0, 1, 2)
    assert bundle.resident_bytes.nonexperts_shared == 2 * 32 * 32 * 4


def test_shared_by_some(trio: dict[str, Path], tmp_path: Path) -> None:
    twin = Path(shutil.copytree(trio["v1"], tmp_path / "twin"))
    bundle = make_plan(trio | {"twin": twin}, "separate", None, tmp_path / "b")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert bundle.nonexpert_sources(name) == (0, 1, 2, 1)
    assert torch.equal(bundle.nonexpert(3, name), bundle.nonexpert(1, name))
    assert torch.equal(bundle.table[3], bundle.table[1])
    assert bundle.resident_bytes.by_kind == stored_bytes(bundle)


def test_relocatable_and_self_contained(tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "checkpoints", num_variants=2, tokenizer=True)
    make_plan(paths, "separate", None, tmp_path / "b")
    want = AutoModelForCausalLM.from_pretrained(paths["v1"]).state_dict()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b").rename(tmp_path / "elsewhere" / "c")
    bundle = Bundle.open(tmp_path / "elsewhere" / "c", verify=True)
    assert all(torch.equal(tensor, want[name]) for name, tensor in served_state(bundle, 1).items())
    assert [v.name for v in bundle.variants] == ["base", "v1"]
    assert bundle.variant_index("v1") == 1
    tokenizer = AutoTokenizer.from_pretrained(bundle.tokenizer_dir(1))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "v1user: hi\n"
    assert (bundle.variant_folder(1) / "generation_config.json").exists()
    assert bundle.config.model_type == "mixtral"


def test_added_vocabulary_rows(trio: dict[str, Path], tmp_path: Path) -> None:
    paths = {"base": trio["base"], "grown": grown(trio["base"], tmp_path / "grown", 3)}
    bundle = make_plan(paths, "separate", None, tmp_path / "b")
    assert bundle.config.vocab_size == 115
    assert [v.vocab_size for v in bundle.variants] == [112, 115]
    assert [bundle.variant_config(v).vocab_size for v in range(2)] == [112, 115]
    assert [tuple(bundle.nonexpert(v, "lm_head.weight").shape) for v in range(2)] == [(112, 32), (115, 32)]
    assert bundle.resident_bytes.by_kind == stored_bytes(bundle)


def test_longest_context_of_the_family(trio: dict[str, Path], tmp_path: Path) -> None:
    longer = Path(shutil.copytree(trio["v1"], tmp_path / "longer"))
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    bundle = make_plan({"base": trio["base"], "longer": longer}, "separate", None, tmp_path / "b")
    assert [v.max_model_len for v in bundle.variants] == [256, 512]
    assert bundle.config.max_position_embeddings == 512


def test_without_tokenizer(tmp_path: Path) -> None:
    bundle = make_plan(make_family("mixtral", tmp_path / "c", num_variants=1), "paper", None, tmp_path / "b")
    assert bundle.tokenizer_dir(0) is None
    assert not bundle.variants[0].has_tokenizer


def test_versions_name_the_content(family: Family, scan: FamilyScan, trio: dict[str, Path], tmp_path: Path) -> None:
    """Same answers, same version, under any name; other experts, another version."""
    lossless = write(family, scan, tmp_path / "a")
    part = write(family, scan, tmp_path / "b", memory="0.5x")  # other tiers, the same weights
    paper = write(family, scan, tmp_path / "c", "paper")
    renamed = make_plan({"other": trio["v1"], "base": trio["base"]}, "separate", None, tmp_path / "d")
    versions = [v.version for v in lossless.variants]
    assert len(set(versions)) == 3
    assert [v.version for v in part.variants] == versions
    assert [v.version for v in renamed.variants] == [versions[1], versions[0]]
    assert not set(versions) & {v.version for v in paper.variants}
    assert [v.source_hash for v in paper.variants] == [v.source_hash for v in lossless.variants]

    template = Path(shutil.copytree(trio["v1"], tmp_path / "v1"))
    (template / "chat_template.jinja").write_text("another")
    retold = make_plan({"v1": template}, "separate", None, tmp_path / "e")
    assert retold.variants[0].version != versions[1]
    assert retold.variants[0].source_hash == lossless.variants[1].source_hash


class TestOpen:
    @pytest.fixture
    def folder(self, family: Family, scan: FamilyScan, tmp_path: Path) -> Path:
        return write(family, scan, tmp_path / "b", memory="0.5x").path

    def test_not_a_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="is not a directory; make a bundle with `polymoe plan"):
            Bundle.open(tmp_path / "nowhere")
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(tmp_path)

    def test_no_manifest(self, folder: Path) -> None:
        (folder / "manifest.json").unlink()
        with pytest.raises(BundleError, match="unfinished bundle"):
            Bundle.open(folder)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 2}', b"\xff"])
    def test_damaged_manifest(self, folder: Path, content: str | bytes) -> None:
        (folder / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
            Bundle.open(folder)

    def test_other_format_version(self, folder: Path) -> None:
        (folder / "manifest.json").write_text('{"format_version": 99, "anything": "else"}')
        with pytest.raises(BundleError, match="has bundle format 99, this polymoe reads 2"):
            Bundle.open(folder)

    @pytest.mark.parametrize(
        "file",
        [
            "tables.safetensors",
            "experts/layer-001.safetensors",
            "host/layer-000.safetensors",
            "nonexperts/shared.safetensors",
            "nonexperts/variant.v1.safetensors",
            "variants/v2/config.json",
        ],
    )
    def test_missing_short_and_changed_files(self, folder: Path, file: str) -> None:
        path = folder / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if file.startswith(("experts/", "host/", "nonexperts/")):  # the large ones are not hashed to open them
            Bundle.open(folder)
        with pytest.raises(BundleError, match=f"{file} has changed"):
            Bundle.open(folder, verify=file.endswith(".safetensors"))
        path.write_bytes(content[:-1])
        with pytest.raises(BundleError, match=f"{file} has {len(content) - 1} bytes, not {len(content)}"):
            Bundle.open(folder)
        path.unlink()
        with pytest.raises(BundleError, match=f"{file} is missing"):
            Bundle.open(folder)

    def test_an_open_bundle_survives_its_replacement(self, folder: Path, family: Family, scan: FamilyScan) -> None:
        """Files opened late would mix two bundles: the old table with the new experts."""
        old = Bundle.open(folder)
        want = served_state(old, 1)
        write(family, scan, folder, "paper", "0.25x")
        assert all(torch.equal(tensor, want[name]) for name, tensor in served_state(old, 1).items())


class TestWriting:
    def leftovers(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))

    def test_existing_targets(self, family: Family, scan: FamilyScan, trio: dict[str, Path], tmp_path: Path) -> None:
        plan = build_plan(scan, "paper")
        write_bundle(family, scan, plan, tmp_path / "b")
        with pytest.raises(PlanError, match=r"b exists; choose another --out, or replace it with --force"):
            write_bundle(family, scan, plan, tmp_path / "b")
        with pytest.raises(PlanError, match="exists"):
            make_plan(trio, "paper", None, tmp_path / "b")
        write_bundle(family, scan, build_plan(scan, "separate"), tmp_path / "b", overwrite=True)
        assert Bundle.open(tmp_path / "b", verify=True).manifest.policy == "separate"
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis.tex").touch()
        with pytest.raises(PlanError, match="is not a bundle, so --force will not replace it"):
            write_bundle(family, scan, plan, tmp_path / "precious", overwrite=True)
        (tmp_path / "file").touch()
        with pytest.raises(PlanError, match="is not a folder"):
            write_bundle(family, scan, plan, tmp_path / "file", overwrite=True)
        with pytest.raises(PlanError, match="cannot be written"):
            write_bundle(family, scan, plan, tmp_path / "file" / "below")
        assert not self.leftovers(tmp_path)

    def test_where_folders_cannot_be_exchanged(
        self, family: Family, scan: FamilyScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(atomic, "exchange", lambda _a, _b: False)
        write(family, scan, tmp_path / "b", "paper")
        write(family, scan, tmp_path / "b", "separate")
        assert Bundle.open(tmp_path / "b", verify=True).manifest.policy == "separate"
        assert not self.leftovers(tmp_path)

    def test_a_bundle_put_aside_by_a_dead_writer_returns(
        self, family: Family, scan: FamilyScan, tmp_path: Path
    ) -> None:
        """Without an exchange in one step, a kill can fall between the two renames."""
        write(family, scan, tmp_path / "b", "paper")
        (tmp_path / ".b.old-12345678").mkdir()
        (tmp_path / "b").rename(tmp_path / ".b.old-12345678" / "b")
        with pytest.raises(PlanError, match="exists"):
            write_bundle(family, scan, build_plan(scan, "separate"), tmp_path / "b")
        assert Bundle.open(tmp_path / "b", verify=True).manifest.policy == "paper"
        assert not self.leftovers(tmp_path)

    def test_disk_too_small(
        self, family: Family, scan: FamilyScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 << 20))
        with pytest.raises(PlanError, match=r"the bundle needs 4\.\d MiB on the disk of .*, 3\.0 MiB are free"):
            write(family, scan, tmp_path / "b")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("existing", [False, True])
    def test_disk_full_in_the_middle(
        self, existing: bool, family: Family, scan: FamilyScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if existing:
            write(family, scan, tmp_path / "b", "paper")
        written = 0

        def append(self: Any, name: str, piece: torch.Tensor) -> int:
            nonlocal written
            written += piece.nbytes
            if written > 40_000:
                raise OSError(28, "No space left on device")
            return original(self, name, piece)

        original = tensorfile.TensorFileWriter.append
        monkeypatch.setattr(tensorfile.TensorFileWriter, "append", append)
        with pytest.raises(PlanError, match=r"the disk is full while writing .*nothing was changed"):
            write(family, scan, tmp_path / "b")
        assert [path.name for path in tmp_path.iterdir()] == (["b"] if existing else [])
        if existing:
            assert Bundle.open(tmp_path / "b", verify=True).manifest.policy == "paper"

    def test_interrupt_leaves_nothing(
        self, family: Family, scan: FamilyScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(bundle_writer._Writer, "_variant", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(family, scan, tmp_path / "b")
        assert not list(tmp_path.iterdir())

    def test_a_living_writer_is_left_alone(self, family: Family, scan: FamilyScan, tmp_path: Path) -> None:
        with atomic.new_folder(tmp_path / "b", overwrite=False) as other:
            write(family, scan, tmp_path / "b")
            assert other.exists()
            shutil.rmtree(tmp_path / "b")

    def test_a_target_that_appears_meanwhile(self, tmp_path: Path) -> None:
        def lose() -> None:
            with atomic.new_folder(tmp_path / "b", overwrite=False) as folder:
                (folder / "mine").touch()
                (tmp_path / "b").mkdir()

        with pytest.raises(PlanError, match="exists"):
            lose()
        assert not list((tmp_path / "b").iterdir())
        assert not self.leftovers(tmp_path)

    KILL = """
import os, sys, time
from polymoe.bundle import atomic
from polymoe.offline.write import bundle_writer
from polymoe.offline.api import make_plan

def stop(*_, **__):
    os.write(3, b"now")
    time.sleep(600)

moment, out, *specs = sys.argv[1:]
if moment == "between layers":
    layers = []
    write_layer = bundle_writer._Writer._expert_layer
    def one_layer(self, folder, layer, advance):
        stop() if layer else write_layer(self, folder, layer, advance)
    bundle_writer._Writer._expert_layer = one_layer
elif moment == "before the manifest":
    bundle_writer._Writer._manifest = stop
elif moment == "before the exchange":
    atomic._publish = stop
elif moment == "after the exchange":
    atomic.shutil = type("shutil", (), {"rmtree": stop})  # not everybody's: planning clears temporary folders
make_plan(specs, "separate", None, out, overwrite=True)
"""

    def test_kill_at_any_moment(self, family: Family, scan: FamilyScan, trio: dict[str, Path], tmp_path: Path) -> None:
        """`kill -9` leaves the old bundle or the new one, and the next run clears what is left of the dead one."""
        moments = {
            "between layers": "paper",
            "before the manifest": "paper",
            "before the exchange": "paper",
            "after the exchange": "separate",
        }
        specs = [f"{name}={path}" for name, path in trio.items()]
        running = {}
        for moment in moments:
            folder = tmp_path / moment
            folder.mkdir()
            write(family, scan, folder / "b", "paper")
            told, tells = os.pipe()
            running[moment] = zygote.fork(self.KILL, moment, str(folder / "b"), *specs, fd=tells), told
            os.close(tells)
        for moment, (process, told) in running.items():
            assert os.read(told, 3) == b"now"
            process.kill()
            assert process.wait() == -signal.SIGKILL
            os.close(told)
            folder = tmp_path / moment
            assert Bundle.open(folder / "b", verify=True).manifest.policy == moments[moment]
            (left,) = self.leftovers(folder)
            if moment in ("between layers", "before the manifest"):
                with pytest.raises(BundleError, match="unfinished"):
                    Bundle.open(folder / left)
            write(family, scan, folder / "b", "separate")
            assert Bundle.open(folder / "b", verify=True).manifest.policy == "separate"
            assert not self.leftovers(folder)


def test_make_plan_says_what_it_decided(trio: dict[str, Path], tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=False)
    make_plan([f"{n}={p}" for n, p in trio.items()], "paper", "1.5x", tmp_path / "b", console=console)
    text = console.export_text()
    for part in (
        "policy paper 1.5x",
        "1.50x one model's",
        "8 expert positions: 6 shared",
        "2 separate, 0 absent",
        "v2",
    ):
        assert part in text


def test_make_plan_refuses_early(trio: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not a memory budget"):
        make_plan(trio, "paper", "lots", tmp_path / "b")
    with pytest.raises(PlanError, match="below the minimum of"):
        make_plan(trio, "paper", "1KiB", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_inspect(trio: dict[str, Path], tmp_path: Path) -> None:
    console = Console(record=True, width=120)
    scan = inspect(trio, tmp_path / "map.png", console)
    text = console.export_text()
    assert "MixtralForCausalLM: base, v1, v2" in text
    assert f"{scan.relative_distance.max():.2%}" in text
    assert "2 of 8" in text
    assert (tmp_path / "map.png").stat().st_size > 1000
