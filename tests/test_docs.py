"""What the pages for contributors name is there: files, folders, tests."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md")
# A page may leave out where a reader is told to look.
IN_PACKAGE = ("", "native", "native/csrc", "native/csrc/portable", "kernels/cpu", "kernels/gpu", "model/backends")
FOLDERS = ("", *(f"src/polymoe/{folder}" for folder in IN_PACKAGE))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|md|toml))`", text))
    linked = {(ROOT / page).parent / target for target in re.findall(r"\]\(([^)#:\s]+)", text)}
    assert named
    assert not [name for name in named if not any((ROOT / folder / name).exists() for folder in FOLDERS)]
    assert not [link for link in linked if not link.exists()]


def test_every_proof_of_an_extension_exists() -> None:
    proofs = re.findall(r"Proof: `(\w+)`", (ROOT / "docs/extending.md").read_text())
    assert len(proofs) == 4
    tests = (ROOT / "tests/test_extending.py").read_text()
    assert not [name for name in proofs if f"def {name}(" not in tests]


def test_every_folder_of_the_package_is_drawn() -> None:
    drawn = (ROOT / "docs/architecture.md").read_text().partition("## The folders")[2].partition("Imports go down")[0]
    package = ROOT / "src/polymoe"
    folders = [path.parent for depth in ("*", "*/*") for path in package.glob(f"{depth}/__init__.py")]
    assert not [folder for folder in folders if f"{folder.name}/" not in drawn]
