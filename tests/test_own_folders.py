"""What polymoe may remove or overwrite: folders and files that it made itself, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from polymoe.errors import PlanError
from polymoe.offline import atomic
from polymoe.offline.api import inspect, make_plan
from polymoe.offline.atomic import check_target, new_folder, remove_files, remove_leftovers
from polymoe.offline.bundle import Bundle
from polymoe.offline.calibrate import KEPT_LAYERS
from polymoe.offline.manifest import UNFINISHED_MANIFEST


@pytest.fixture(scope="module")
def specs(trio: dict[str, Path]) -> list[str]:
    return [f"{name}={path}" for name, path in trio.items()]


@pytest.fixture
def bundle(specs: list[str], tmp_path: Path) -> Path:
    return make_plan(specs, "separate", None, tmp_path / "b").path


def replace(specs: list[str], out: Path) -> None:
    make_plan(specs, "paper", None, out, overwrite=True)


MANIFESTS = {
    "a web app": '{"name": "my web app", "icons": []}',
    "a list": "[1, 2]",
    "no JSON": "const x = 1",
    "empty": "",
    "much like ours": '{"format_version": 2, "files": [{"path": "index.html"}]}',
    "files of another kind": '{"format_version": 3, "polymoe_version": "1", "files": ["index.html"]}',
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_folder_with_another_manifest_is_not_replaced(kind: str, specs: list[str], tmp_path: Path) -> None:
    """`plan --out webapp --force` removed a web app, because it had a manifest.json too."""
    folder = tmp_path / "webapp"
    folder.mkdir()
    (folder / "manifest.json").write_text(MANIFESTS[kind])
    (folder / "index.html").write_text("x")
    with pytest.raises(
        PlanError, match=r"webapp is not a bundle.*so --force will not replace it; choose another --out"
    ):
        replace(specs, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["webapp"]
    assert (folder / "index.html").read_text() == "x"
    assert (folder / "manifest.json").read_text() == MANIFESTS[kind]


@pytest.mark.parametrize("extra", ["notes.md", "variants/v1/notes.md", ".git/HEAD", "experts/layer-000.safetensors/x"])
def test_a_bundle_with_something_else_in_it_is_not_replaced(extra: str, specs: list[str], bundle: Path) -> None:
    path = bundle / extra
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(PlanError, match=rf"holds {extra.split('/')[0]}.*, which is not part of the bundle"):
        replace(specs, bundle)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc")])
def test_nor_one_with_a_folder_a_pipe_or_a_link(make: object, specs: list[str], bundle: Path) -> None:
    make(bundle / "mine")  # type: ignore[operator]
    with pytest.raises(PlanError, match="holds mine, which is not part of the bundle"):
        replace(specs, bundle)
    assert (bundle / "mine").exists()


def test_bundles_are_replaced(specs: list[str], bundle: Path) -> None:
    """Also damaged ones, those of other versions, and one whose last measurement was killed."""
    (bundle / "experts/layer-000.safetensors").unlink()
    (bundle / "variants/v1/config.json").write_text("edited")
    (bundle / UNFINISHED_MANIFEST).write_text("half")
    replace(specs, bundle)
    assert Bundle.open(bundle, verify=True).manifest.policy == "paper"
    fields = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(fields | {"format_version": 99, "new_field": 1}))
    replace(specs, bundle)
    assert Bundle.open(bundle, verify=True).manifest.policy == "paper"


def test_a_link_to_a_bundle_is_not_replaced(specs: list[str], bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    with pytest.raises(PlanError, match="link is not a folder"):
        replace(specs, tmp_path / "link")


def test_a_file_that_appears_while_a_bundle_is_written_stays(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds late"), new_folder(bundle, overwrite=True):
        (bundle / "late").write_text("mine")
    assert (bundle / "late").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_leftovers_of_others_stay(bundle: Path, tmp_path: Path) -> None:
    """Everything called `.NAME.tmp-…` beside a bundle was removed."""
    mine = [".b.tmp-notes", ".b.tmp-abcdefgh", ".b.old-abcdefgh", ".b.old-mine", ".bb.tmp-abcdefgh"]
    for name in mine:
        (tmp_path / name / "b").mkdir(parents=True)
        (tmp_path / name / "b" / "thesis.tex").write_text("x")
    dead = tmp_path / ".b.tmp-12345678"
    dead.mkdir()
    (dead / atomic._MARK).touch()
    (dead / "half").write_text("x")
    (tmp_path / ".b.tmp-00000000").mkdir()  # killed before it was marked
    remove_leftovers(bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*mine, "b"])
    assert all((tmp_path / name / "b" / "thesis.tex").exists() for name in mine)


def test_the_mark_is_not_published(tmp_path: Path) -> None:
    with new_folder(tmp_path / "b", overwrite=False) as folder:
        assert (folder / atomic._MARK).exists()
    assert not list((tmp_path / "b").iterdir())


def test_kept_layers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """`.NAME.calibration` beside a bundle was removed whole."""
    kept = [f"{'a' * 24}/3.safetensors", f"damage-{'0' * 24}/11.npy", f"{'a' * 24}/.4.safetensors.part"]
    mine = ["notes.txt", f"{'b' * 24}/thesis.safetensors", f"{'a' * 24}/3.safetensors.bak"]
    for name in (*kept, *mine):
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).touch()
    remove_files(tmp_path / "c", KEPT_LAYERS)
    left = sorted(path.relative_to(tmp_path / "c").as_posix() for path in (tmp_path / "c").rglob("*") if path.is_file())
    assert left == sorted(mine)
    for name in mine:
        (tmp_path / "c" / name).unlink()
    (tmp_path / "c" / kept[0]).touch()
    remove_files(tmp_path / "c", KEPT_LAYERS)
    assert not (tmp_path / "c").exists()
    remove_files(tmp_path / "c", KEPT_LAYERS)


def test_an_empty_folder_may_be_taken(specs: list[str], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(PlanError, match="exists"):
        check_target(tmp_path / "b", overwrite=False)
    replace(specs, tmp_path / "b")
    assert Bundle.open(tmp_path / "b", verify=True).manifest.policy == "paper"


def test_pictures_overwrite_pictures_only(specs: list[str], tmp_path: Path) -> None:
    """`inspect --png thesis.tex` overwrote it."""
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("thesis.tex", "link", "folder"):
        with pytest.raises(PlanError, match=rf"{name} is not a PNG picture, so it is not overwritten"):
            inspect(specs, tmp_path / name)
    with pytest.raises(PlanError, match="none does not exist"):
        inspect(specs, tmp_path / "none" / "x.png")
    assert (tmp_path / "thesis.tex").read_text() == "x"
    for _ in range(2):
        inspect(specs, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
