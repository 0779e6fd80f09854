"""Hashes of weights: compared when asked to, beside loading where it costs nothing; and originals that changed."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import TEXT, make_family
from polymoe import LLM
from polymoe.bundle import verify
from polymoe.bundle.bundle_checks import file_sha256
from polymoe.bundle.reader import Bundle
from polymoe.bundle.verify import hashed_beside, verify_bundle
from polymoe.cli.main import app
from polymoe.config import EngineConfig
from polymoe.console import Console
from polymoe.errors import BundleError
from polymoe.evaluate.planned_original import changes_since_plan
from polymoe.evaluate.report import run_eval
from polymoe.offline.api import make_plan
from zygote import run_python

WEIGHTS = ["experts/layer-000.safetensors", "host/layer-001.safetensors", "nonexperts/variant.v1.safetensors"]


@pytest.fixture
def bundle(trio: dict[str, Path], tmp_path: Path) -> Path:
    return make_plan(trio, "separate", "0.5x", tmp_path / "b").path


def flip(file: Path) -> None:
    """One bit of a weight."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_verify_names_every_file_that_changed(bundle: Path) -> None:
    console = Console(record=True, width=200)
    verify_bundle(bundle, console)
    count = len(Bundle.open(bundle).manifest.files)
    assert f"b: {count} files, " in (text := console.export_text())
    assert "all as planned." in text
    for file in WEIGHTS:
        flip(bundle / file)
    (bundle / "variants/v2/tokenizer.json").unlink()
    with pytest.raises(BundleError) as caught:
        verify_bundle(bundle)
    assert all(f"{file} has changed" in str(caught.value) for file in WEIGHTS)
    assert "variants/v2/tokenizer.json is missing" in str(caught.value)


def test_the_command(bundle: Path) -> None:
    assert "all as planned" in CliRunner().invoke(app, ["verify", str(bundle)]).output
    flip(bundle / WEIGHTS[0])
    done = CliRunner().invoke(app, ["verify", str(bundle)])
    assert done.exit_code == 1
    assert isinstance(done.exception, BundleError)


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_flipped_bit_is_not_served(bundle: Path, file: str) -> None:
    """It changed answers under the same version."""
    flip(bundle / file)
    with pytest.raises(BundleError, match=f"{file} has changed"):
        LLM(bundle, dtype="float32")


@pytest.mark.parametrize("file", WEIGHTS)
def test_large_bundles_are_hashed_when_asked(bundle: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_AT_ONCE", 0)
    LLM(bundle, dtype="float32", verify=True)
    flip(bundle / file)
    with pytest.raises(BundleError, match=f"{file} has changed"):
        LLM(bundle, dtype="float32", verify=True)


def test_large_bundles_are_hashed_beside_loading(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded is looked at as far as the hashing comes; nothing waits for the rest."""
    monkeypatch.setattr(verify, "_AT_ONCE", 0)
    opened = Bundle.open(bundle)
    flip(bundle / WEIGHTS[0])
    hashed: list[str] = []

    def seen(path: Path, stopped: object) -> str | None:
        found = file_sha256(path, stopped)  # type: ignore[arg-type]
        hashed.append(path.relative_to(bundle).as_posix())
        return found

    monkeypatch.setattr(verify, "file_sha256", seen)

    def load() -> None:
        with hashed_beside(opened, everything=False):
            while WEIGHTS[0] not in hashed:
                pass

    with pytest.raises(BundleError, match=f"{WEIGHTS[0]} has changed"):
        load()
    assert not [file for file in hashed if file.startswith("host/")], "what is not loaded is not read"


def test_nothing_waits_for_hashes_after_an_error(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    flip(bundle / WEIGHTS[0])
    with pytest.raises(ZeroDivisionError), hashed_beside(opened, everything=True):
        raise ZeroDivisionError


def test_a_bundle_that_is_replaced_while_it_loads(bundle: Path, trio: dict[str, Path]) -> None:
    """The loader holds the old files, so that the new ones' hashes say nothing."""
    opened = Bundle.open(bundle)
    with hashed_beside(opened, everything=True):
        make_plan(trio, "paper", None, bundle, overwrite=True)


def test_progress_of_verifying(bundle: Path) -> None:
    shown: list[tuple[str, float]] = []
    with hashed_beside(Bundle.open(bundle), True, lambda stage, fraction: shown.append((stage, fraction))):
        pass
    assert shown[-1] == ("verifying", 1.0)


class TestOriginals:
    @pytest.fixture
    def family(self, tmp_path: Path) -> dict[str, Path]:
        return make_family("mixtral", tmp_path / "family", num_variants=2, tokenizer=True)

    def evaluate(self, bundle: Path, family: dict[str, Path], tmp_path: Path) -> str:
        text = tmp_path / "text.txt"
        text.write_text(" ".join(TEXT))
        console = Console(record=True, width=500)
        config = EngineConfig(bundle=str(bundle), device="cpu", dtype="float32", enable_prefix_caching=False)
        run_eval(config, dict.fromkeys(family, text), {}, 32, 2, 2, console)
        return console.export_text()

    def test_an_original_that_changed_is_said(self, family: dict[str, Path], tmp_path: Path) -> None:
        """The figures then compared with another model, without a word."""
        bundle = make_plan(family, "separate", None, tmp_path / "b").path
        assert "warning" not in self.evaluate(bundle, family, tmp_path)
        other = make_family("mixtral", tmp_path / "other", num_variants=1, seed=7)["base"]
        shutil.copy(other / "model.safetensors", family["v1"])
        config = json.loads((family["base"] / "config.json").read_text())
        (family["base"] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
        (family["base"] / "chat_template.jinja").unlink()
        said = self.evaluate(bundle, family, tmp_path)
        assert "original of v1" in said
        assert "is not the one that was planned (weights changed)" in said
        assert "is not the one that was planned (chat_template.jinja, config.json changed)" in said

    @pytest.mark.parametrize("policy", ["separate", "mean"])
    def test_what_the_family_did_to_an_original_is_no_change(self, policy: str, tmp_path: Path) -> None:
        """Its hash is taken of the weights after a cast, and with a head of its own where another variant has one."""
        made = {
            name: make_family("mixtral", tmp_path / name, 3, dtype=dtype, tie_word_embeddings=tied)[name]
            for name, dtype, tied in (
                ("base", torch.bfloat16, False), ("v1", torch.float32, False), ("v2", torch.bfloat16, True),
            )
        }  # fmt: skip
        bundle = make_plan(made, policy, None, tmp_path / "b")
        for variant, path in enumerate(made.values()):
            assert changes_since_plan(bundle, variant, path) == []
        assert changes_since_plan(bundle, 0, made["v1"])[0] == "weights"


TWICE = """
import sys
from pathlib import Path
from polymoe.console import Console
from polymoe.offline.cache import plan_cached
print(plan_cached(sys.argv[2:], "paper", "1.0x", Path(sys.argv[1]), Console(stderr=True, width=300)))
"""


def test_two_starts_at_once_with_an_empty_cache(trio: dict[str, Path], tmp_path: Path) -> None:
    """Of two `polymoe demo` one ended with an error; it opens the bundle that the other made."""
    specs = [f"{name}={path}" for name, path in trio.items()]
    with ThreadPoolExecutor(2) as pool:
        start = partial(run_python, TWICE, str(tmp_path / "cache"), *specs)
        done = [future.result() for future in [pool.submit(start), pool.submit(start)]]
    assert [process.returncode for process in done] == [0, 0], done
    (folder,) = {process.stdout.strip() for process in done}
    said = [process.stderr for process in done]
    assert sum("Planned meanwhile by another polymoe" in text or "Planned before" in text for text in said) == 1
    Bundle.open(folder, verify=True)
    assert not list((tmp_path / "cache").glob(".*.tmp-*")), "nothing unfinished is left"
