"""What changes in several bundles at once, and which one of them a new variant is nearest to, without engines."""

from pathlib import Path

import msgspec
import pytest

from families import make_family
from polymoe.bundle.live import LiveState
from polymoe.bundle.manifest import Manifest, read_manifest
from polymoe.bundle.rewrite import rewrite_manifests
from polymoe.offline.addition.process import run
from polymoe.offline.api import make_plan
from polymoe.protocol.planning import Answer, RankJob


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles `near`, `far` and `deep` of one variant each, the last one of another model."""
    folder = tmp_path_factory.mktemp("pools")
    for seed, (name, layers) in enumerate({"near": 2, "far": 2, "deep": 3}.items()):
        paths = make_family("mixtral", folder / name, 2, perturb=0.1, seed=seed, num_hidden_layers=layers)
        make_plan({name: paths["base"]}, "separate", None, folder / name / "bundle")
    return folder


def test_the_nearest_pool(folder: Path) -> None:
    """By the experts; a bundle of another model is told to be none, with the reason."""
    bundles = [str(folder / name / "bundle") for name in ("far", "near", "deep")]
    told: list[Answer] = []
    answer = run(RankJob(bundles=bundles, name="new", spec=str(folder / "near" / "v1")), told.append)
    assert answer.done
    assert list(answer.distances) == bundles[:2]
    assert answer.distances[bundles[1]] == pytest.approx(0.1, rel=0.2)
    assert answer.distances[bundles[0]] > 1.0
    assert "new" in answer.refusals[bundles[2]]
    assert [each.fraction for each in told] == [0.0, 1 / 3, 2 / 3]


def test_several_manifests_change_together_or_not_at_all(folder: Path) -> None:
    bundles = [folder / name / "bundle" for name in ("near", "far")]
    before = [read_manifest(bundle) for bundle in bundles]

    def renamed(manifest: Manifest) -> Manifest:
        names = {f"{variant.name}-2": variant.version for variant in manifest.variants}
        return msgspec.structs.replace(manifest, live=LiveState(names=names), format_version=3)

    def refused(_: Manifest) -> Manifest:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        rewrite_manifests([(bundles[0], renamed), (bundles[1], refused)])
    assert [read_manifest(bundle) for bundle in bundles] == before
    rewrite_manifests([(bundle, renamed) for bundle in bundles])
    assert [list(read_manifest(bundle).live_state.names) for bundle in bundles] == [["near-2"], ["far-2"]]
